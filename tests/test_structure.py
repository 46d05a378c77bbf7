"""The shape of the code base: order of the files, their sizes, and what none of them may do."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import clsa

ROOT = Path(clsa.__file__).parent

# A file imports only from files that stand before it.
ORDER = [
    "errors", "signals", "slurm", "files", "lock", "host", "peers", "dist", "config",
    "method_options", "around_options", "options", "cards", "detect_cards", "protocols",
    "command_options", "extras",
    "rng", "decode", "archives", "names", "sources", "shards", "listing", "intake", "geometry",
    "color", "views", "order", "few_labels", "workers", "cutting", "streamed", "data", "pack",
    "roster", "annotations", "scenes",
    "models", "bank",
    "losses", "mixing", "assignments", "clustering", "neighbours", "optim",
    "methods.method", "methods.moco", "methods.simclr", "methods.byol", "methods.simsiam",
    "methods.swav", "methods.adco", "methods.instdisc", "methods.pirl", "methods.pcl",
    "methods.moco_v3", "methods.dino", "methods.supervised",
    "methods.around", "methods.clim", "methods.suncet", "methods.continual",
    "methods.stronger", "methods",
    "checkpoint", "evaluate", "evaluate.results", "evaluate.split", "evaluate.features",
    "evaluate.on_disk", "evaluate.progress", "evaluate.heads", "evaluate.leaks", "evaluate.knn",
    "evaluate.diagnostics", "evaluate.operations", "evaluate.figures",
    "evaluate.logistic", "evaluate.linear", "evaluate.linear_fast", "evaluate.finetune",
    "evaluate.average_precision", "evaluate.box_ap", "evaluate.detector", "evaluate.detect",
    "evaluate.voc07", "evaluate.voc07_released", "evaluate.svm",
    "evaluate.subject", "evaluate.run", "evaluate.predict", "evaluate.embed", "export",
    "folder", "preview", "networks", "bench", "diagnosis", "diagnose",
    "bad_steps", "alarms", "health", "journal", "environment", "change", "state", "judge", "saver",
    "train", "start", "replay",
    "exemplars", "forgetting", "stages", "extend",
    "recipes.recipe", "recipes.imagenet", "recipes.cifar", "recipes.small",
    "recipes.around", "recipes",
    "grid", "tally", "sweep", "cli", "__main__",
]  # fmt: skip
FILES = [*ORDER, ""]
MAX_LINES, MAX_METHOD_LINES = 400, 80


def path_of(name: str) -> Path:
    module = ROOT.joinpath(*name.split("."))
    return module / "__init__.py" if module.is_dir() else module.with_suffix(".py")


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(path_of(name).read_text("utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                inside = inner.startswith("clsa.") and inner.removeprefix("clsa.") in ORDER
                yield inner if inside else str(node.module)


def test_every_file_has_its_place() -> None:
    found = {str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.rglob("*.py")}
    names = {name.replace("/", ".").removesuffix(".__init__") for name in found}
    assert names - {"__init__"} == set(ORDER) and len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_files_above_it(name: str) -> None:
    own = {module for module in imports(tree_of(name)) if module.split(".")[0] == "clsa"}
    above = {f"clsa.{other}" for other in ORDER[: ORDER.index(name)]} | {"clsa"}
    assert own <= above, own - above


def test_the_package_itself_imports_nothing_when_imported() -> None:
    outer = [node for node in tree_of("").body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert set(imports(ast.Module(outer, []))) == {"pathlib", "typing"}


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
        assert not function.startswith("subprocess.") or name == "slurm", function  # scontrol
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

    from clsa import config

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
import clsa.train, clsa.evaluate.run
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "imported\n", done.stderr
