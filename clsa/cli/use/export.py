"""`clsa export`."""

import shlex

from clsa.cli.command import parse
from clsa.options.commands import ExportOptions


def export(args: list[str]) -> None:
    """Write the encoder for detectron2, with the papers' configurations."""
    options = parse(export, ExportOptions, args)
    from clsa.exchange.detectron2 import export as run

    out = shlex.quote(str(run(options)))
    print(f"{out} holds the weights. On a machine with detectron2:")
    print(f"  cd {out} && python train_net.py --config-file voc-c4-24k.yaml --num-gpus 8")
