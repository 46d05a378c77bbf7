"""`python -m clsa` and `torchrun -m clsa`."""

import sys

from clsa.cli import main

if __name__ == "__main__":
    sys.exit(main())
