"""The structure of the package, read from its own docstrings and imports.

    python -m tests.support.structure

prints the tree with one line per wing, how many files and imports there are, and how often the
start of a run climbs to a file later in reading order. `test_structure.py` holds the rules.
"""

import ast
import contextlib
import functools
import io
import itertools
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import clsa

ROOT = Path(clsa.__file__).parent
ENTRY = re.compile(r"    (\w+)(\.py|/) +(.+)")
DEPTHS = (1, 2, 3)  # calls below the first function
BESIDE = ("recipes",)
"""Folders that stand next to a wing and do not count as a wing."""


class Entry(NamedTuple):
    """A line of the list in an `__init__` docstring."""

    name: str
    is_folder: bool
    text: str


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The parsed source of a file."""
    return ast.parse(path.read_text("utf-8"))


def docstring(folder: Path) -> str:
    """The docstring of a folder's `__init__`."""
    return ast.get_docstring(tree_of(folder / "__init__.py"), clean=False) or ""


def entries(folder: Path) -> list[Entry]:
    """The files and folders that a folder's `__init__` lists, in its order."""
    found = (ENTRY.fullmatch(line) for line in docstring(folder).splitlines())
    return [Entry(match[1], match[2] == "/", match[3]) for match in found if match]


def modules(folder: Path = ROOT) -> list[str]:
    """Names of all modules in reading order, from the one that imports nothing to the last.

    The `__init__` of a folder stands after its files, because it may re-export their names.
    """
    names: list[str] = []
    for entry in entries(folder):
        path = folder / entry.name
        names += modules(path) if entry.is_folder else [name_of(path)]
    return [*names, name_of(folder)] if folder != ROOT else names


def name_of(path: Path) -> str:
    """Dotted name of a file (without its suffix) or folder, below `clsa`."""
    return ".".join(path.relative_to(ROOT).parts)


def path_of(name: str) -> Path:
    """The file of a module; the empty name is the package itself."""
    path = ROOT.joinpath(*name.split(".")) if name else ROOT
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.startswith("clsa.") and path_of(inner[5:]).exists()
                yield inner if is_module else str(node.module)


def own_imports(name: str) -> set[str]:
    """Names of the modules of this package that a module imports; the package itself left out."""
    found = {module for module in imports(tree_of(path_of(name))) if module.startswith("clsa.")}
    return {module.removeprefix("clsa.") for module in found} - {name}


def upward(names: list[str]) -> list[tuple[str, str]]:
    """Imports of a module that does not come before the importing one in `names`."""
    place = {name: number for number, name in enumerate(names)}
    assert len(place) == len(names), "a file is listed twice"
    return [
        (name, other)
        for name in names
        for other in sorted(own_imports(name))
        if place.get(other, len(names)) >= place[name]  # unlisted: `losses`, `__main__`
    ]


def longest_chain(names: list[str]) -> list[str]:
    """The longest row of modules in which each imports the next."""
    chains: dict[str, list[str]] = {}
    for name in names:
        below = [chains[other] for other in own_imports(name) if other in chains]
        chains[name] = [name, *max(below, key=len, default=[])]
    return max(chains.values(), key=len)


class Route:
    """The files that a run enters, in order, from its start to its first step.

    A route of depth 1 has only what the first function calls; deeper ones have the details that a
    reader may take on trust.
    """

    def __init__(self) -> None:
        self.files: dict[int, list[str]] = {depth: [] for depth in DEPTHS}
        self.base: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """For `sys.setprofile`."""
        name = module_of(frame.f_code.co_filename) if event == "call" else ""
        if not name or frame.f_code.co_name[0] == "<":
            return
        if frame.f_code.co_name == "train_step":
            sys.setprofile(None)
            return
        self.base = self.base or frame
        outer, depth = frame.f_back, 0
        while outer is not None and outer is not self.base and depth < max(DEPTHS):
            depth += bool(module_of(outer.f_code.co_filename))
            outer = outer.f_back
        for limit, files in self.files.items():
            if depth < limit and files[-1:] != [name]:
                files.append(name)

    def climbs(self, names: list[str], depth: int) -> int:
        """How often the route goes from a file to one that stands after it in reading order."""
        place = {name: number for number, name in enumerate(names)}
        known = [place[name] for name in self.files[depth] if name in place]
        return sum(after > before for before, after in itertools.pairwise(known))


@functools.cache
def module_of(filename: str) -> str:
    """Name of the module in a file of this package; empty for any other file."""
    path = Path(filename)
    inside = path.is_relative_to(ROOT)
    return name_of(path.with_suffix("")).removesuffix(".__init__") if inside else ""


def route_of_a_start() -> Route:
    """The route of a small run on the embedded drawings."""
    from clsa.recipes import resolve
    from clsa.training.start import pretrain

    route = Route()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        values = {
            "recipe": "clsa-small",
            "data": {"data": "clipart", "num_images": 64, "workers": 0},
            "out": f"{folder}/run",
            "batch_size": 32,
            "max_steps": 1,
            "probe_every": 0,
            "device": "cpu",
            "tensorboard": "off",
        }
        options = resolve(values)
        sys.setprofile(route)
        try:
            pretrain(options)
        finally:
            sys.setprofile(None)
    return route


def main() -> None:
    """Print the tree and its figures."""
    for entry in entries(ROOT):
        folder = ROOT / entry.name
        count = sum(path.name != "__init__.py" for path in folder.rglob("*.py"))
        size = f"{count:3} files" if entry.is_folder else ""
        print(f"{entry.name + '/' * entry.is_folder:12} {size:10} {entry.text}")
    names = modules()
    chain = longest_chain(names)
    arrows = sum(len(own_imports(name)) for name in names)
    print(f"\nmodules: {len(names)}; imports between them: {arrows}")
    print(f"imports that run upward: {len(upward(names))}")
    print(f"longest chain of imports: {len(chain)} ({' > '.join(chain)})")
    route = route_of_a_start()
    for depth, files in route.files.items():
        print(
            f"start of a run, {depth} calls deep: {len(files)} files entered, "
            f"{route.climbs(names, depth)} climbs"
        )
        if depth < max(DEPTHS):
            print(f"  {' > '.join(files)}")


if __name__ == "__main__":
    main()
