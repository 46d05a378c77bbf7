"""Runs `clsa` with chunks of 8 pictures, so that several processes share even a small set."""

import sys

from clsa.cli.main import main
from clsa.evaluate.features import extract
from clsa.loading import loader

if __name__ == "__main__":
    loader.EVAL_CHUNK = extract.EVAL_CHUNK = 8
    sys.exit(main(sys.argv[1:]))
