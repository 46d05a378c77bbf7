"""Turns a sweep's YAML file or preset into its cells, each with its resolved `RunOptions`."""

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from clsa.options.commands import SweepOptions
from clsa.options.config import Config, flatten, merge, nearest, read_yaml
from clsa.options.protocols import CARDS, Name
from clsa.options.run import RunOptions, Seed
from clsa.recipes import resolve
from clsa.system.errors import ClsaError, Exit
from clsa.system.files import ASSETS

PRESETS = ASSETS / "sweeps"
OWN = {"out": "--out", "seed": "seeds", "config": "base"}  # set by the sweep, from these
MAX_NAME = 120

Axes = dict[str, dict[str, dict[str, Any]]]
"""For each axis, its places as text, and the options that each place sets."""


class Grid(Config):
    """The contents of a sweep's file."""

    name: str = ""
    """Name of the sweep (default: the name of the file)."""
    about: str = ""
    """The question that the sweep asks; printed above the table."""
    seeds: tuple[Seed, ...] = (0,)
    """Every row of the table is run once with each seed."""
    protocol: tuple[Name, ...] = ("knn-20", "knn-strong")
    """The protocols that judge the encoders."""
    labels: str | None = None
    """The subset of labels that judging learns from, written as for `clsa evaluate --labels`."""
    base: dict[str, Any] = pydantic.Field({})
    """Options that all runs share, in groups or with dotted names."""
    grid: dict[str, Any] = pydantic.Field({})
    """Axes: an option with a list of values, or any name with `label: options` pairs."""


class Cell(NamedTuple):
    """One run of the grid."""

    row: dict[str, str]
    """Its place on each axis, as text."""
    options: RunOptions

    def __str__(self) -> str:
        row = [*self.row.items(), ("seed", self.options.seed)]
        return " ".join(f"{axis}={place}" for axis, place in row)


def read_grid(options: SweepOptions) -> Grid:
    """Read the grid of a preset or a file; options on the command line replace the file's.

    Raises:
        ClsaError: if neither a file nor a preset has this name, if the file is not a grid, or if
            the command line sets an option that an axis varies.
    """
    name = options.sweep
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    path = PRESETS / f"{name}.yaml" if name in presets else Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        close = nearest(name, presets)
        hint = f"did you mean {close}?" if close else f"give a file, or {', '.join(presets)}"
        raise ClsaError(f"sweep {name}", "no such file or preset", hint, Exit.NO_INPUT)
    grid = Grid.parse({"name": path.stem, **read_yaml(path)}, str(path))
    given = {
        "data": {} if options.data is None else {"data": options.data},
        **{key: getattr(options, key) for key in ("epochs", "max_minutes", "device")},
    }
    given = {key: value for key, value in given.items() if value is not None}
    for axis, places in axes_of(grid).items():
        for clash in dotted(given) & set_by(places):
            flag = clash.rpartition(".")[2].replace("_", "-")
            raise ClsaError(f"--{flag}", f"the axis {axis} sets it", "remove one of the two")
    return grid.model_copy(
        update={
            "seeds": grid.seeds if options.seeds is None else options.seeds,
            "protocol": grid.protocol if options.protocol is None else options.protocol,
            "base": merge(nested(grid.base), given),
        }
    )


def axes_of(grid: Grid) -> Axes:
    """Bring the axes of a grid into one form.

    Raises:
        ClsaError: if an axis has no values, has the same value twice, or has another form.
    """
    axes: Axes = {}
    for axis, places in grid.grid.items():
        where = f"{grid.name}: grid: {words(axis)}"
        if isinstance(places, list):
            pairs = [(words(value), nested({axis: value})) for value in places]
        elif isinstance(places, dict) and all(isinstance(value, dict) for value in places.values()):
            pairs = [(words(label), nested(values)) for label, values in places.items()]
        else:
            hint = "write `option: [value, value]` or `name: {label: {option: value}}`"
            raise ClsaError(where, "not an axis", hint)
        if not pairs or len(dict(pairs)) < len(pairs):
            raise ClsaError(
                where, "a value appears twice" if pairs else "no values", "correct the axis"
            )
        axes[words(axis)] = dict(pairs)
    return axes


def cells_of(grid: Grid, out: Path) -> list[Cell]:
    """Resolve every run of a sweep in `out`: all rows with the first seed, then the next, ...

    Raises:
        ClsaError: if there is nothing to run, if any cell has an unknown option or value, if two
            axes set the same option, if the grid sets an option that belongs to the sweep itself,
            or if two rows are the same run.
    """
    axes = axes_of(grid)
    for kind, found in (("grid", axes), ("seeds", grid.seeds), ("protocol", grid.protocol)):
        if not found or len(set(found)) < len(found):
            why = "one appears twice" if found else "there are none"
            raise ClsaError(f"{grid.name}: {kind}", why, "correct the file")
    for name in grid.protocol:
        if CARDS[name].pictures != "classes":
            why = "it needs VOC's or COCO's folders, but a sweep judges on its own pictures"
            raise ClsaError(
                f"{grid.name}: protocol {name}", why, "judge the runs with clsa evaluate"
            )
    owners: dict[str, str] = {}
    for axis, places in {"base": {"": nested(grid.base)}, **axes}.items():
        for name in sorted(set_by(places)):
            where = f"{grid.name}: {axis}: {name}"
            if name in OWN:
                raise ClsaError(where, "the sweep itself sets it", f"use {OWN[name]}")
            if owners.get(name, "base") != "base":
                raise ClsaError(where, f"the axis {owners[name]} sets it too", "remove one")
            owners[name] = axis
    rows = [dict(zip(axes, places, strict=True)) for places in itertools.product(*axes.values())]
    cells = []
    for seed in grid.seeds:
        for row, folder in zip(rows, names_of(rows), strict=True):
            values = {**nested(grid.base), "seed": seed, "out": str(out / f"{folder}_seed-{seed}")}
            for axis, place in row.items():
                values = merge(values, axes[axis][place])
            title = " ".join(f"{axis}={place}" for axis, place in row.items())
            cells.append(Cell(row, resolve(values, f"{grid.name}: {title}")))
    require_different(grid, cells[: len(rows)])
    return cells


def require_different(grid: Grid, cells: list[Cell]) -> None:
    """Raise when two cells are the same run."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        options = flatten(cell.options)
        facts = {name: options[name] for name in options if name not in (*OWN, "recipe")}
        same = seen.setdefault(json.dumps(facts, default=str), cell)
        if same is not cell:
            what = f"{grid.name}: {cell}"
            raise ClsaError(what, f"the same run as {same}", "remove one of them")


def require_same(before: Grid, now: Grid, free: set[str], out: Path) -> None:
    """Raise unless both grids have the same rows; seeds, protocols, `free` options may differ."""

    def rows(grid: Grid) -> str:
        base = {name: value for name, value in leaves(nested(grid.base)) if name not in free}
        return json.dumps([grid.labels, sorted(base.items()), list(grid.grid.items())])

    if rows(before) != rows(now):
        why = f"holds another sweep (see {out / 'sweep.yaml'})"
        raise ClsaError(str(out), why, "choose another --out, or use that sweep's grid and options")


def names_of(rows: list[dict[str, str]]) -> list[str]:
    """A folder name for each row: readable, ASCII, unique, the same at every start."""
    names = ["_".join(slug(f"{axis}-{place}") for axis, place in row.items()) for row in rows]
    counts = Counter(name[:MAX_NAME].casefold() for name in names)
    return [
        name
        if counts[name.casefold()] == 1
        else f"{name[:MAX_NAME]}-{hashlib.sha256(json.dumps(row).encode()).hexdigest()[:8]}"
        for name, row in zip(names, rows, strict=True)
    ]


def slug(text: str) -> str:
    """`text` as part of a file name: other characters than letters, digits and dots become `-`."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "unnamed"


def words(value: Any) -> str:
    """A value or label of a grid on one line, written as in YAML."""
    if isinstance(value, list):
        return ",".join(map(words, value)) or "none"
    plain = value is None or isinstance(value, (bool, dict))
    text = json.dumps(value) if plain else str(value)
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split()) or "''"


def nested(values: dict[Any, Any]) -> dict[str, Any]:
    """Expand dotted names into groups, at any depth."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        value = nested(value) if isinstance(value, dict) else value
        for part in reversed(str(name).split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and values of all options in nested groups."""
    found = []
    for name, value in values.items():
        inner = isinstance(value, dict)
        found += leaves(value, f"{prefix}{name}.") if inner else [(prefix + name, value)]
    return found


def dotted(values: dict[str, Any]) -> set[str]:
    """Dotted names of all options in nested groups."""
    return {name for name, _ in leaves(values)}


def set_by(places: dict[str, dict[str, Any]]) -> set[str]:
    """Dotted names of the options that an axis sets."""
    return set().union(*map(dotted, places.values()))
