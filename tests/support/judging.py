"""`clsa` in chunks of 8 pictures, so that few pictures are shared by several processes."""

import sys

from clsa.cli.main import main
from clsa.evaluate.features import extract
from clsa.loading import loader

if __name__ == "__main__":
    loader.EVAL_CHUNK = extract.EVAL_CHUNK = 8
    sys.exit(main(sys.argv[1:]))
