"""What to print after a run: how to use it."""

import shlex
from pathlib import Path

from clsa.cli.command import is_first


def say_next(out: Path) -> None:
    """Print what a run folder holds, and the commands that use it."""
    if is_first():
        name = shlex.quote(str(out))
        staged = (out / "stage-1").exists()
        sheet, board = "stage-1/views.png" if staged else "views.png", out / "tensorboard"
        print(f"\n{out} holds the encoder, {sheet} (look at it), metrics.jsonl and config.yaml.")
        print("Next:")
        print(f"  clsa evaluate {name}    did it learn? (needs labels)")
        print(f"  clsa diagnose {name}    what the network has learned, in figures")
        print(f"  clsa embed {name}       a vector for every picture")
        if any(out.glob("stage-*/tensorboard")) if staged else board.exists():
            print(f"  tensorboard --logdir {shlex.quote(str(out if staged else board))}")
        print(f'  python -c "import clsa; encoder = clsa.load_encoder({str(out)!r})"')
