"""The shape of the code base: wings, order and sizes of the files, and what none of them may do."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import structure
from tests.support.structure import ROOT, entries, imports, own_imports, path_of

WINGS = [
    "system", "options", "pictures", "views", "loading", "learning", "methods", "runs", "exchange",
    "evaluate", "diagnose", "training", "sweeps", "pages", "cli",
]  # fmt: skip
ORDER = structure.modules()
FILES = [*ORDER, "losses", "__main__", ""]
FOLDERS = [path.parent for path in sorted(ROOT.rglob("__init__.py"))]
NAMED = re.compile(r"`(clsa(?:\.\w+)+)")
PATHS = re.compile(r"`((?:clsa|tests|benchmarks|docs)/[a-z0-9_/]+\.(?:py|md|sh|yaml))`")
MAX_FILES, MAX_LINES, MAX_METHOD_LINES = 14, 400, 80


@functools.cache
def tree_of(name: str) -> ast.Module:
    return structure.tree_of(path_of(name))


def relative(folder: Path) -> str:
    return str(folder.relative_to(ROOT))


def test_the_wings_stand_in_their_order() -> None:
    named = [entry.name for entry in entries(ROOT) if entry.name not in structure.BESIDE]
    assert all(entry.is_folder for entry in entries(ROOT))
    assert named == [wing for wing in WINGS if (ROOT / wing).exists()]


def test_no_file_stands_outside_a_wing() -> None:
    found = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    wings = {entry.name for entry in entries(ROOT)} | {"assets"}
    assert found - wings == {"__init__.py", "__main__.py", "losses.py", "py.typed"}


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_a_folder_lists_its_files_and_says_what_it_is_for(folder: Path) -> None:
    listed = {entry.name + ("" if entry.is_folder else ".py") for entry in entries(folder)}
    kept = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    inner = {path.parent.name for path in folder.glob("*/__init__.py")}
    outside = {"__main__.py", "losses.py"} if folder == ROOT else set()
    assert listed == (kept | inner) - outside
    assert len(kept) <= MAX_FILES
    if folder != ROOT:
        text = " ".join(structure.docstring(folder).split())
        said = " In come" in text and " Out go" in text
        assert said, "the docstring says what comes in (In come ...) and what goes out (Out go ...)"


def test_imports_run_downward_only() -> None:
    assert structure.upward(ORDER) == []


@pytest.mark.parametrize("name", ORDER)
def test_no_import_goes_round_the_rule(name: str) -> None:
    """Nothing through the package itself but its version; no module by a name in a string."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            assert "clsa" not in {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "clsa":
            assert {alias.name for alias in node.names} <= {"__version__", *WINGS, "recipes"}
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            assert function != "__import__"
            assert "import_module" not in function or name == "system.extras"
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            assert not [text for text in texts if re.match(r"clsa\.\w", str(text))]


def test_every_folder_is_a_package() -> None:
    assert {path.parent for path in ROOT.rglob("*.py")} == set(FOLDERS)


def test_the_losses_only_hand_on_names() -> None:
    import clsa
    from clsa import losses

    nodes = tree_of("losses").body
    assert {type(node) for node in nodes} <= {ast.Expr, ast.ImportFrom, ast.Assign}
    assert all(name.startswith("learning.") for name in own_imports("losses"))
    assert sorted(losses.__all__) == losses.__all__ and set(losses.__all__) <= set(dir(losses))
    assert all(getattr(losses, name).__doc__ for name in losses.__all__)
    for name in ("info_nce", "distribution_divergence", "bank_statistics"):
        assert getattr(clsa, name) is getattr(clsa.losses, name)
    assert "moco" in clsa.methods.METHODS


def test_the_losses_need_little() -> None:
    code = """
import sys
import clsa.losses
wanted = {"timm", "pydantic", "tyro", "rich", "PIL", "clsa.options", "clsa.runs"} & set(sys.modules)
print(sorted(wanted))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_command_stands_in_a_file_of_its_name() -> None:
    from clsa.cli.main import COMMANDS

    homes = {name: command.__module__ for name, command in COMMANDS.items()}
    assert all(home.rpartition(".")[2] == name for name, home in homes.items())
    files = {path.stem for path in (ROOT / "cli").glob("*/*.py")} - {"__init__", "next_steps"}
    assert files == set(COMMANDS)


def test_tests_stand_in_the_same_wings() -> None:
    tests = Path(__file__).parent
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")} - {Path()}
    assert {str(path) for path in folders if not (ROOT / path).is_dir()} == {"fault"}
    assert not [path for path in tests.glob("*.py") if not path.name.startswith("test_")]


def test_the_readme_has_the_line_of_each_wing() -> None:
    text = (ROOT.parent / "README.md").read_text("utf-8")
    for entry in entries(ROOT):
        assert f"\n  {entry.name + '/':12} {entry.text}\n" in text, entry.name
    picture = (ROOT.parent / "docs" / "images" / "flow.svg").read_text("utf-8")
    assert all(f"{entry.name}/" in picture for entry in entries(ROOT))


def names_in(module: object, dotted: str) -> bool:
    """Whether a dotted name that docs mention is a module or a name in one."""
    for part in dotted.split(".")[1:]:
        if not hasattr(module, part):
            try:
                importlib.import_module(f"{getattr(module, '__name__', '')}.{part}")
            except ImportError:
                return False
        module = getattr(module, part)
    return True


def test_names_that_docs_mention_exist() -> None:
    import clsa

    files = [path_of(name) for name in FILES]
    files += [*ROOT.parent.glob("*.md"), *(ROOT.parent / "docs").glob("*.md")]
    texts = {path: path.read_text("utf-8") for path in files if path.name != "CHANGELOG.md"}
    names = {(path, name) for path, text in texts.items() for name in NAMED.findall(text)}
    missing = [(path.name, name) for path, name in names if not names_in(clsa, name)]
    assert missing == []
    paths = {(path, name) for path, text in texts.items() for name in PATHS.findall(text)}
    assert [(path.name, name) for path, name in paths if not (ROOT.parent / name).exists()] == []


def test_the_package_itself_imports_nothing_when_imported() -> None:
    outer = [node for node in tree_of("").body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert set(imports(ast.Module(outer, []))) == {"pathlib", "typing"}


def test_a_start_of_a_run_hardly_climbs() -> None:
    """A reader who follows the start goes down once to set out the run, and once to train it."""
    command = [sys.executable, "-m", "tests.support.structure"]  # no checks of shapes in between
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, timeout=240)
    climbs = [int(words) for words in re.findall(r"files entered, (\d+) climbs", done.stdout)]
    assert len(climbs) == 3, done.stderr
    assert climbs[0] <= 1 and climbs[1] <= 4


@pytest.mark.parametrize("name", FILES)
def test_files_stay_small(name: str) -> None:
    assert len(path_of(name).read_text("utf-8").splitlines()) < MAX_LINES


def lines_of_code(tree: ast.Module) -> set[int]:
    """Lines that hold code: no blank ones, comments, docstrings, and no fields of a Config."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr, ast.arg, ast.keyword, ast.alias)):
            lines |= {node.lineno, node.end_lineno or node.lineno}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, ast.ClassDef) and "Config" in map(ast.unparse, node.bases):
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    lines -= set(range(field.lineno, (field.end_lineno or field.lineno) + 1))
    return lines


def test_code_is_counted_without_words() -> None:
    head = '"""Doc.\n\nMore."""\n\n# why\nclass A(Config):\n    x: int = 1\n    """X."""\n'
    body = "    def f(self):\n        # why\n        return [\n            1\n        ]\n"
    assert lines_of_code(ast.parse(head + body)) == {6, 9, 11, 12, 13}


@pytest.mark.parametrize("name", [name for name in ORDER if name.startswith("methods.")])
def test_a_method_fits_on_a_page(name: str) -> None:
    assert len(lines_of_code(tree_of(name))) <= MAX_METHOD_LINES


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("name", FILES)
def test_nothing_dangerous_is_called(name: str) -> None:
    for function, call in calls(tree_of(name)):
        keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
        last = function.rpartition(".")[2]
        assert function not in ("eval", "exec", "compile", "os.system", "os.popen"), function
        assert not function.startswith(("pickle.", "marshal.", "shelve.")), function
        assert not function.startswith("subprocess.") or name == "system.slurm", (
            function
        )  # scontrol
        assert last not in ("extractall", "unsafe_load", "full_load"), function
        assert keywords.get("shell") != "True" and "trust_remote_code" not in keywords, function
        assert keywords.get("pretrained", "False") == "False", function
        if function == "torch.load":
            assert keywords.get("weights_only") == "True"
        if function in ("yaml.load", "yaml.load_all"):
            assert "Loader" in keywords
        if function == "np.load":
            assert keywords.get("allow_pickle") == "False"
        if last == "jit" or function.startswith("torch.hub"):
            raise AssertionError(function)


def test_the_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from clsa.options import config

    assert issubclass(config._Loader, yaml.SafeLoader)


@pytest.mark.parametrize("name", FILES)
def test_randomness_comes_from_the_counter(name: str) -> None:
    seeded = {
        id(call)
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.With)
        and any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
        for _, call in calls(node)
    }
    for function, call in calls(tree_of(name)):
        assert not function.startswith(("np.random.", "numpy.random.", "random.")), function
        if function in ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all"):
            assert id(call) in seeded, f"{function} outside fork_rng"
        if function in ("torch.rand", "torch.randn", "torch.randint", "torch.randperm"):
            keywords = {word.arg for word in call.keywords}
            assert "generator" in keywords, f"{function} draws from the global generator"
    assert not {"random", "secrets", "uuid"} & set(imports(tree_of(name)))


@pytest.mark.parametrize("name", FILES)
def test_no_framework_and_no_pickle(name: str) -> None:
    unwanted = {"lightning", "pytorch_lightning", "hydra", "omegaconf", "pickle", "dill"}
    unwanted |= {"sklearn", "scipy", "umap", "plotly", "matplotlib", "pandas"}
    unwanted |= {"faiss", "pycocotools"}  # libraries of the extras come through `extras.require`
    assert not roots(tree_of(name)) & unwanted


def roots(tree: ast.AST) -> set[str]:
    return {module.split(".")[0] for module in imports(tree)}


def test_training_needs_none_of_the_tools_of_analysis() -> None:
    code = """
import sys
blocked = "faiss umap plotly sklearn scipy matplotlib pycocotools pandas pyarrow".split()
sys.modules.update(dict.fromkeys(blocked))
import clsa.training.stages, clsa.evaluate.evaluate
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "imported\n", done.stderr
