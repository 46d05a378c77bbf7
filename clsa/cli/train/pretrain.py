"""`clsa pretrain`."""

from pathlib import Path
from typing import Any

from clsa.cli.command import parse, value_of
from clsa.cli.train.next_steps import say_next
from clsa.options.config import merge, read_yaml
from clsa.options.run import RunOptions
from clsa.recipes import resized, resolve
from clsa.system.errors import ClsaError

RESOLVED = {"recipe", "views", "model", "optim", "method"}
"""A configuration with all of these, such as a run's config.yaml, sets every option."""


def pretrain(args: list[str]) -> None:
    """Learn an encoder from pictures; the same command resumes the run."""
    path, recipe = value_of("--config", args), value_of("--recipe", args)
    values: dict[str, Any] = {} if path is None else read_yaml(Path(path))
    resolved = set(values) >= RESOLVED
    if recipe and resolved and values["recipe"] != recipe:
        why = f"{path} was resolved from {values['recipe']} and sets every option"
        raise ClsaError(f"--recipe {recipe}", why, "give only one of --recipe and --config")
    values = merge(values, {"recipe": recipe} if recipe else {})
    method = value_of("--method.name", args)
    values = merge(values, {"method": {"name": method}} if method else {})
    size = value_of("--views.size", args) or ""
    if size.isdecimal() and int(size) >= 8:  # it moves the other views: known before the rest
        if resolved:  # a run's config.yaml: its views keep their relation, as a recipe's do
            values = resized(resolve(values, path or "options"), values, int(size))
        values = merge(values, {"views": {"size": int(size)}})
    options = parse(pretrain, RunOptions, args, resolve(values, path or "options"))
    from clsa.training.stages import pretrain as run

    say_next(run(options))
