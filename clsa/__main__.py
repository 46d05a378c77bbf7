"""Entry point of `clsa`, `python -m clsa` and `torchrun -m clsa`.

Signals are handled before the slow imports begin.
"""

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
