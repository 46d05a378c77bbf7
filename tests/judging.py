"""`clsa` in chunks of 8 pictures, so that few pictures are shared by several processes."""

import sys

import clsa.data
import clsa.evaluate.features
from clsa.cli import main

if __name__ == "__main__":
    clsa.data.EVAL_CHUNK = clsa.evaluate.features.EVAL_CHUNK = 8
    sys.exit(main(sys.argv[1:]))
