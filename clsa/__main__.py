"""`clsa`, `python -m clsa`, `torchrun -m clsa`: signals are heeded before the slow imports."""

import sys

from clsa.system import signals

TRAIN = ("pretrain", "extend", "demo", "sweep")


def console() -> None:
    """Entry point of the `clsa` script."""
    if sys.argv[1:2] and sys.argv[1] in TRAIN:
        signals.leave_at_once()
    from clsa.cli.main import main

    sys.exit(main())


if __name__ == "__main__":
    console()
