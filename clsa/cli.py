"""The command line: each command parses, then calls one function. torch is imported only inside."""

import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from clsa import __version__
from clsa.command_options import (
    DemoOptions,
    DiagnoseOptions,
    EmbedOptions,
    EvaluateOptions,
    ExportOptions,
    ExtendOptions,
    PackOptions,
    PredictOptions,
    PreviewOptions,
    ProtocolsOptions,
    ReplayOptions,
    ScenesOptions,
    SweepOptions,
)
from clsa.config import Config, merge, nearest, read_yaml, to_yaml
from clsa.errors import ClsaError, Exit, memory_told
from clsa.options import RunOptions
from clsa.protocols import CARDS
from clsa.recipes import RECIPES, described, overrides_of, resolve

Options = TypeVar("Options", bound=Config)


def pretrain(args: list[str]) -> None:
    """Learn an encoder from pictures; the same command again resumes the run."""
    path, recipe = _value_of("--config", args), _value_of("--recipe", args)
    values: dict[str, Any] = {} if path is None else read_yaml(Path(path))
    resolved = set(RunOptions.model_fields) <= set(values)
    if recipe and resolved and values["recipe"] != recipe:
        why = f"{path} was resolved from {values['recipe']} and sets every option"
        raise ClsaError(f"--recipe {recipe}", why, "leave out one of the two")
    values = merge(values, {"recipe": recipe} if recipe else {})
    method = _value_of("--method.name", args)
    values = merge(values, {"method": {"name": method}} if method else {})
    options = _parse("pretrain", RunOptions, args, resolve(values, path or "options"))
    from clsa.stages import pretrain as run

    say_next(run(options))


def is_first() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return int(os.environ.get("RANK", 0)) == 0


def say_next(out: Path) -> None:
    """What to do with a run, for its owner."""
    if is_first():
        name = shlex.quote(str(out))
        staged = (out / "stage-1").exists()
        sheet, board = "stage-1/views.png" if staged else "views.png", out / "tensorboard"
        print(f"\n{out} holds the encoder, {sheet} (look at it), metrics.jsonl and config.yaml.")
        print("Next:")
        print(f"  clsa evaluate {name}    did it learn? (needs labels)")
        print(f"  clsa diagnose {name}    what the network sees, in figures")
        print(f"  clsa embed {name}       a vector for every picture")
        print(f"  tensorboard --logdir {shlex.quote(str(out if staged else board))}")
        print(f'  python -c "import clsa; encoder = clsa.load_encoder({str(out)!r})"')


def extend(args: list[str]) -> None:
    """Train a run longer, finished or not; the same command again resumes it."""
    options = _parse("extend", ExtendOptions, args)
    from clsa.extend import extend as run

    say_next(run(options))


def evaluate(args: list[str]) -> None:
    """Judge a run's encoder beside its random initialisation; writes results.json."""
    options = _parse("evaluate", EvaluateOptions, args)
    from clsa.evaluate.heads import saved_heads
    from clsa.evaluate.results import results_path
    from clsa.evaluate.run import evaluate as run

    records = run(options)
    if is_first():
        _print_table(records)
        print(f"All records: {results_path(options.run)}")
        learned = {name for name, _ in saved_heads(options.run)}
        if learned & {record.protocol for record in records}:
            name = shlex.quote(str(options.run))
            print(f"Next: clsa predict {name} IMAGES    labels pictures by what it learned")


def protocols(args: list[str]) -> None:
    """List the protocol cards `evaluate` judges by; with a NAME, all that this one fixes."""
    name = _parse("protocols", ProtocolsOptions, args).name
    if name and name not in CARDS:
        close = nearest(name, list(CARDS))
        hint = f"did you mean {close}?" if close else "see clsa protocols"
        raise ClsaError(f"protocol {name}", "there is no such card", hint)
    if name:
        card = CARDS[name]
        print(f"{name}: {card.about} [{card.source}]\nhash {card.hash(name)}\n")
        print(to_yaml(card.settings()), end="")
        return
    kinds = {
        "classes": "Pictures of one class each (--data as for pretraining):",
        "voc": "VOC07's folders, several classes a picture (--data VOCdevkit):",
        "boxes": "Objects in VOC's or COCO's folders (--data VOCdevkit or COCO):",
    }
    for kind, heading in kinds.items():
        print(heading)
        for each, card in CARDS.items():
            if card.pictures == kind:
                star = "" if card.frozen else " *"
                print(f"  {each:19} {card.about} ({card.source}){star}")
    print("* the encoder's copy learns too. clsa protocols NAME shows all that a card fixes.")


def predict(args: list[str]) -> None:
    """Label pictures with a classifier that evaluate learned; writes CSV or JSON."""
    options = _parse("predict", PredictOptions, args)
    from clsa.evaluate.predict import predict as run

    print(run(options))


def embed(args: list[str]) -> None:
    """Write a parquet table: path, label, vector."""
    options = _parse("embed", EmbedOptions, args)
    from clsa.evaluate.embed import embed as run

    print(f"{run(options)}: read it with pandas.read_parquet or any parquet reader")


def preview(args: list[str]) -> None:
    """Draw what a run goes by: --neighbours, its pictures and their positives (CLIM)."""
    options = _parse("preview", PreviewOptions, args)
    from clsa.preview import preview as run

    print(f"{run(options)}: look at it")


def pack(args: list[str]) -> None:
    """Write pictures once into tar shards that are quick to read, also by webdataset."""
    options = _parse("pack", PackOptions, args)
    from clsa.pack import pack as run

    packed = run(options)
    state = "packed" if packed.fresh else "packed already:"
    size, plural = packed.num_bytes / 1e6, "s" if packed.shards > 1 else ""
    print(f"{state} {packed.pictures:,} pictures, {size:,.1f} MB in {packed.shards} shard{plural}")
    name = shlex.quote(str(options.out))
    if packed.left_out:
        print(f"unreadable, so left out: {packed.left_out} (see {name}/quarantine.jsonl)")
    print(f"Next: clsa pretrain --data {name} --out runs/packed")


def demo(args: list[str]) -> None:
    """Three minutes on a CPU: pretrain on embedded drawings, compare random and trained."""
    options = _parse("demo", DemoOptions, args)
    from clsa.evaluate.run import evaluate as judge
    from clsa.start import pretrain as run

    overrides_of(options.recipe)  # is there such a recipe?
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
    told = f"{options.recipe} on the embedded drawings, {options.epochs} epochs"
    print(f"Pretraining {told}.")
    run(settings)
    records = judge(EvaluateOptions(run=options.out, seed=options.seed))
    _print_table([record for record in records if record.metric in ("top1", "balanced")])
    say_next(options.out)


def sweep(args: list[str]) -> None:
    """Run a grid of options with seeds, resumable; writes one table of means and deviations."""
    options = _parse("sweep", SweepOptions, args)
    from clsa.sweep import sweep as run

    run(options)


def recipes(args: list[str]) -> None:
    """List the named runs with source, cost and status; with a NAME, what that one sets."""
    name = _parse("recipes", _Recipe, args).name
    if name:
        values = {key: value for key, value in overrides_of(name).items() if key != "recipe"}
        print(described(name), end="\n\n")
        print(to_yaml(values), end="")
        return
    for each in RECIPES:
        print(described(each))


class _Recipe(Config):
    name: Annotated[str, tyro.conf.Positional] = ""
    """Recipe to show."""


class _Run(Config):
    run: tyro.conf.Positional[Path]
    """Run folder."""


def export(args: list[str]) -> None:
    """Write the encoder for another library: detectron2, with the papers' configurations."""
    options = _parse("export", ExportOptions, args)
    from clsa.export import export as run

    out = shlex.quote(str(run(options)))
    print(f"{out} holds the weights. Where detectron2 is installed:")
    print(f"  cd {out} && python train_net.py --config-file voc-c4-24k.yaml --num-gpus 8")


def digest(args: list[str]) -> None:
    """One sha256 over model, key network, bank, optimiser and step of a run."""
    options = _parse("digest", _Run, args)
    from clsa.checkpoint import run_digest

    print(run_digest(options.run))


def replay(args: list[str]) -> None:
    """Take a step that was not finite again, and tell where the bad number comes from."""
    options = _parse("replay", ReplayOptions, args)
    from clsa.replay import replay as run
    from clsa.replay import told

    print(told(run(options)), flush=True)


def scenes(args: list[str]) -> None:
    """Compose scenes with known objects from the embedded drawings, to try detection on."""
    options = _parse("scenes", ScenesOptions, args)
    from clsa.scenes import scenes as run

    found = run(options)
    print(f"{options.out}: {found.scenes} scenes, {found.things} objects", end="")
    print(f", {found.hidden} of them hidden by more than half")


def diagnose(args: list[str]) -> None:
    """Look into a run: positives, classes, spread, distortions; numbers and figures."""
    options = _parse("diagnose", DiagnoseOptions, args)
    from rich.console import Console

    from clsa.diagnose import diagnose as run
    from clsa.diagnose import table

    findings, numbers, figures = run(options)
    Console().print(table(findings))
    print(f"All numbers: {numbers}")
    if figures:
        print(f"Figures: {', '.join(path.name for path in figures)} in {numbers.parent}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "pretrain": pretrain,
    "extend": extend,
    "evaluate": evaluate,
    "protocols": protocols,
    "predict": predict,
    "diagnose": diagnose,
    "embed": embed,
    "preview": preview,
    "scenes": scenes,
    "pack": pack,
    "sweep": sweep,
    "recipes": recipes,
    "export": export,
    "digest": digest,
    "replay": replay,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code (see `errors.Exit`)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return Exit.OK if args else Exit.USAGE
    if args[0] == "--version":
        print(__version__)
        return Exit.OK
    try:
        if args[0] not in COMMANDS:
            close = nearest(args[0], list(COMMANDS))
            hint = f"did you mean {close}?" if close else f"use one of {', '.join(COMMANDS)}"
            raise ClsaError(f"command {args[0]}", "no such command", hint)
        with memory_told():
            COMMANDS[args[0]](args[1:])
        sys.stdout.flush()
    except ClsaError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt as error:
        why = f"stopped by {error}" if str(error) else "interrupted"
        print(f"error: {why} - nothing more was written - run it again", file=sys.stderr)
        return Exit.PREEMPTED
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.IO
    return Exit.OK


def _overview() -> str:
    lines = [f"  {name:9} {(run.__doc__ or '').strip()}" for name, run in COMMANDS.items()]
    return "\n".join(
        [
            "clsa: learn to see from pictures without labels.",
            "",
            "usage: clsa COMMAND [options]      clsa COMMAND --help lists the options",
            "",
            *lines,
            "",
            "Start: clsa demo, then: clsa pretrain --data MY/PICTURES --out runs/mine",
        ]
    )


def _parse(command: str, kind: type[Options], args: list[str], default: Any = None) -> Options:
    text = COMMANDS[command].__doc__
    given = {} if default is None else {"default": default}
    return tyro.cli(
        kind, prog=f"clsa {command}", description=text, args=args,
        config=(tyro.conf.AvoidSubcommands,), **given,
    )  # fmt: skip


def _value_of(flag: str, args: list[str]) -> str | None:
    """What last follows `flag` on the command line; needed before the rest can be parsed."""
    value = None
    for arg, after in zip(args, [*args[1:], None], strict=False):
        name, equals, given = arg.partition("=")
        if name == flag:
            value = given if equals else after
    return value


def _printable(text: str) -> str:
    """`text` without control bytes, on one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _print_table(records: list[Any]) -> None:
    from rich.console import Console

    from clsa.evaluate.results import table

    Console().print(table(records))
