"""`python -m clsa` and `torchrun -m clsa`."""

from clsa.cli import console

if __name__ == "__main__":
    console()
