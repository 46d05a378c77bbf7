"""`clsa`, `python -m clsa` and `torchrun -m clsa`: heeds signals before anything slow is imported."""

import sys

from clsa import signals

TRAIN = ("pretrain", "demo", "sweep")


def console() -> None:
    """Entry point of the `clsa` script."""
    if sys.argv[1:2] and sys.argv[1] in TRAIN:
        signals.leave_at_once()
    from clsa.cli import main

    sys.exit(main())


if __name__ == "__main__":
    console()
