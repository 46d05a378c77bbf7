"""`clsa demo`."""

from clsa.cli.command import parse
from clsa.cli.train.next_steps import say_next
from clsa.cli.use.evaluate import print_table
from clsa.options.commands import DemoOptions, EvaluateOptions
from clsa.recipes import overrides_of, resolve
from clsa.system.errors import ClsaError


def demo(args: list[str]) -> None:
    """Pretrain on embedded drawings, compare with a random encoder: three minutes on a CPU."""
    options = parse(demo, DemoOptions, args)
    from clsa.evaluate.evaluate import evaluate
    from clsa.training.start import pretrain

    overrides_of(options.recipe)  # refuses an unknown recipe
    if not options.recipe.endswith("-small"):
        why = "too large for the demo"
        raise ClsaError(f"recipe {options.recipe}", why, f"use {options.recipe}-small")
    values = {
        "recipe": options.recipe,
        "data": {"data": "clipart"},
        "out": str(options.out),
        "epochs": options.epochs,
        "seed": options.seed,
    }
    settings = resolve(values)
    work = f"{options.recipe} on the embedded drawings, {options.epochs} epochs"
    print(f"Pretraining {work}.")
    pretrain(settings)
    records = evaluate(EvaluateOptions(run=options.out, seed=options.seed))
    print_table([record for record in records if record.metric in ("top1", "balanced")])
    say_next(options.out)
