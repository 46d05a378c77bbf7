"""The command line: its help, its errors, and that bad input writes and loses nothing."""

import ast
import inspect
import itertools
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

import clsa
from clsa.cli.main import COMMANDS, main
from clsa.options import commands, run
from clsa.options.config import Config
from clsa.options.methods import KINDS as METHODS
from clsa.pictures.named_sets import CLIPART
from clsa.recipes import RECIPES, resolve
from clsa.runs import checkpoint, digests
from clsa.system.errors import Exit

TINY = [
    "--recipe", "clsa-small", "--batch-size", "8", "--max-steps", "2",
    "--model.encoder", "resnet10-w32", "--views.size", "16", "--views.weak.sizes", "16",
    "--strong.sizes", "16", "--method.queue-size", "32", "--probe-every", "0",
    "--model.norm-groups", "2",
    "--workers", "0", "--device", "cpu",
]  # fmt: skip
TINY_PYTHON: dict[str, Any] = {
    "recipe": "clsa-small",
    "batch_size": 8,
    "max_steps": 2,
    "views": {"size": 16, "weak": {"sizes": [16]}},
    "strong": {"sizes": [16]},
    "model": {"encoder": "resnet10-w32", "norm_groups": 2},
    "method": {"queue_size": 32},
    "probe_every": 0,
    "workers": 0,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 of the embedded drawings, in one folder per class."""
    folder = tmp_path_factory.mktemp("drawings")
    with tarfile.open(CLIPART) as tar:
        members = [member for member in tar if member.name.startswith("train/")]
        for member in members[:: len(members) // 40][:40]:
            path = folder / member.name.removeprefix("train/")
            path.parent.mkdir(exist_ok=True)
            file = tar.extractfile(member)
            assert file
            path.write_bytes(file.read())
    return folder


@pytest.fixture(scope="session")
def finished(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps; tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["pretrain", "--data", str(drawings), "--out", str(out), *TINY]) == 0
    return out


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command and returns its exit code, stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:  # tyro exits after --help and after an error in a box
            assert isinstance(stop.code, int)
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below `folder`, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refusal(result: tuple[int, str, str]) -> tuple[int, str]:
    """Exit code and text of the error, one line of the form WHAT - WHY - WHAT TO DO.

    Lines about the pictures that were taken may stand above it.
    """
    code, out, err = result
    err = re.sub(r"\A(?:(?:training |val )?pictures: .+\n)+", "", err)
    assert out == "" and "Traceback" not in err
    assert re.fullmatch(r"error: .+ - .+ - .+\n", err), err
    return code, err[7:-1]


# ---- help


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from clsa.cli.main import main
for args in (["--help"], ["recipes"], ["--version"], ["pretrain", "--recipe", "nope"]):
    main(args)
for command in ("pretrain", "evaluate", "embed", "pack", "demo", "sweep", "digest", "recipes"):
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert not stop.code
assert not {"torch", "timm", "PIL", "pyarrow"} & set(sys.modules)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("done\n"), done.stderr
    for words in ("clsa pretrain --data MY/PICTURES", "--optim.lr FLOAT", "moco-v2-small"):
        assert words in done.stdout


def test_overview_names_every_command(command: Command) -> None:
    for args, code in (((), 2), (("--help",), 0), (("-h",), 0)):
        got, out, err = command(*args)
        assert got == code and err == "" and all(f"\n  {name} " in out for name in COMMANDS)
        assert "clsa --version" in out and "--debug" in out and "clsa help COMMAND" in out
    assert command("--version") == (0, f"{clsa.__version__}\n", "")
    assert command("help") == command("--help") and command("help", "pack") == command(
        "pack", "--help"
    )


KINDS: dict[str, type[Config]] = {
    "pretrain": run.RunOptions,
    "extend": commands.ExtendOptions,
    "evaluate": commands.EvaluateOptions,
    "predict": commands.PredictOptions,
    "diagnose": commands.DiagnoseOptions,
    "embed": commands.EmbedOptions,
    "scenes": commands.ScenesOptions,
    "export": commands.ExportOptions,
    "pack": commands.PackOptions,
    "sweep": commands.SweepOptions,
    "demo": commands.DemoOptions,
}


def explained(kind: type[Config]) -> Iterator[tuple[str, str]]:
    """Every option of `kind` and of its groups, with its docstring in the source."""
    words: dict[str, str] = {}
    for base in [*kind.__bases__, kind]:
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        words |= {
            ast.unparse(field.target): ast.literal_eval(below.value)
            for field, below in itertools.pairwise(tree.body)
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
        }
    for name, field in kind.model_fields.items():
        if isinstance(field.default, Config):
            yield from explained(type(field.default))
        else:
            yield name, words.get(name, "")


@pytest.mark.parametrize("name", KINDS)
def test_every_option_is_explained(
    name: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = command(name, "--help")
    shown = "".join(out.replace("│", "").split())
    for option, words in explained(KINDS[name]):
        flag = {"run": "PATH", "sweep": "STR", "images": "STR"}.get(
            option, option.replace("_", "-")
        )
        assert words and "".join(words.split()) in shown and flag in shown, option
    assert code == 0 and (COMMANDS[name].__doc__ or "?") in out


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_is_explained_with_its_recipes(
    name: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    recipe = "moco-v2-small" if name == "moco" else f"{name}-small"
    code, out, _ = command("pretrain", "--recipe", recipe, "--help")
    shown = "".join(out.replace("│", "").split())
    assert code == 0
    for option, words in explained(METHODS[name]):
        flag = f"--method.{option.replace('_', '-')}"
        assert words and "".join(words.split()) in shown and flag in shown, option
    flags = set(re.findall(r"--method\.([a-z-]+)", out))
    plain = {flag for flag in flags if not flag.startswith("no-")}
    assert plain == {option.replace("_", "-") for option in METHODS[name].model_fields}


def test_recipes_lists_every_recipe_with_its_words(command: Command) -> None:
    code, out, err = command("recipes")
    first = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
    assert code == 0 and err == "" and first == list(RECIPES)
    for name in ("clsa-paper", "clsa-paper-small"):
        at = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert at.removeprefix(name).strip() == RECIPES[name].text


def test_a_recipe_shows_what_it_sets(command: Command) -> None:
    code, out, err = command("recipes", "clsa-paper-small")
    assert code == 0 and err == "" and out.startswith("clsa-paper-small ")
    shown = yaml.safe_load(out.partition("\n\n")[2])
    again = resolve({**shown, "recipe": "moco-v2-small"})
    wanted = resolve({"recipe": "clsa-paper-small"})
    assert again.model_copy(update={"recipe": "clsa-paper-small"}) == wanted
    code, text = refusal(command("recipes", "clsa-papr"))
    assert code == Exit.USAGE and "did you mean clsa-paper?" in text


# ---- bad input: one line, the right code, nothing written


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "no such folder, file or data set"), ("clipert", "did you mean clipart?")],
)
def test_missing_pictures(name: str, words: str, command: Command, tmp_path: Path) -> None:
    result = command("pretrain", "--data", name, "--out", tmp_path / "run", *TINY)
    code, text = refusal(result)
    assert code == Exit.NO_INPUT and text.startswith(f"{name} - ") and words in text
    assert contents(tmp_path) == {} and not (tmp_path / "run").exists()


def test_no_pictures_named(command: Command, tmp_path: Path) -> None:
    code, text = refusal(command("pretrain", "--out", tmp_path / "run", *TINY))
    assert code == Exit.USAGE and "no pictures given" in text and not (tmp_path / "run").exists()


def test_empty_folder(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "run"
    code, text = refusal(command("pretrain", "--data", tmp_path / "empty", "--out", out, *TINY))
    assert code == Exit.NO_INPUT and "holds no pictures" in text and not out.exists()


def test_texts_named_jpg(command: Command, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(12):
        (tmp_path / "in" / f"{number}.jpg").write_text("no picture")
    out = tmp_path / "run"
    code, text = refusal(
        command(
            "pretrain", "--data", tmp_path / "in", "--out", out, *TINY, "--method.queue-size", "8"
        )
    )
    assert code == Exit.BAD_DATA and "unreadable pictures among 12" in text
    assert "0.jpg (not-an-image)" in text
    status = json.loads((out / "status.json").read_text())
    assert status["code"] == Exit.BAD_DATA and status["step"] == 0
    assert not (out / "encoder.safetensors").exists()


def test_a_few_bad_pictures_are_replaced_and_named(
    drawings: Path, command: Command, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "run"
    shutil.copytree(drawings, folder)
    cut = sorted(folder.rglob("*.webp"))[7]
    cut.write_bytes(cut.read_bytes()[:200])
    (folder / "text.jpg").write_text("no picture")
    options = [*TINY, "--max-steps", "5"]
    code, printed, err = command("pretrain", "--data", folder, "--out", out, *options)
    assert code == 0 and "clsa evaluate" in printed
    assert "2 unreadable pictures were replaced: see quarantine.jsonl" in err
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {line["path"]: line["reason"] for line in lines} == {
        str(cut.relative_to(folder)): "truncated",
        "text.jpg": "not-an-image",
    }


def test_batch_larger_than_the_set(drawings: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = command("pretrain", "--data", drawings, "--out", out, *TINY, "--batch-size", 41)
    code, text = refusal(result)
    assert code == Exit.USAGE and text.startswith("batch_size 41 - larger than the set of 40")
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "difference"),
    [
        (("--optim.lr", 0.5), "optim.lr: 0.06 -> 0.5"),
        (("--seed", 1), "seed: 0 -> 1"),
        (("--strong.rounds", 3), "strong.rounds: 5 -> 3"),
    ],
)
def test_folder_of_another_run(
    option: tuple[object, ...], difference: str, drawings: Path, finished: Path, command: Command
) -> None:
    before = contents(finished)
    result = command("pretrain", "--data", drawings, "--out", finished, *TINY, *option)
    code, text = refusal(result)
    assert code == Exit.USAGE and f"holds another run ({difference})" in text
    assert contents(finished) == before


def test_folder_of_a_run_on_other_pictures(
    drawings: Path, finished: Path, command: Command, tmp_path: Path
) -> None:
    """One picture fewer at the same path: the run is refused and stays unchanged."""
    folder, out = tmp_path / "in", tmp_path / "run"
    shutil.copytree(drawings, folder)
    assert command("pretrain", "--data", folder, "--out", out, *TINY)[0] == 0
    kept = contents(out / "checkpoints")
    next(folder.rglob("*.webp")).unlink()
    code, text = refusal(command("pretrain", "--data", folder, "--out", out, *TINY))
    assert code == Exit.USAGE and "data changed: " in text
    assert contents(out / "checkpoints") == kept


def test_folder_that_is_something_else(drawings: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    code, text = refusal(command("pretrain", "--data", drawings, "--out", tmp_path, *TINY))
    assert code == Exit.USAGE and "neither empty nor a run's folder" in text
    assert contents(tmp_path) == {"letter.txt": b"dear"}


@pytest.mark.parametrize("name", ["file", "file/run", "x" * 300])
def test_output_that_cannot_be_a_folder(
    name: str, drawings: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    result = command("pretrain", "--data", drawings, "--out", tmp_path / name, *TINY)
    code, text = refusal(result)
    assert code == Exit.CANNOT_WRITE and "choose another --out" in text
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--device", "cuda:99"), "device cuda:99 - this machine has"),
        (("--device", "toaster"), "device toaster - no such device"),
        (("--model.encoder", "resnet5o"), "did you mean resnet50?"),
        (("--model.encoder", "vit_tiny_patch16_224", "--model.small-stem"), "is not a ResNet"),
        (("--recipe", "clsa-smal"), "recipe clsa-smal - no such recipe - did you mean clsa-small?"),
        (
            ("--method.name", "swav"),
            "method.name swav - clsa-small is a recipe for moco - choose "
            "another --recipe, perhaps swav-small",
        ),
    ],
)
def test_options_that_this_machine_or_package_lacks(
    option: tuple[str, ...], words: str, drawings: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, text = refusal(command("pretrain", "--data", drawings, "--out", out, *TINY, *option))
    assert code == Exit.USAGE and words in text and not out.exists()


def test_device_cuda_without_a_gpu(
    drawings: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "run"
    result = command("pretrain", "--data", drawings, "--out", out, *TINY, "--device", "cuda")
    code, text = refusal(result)
    assert code == Exit.USAGE and text.startswith("device cuda - this machine has")
    assert not out.exists()


def test_unknown_commands_are_refused_with_the_nearest(command: Command) -> None:
    code, text = refusal(command("pretrian"))
    assert (
        code == Exit.USAGE and text == "command pretrian - no such command - did you mean pretrain?"
    )
    assert "use one of demo, pretrain" in refusal(command("xyzzy"))[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("pretrain", "--optim.lrr", "1"), "--optim.lr FLOAT"),
        (("pretrain", "--epoch", "1"), "--epochs INT"),
        (("pretrain", "--optim.lr", "fast"), "--optim.lr"),
        (("pretrain", "--optim.lr", "nan"), "finite number"),
        (("pretrain", "--optim.lr", "-1"), "greater than 0"),
        (("pretrain", "--views.strong.sizes", "32"), "--strong.sizes"),
        (("pretrain", "--strong.sizes"), "--stronger needs strong views"),
        (("pretrain", "--recipe", "swav-small", "--method.epsilom", "1"), "--method.epsilon FLOAT"),
        (("pretrain", "--recipe", "swav-small", "--method.epsilon", "-1"), "greater than 0"),
        (("pretrain", "--method.epsilon", "1"), "Unrecognized options"),
        (("digest",), "Run folder"),
        (("recipes", "x", "y"), "Unrecognized"),
        (("sweep",), "YAML file of a grid"),
        (("evaluate", "run", "--protocol", "knn-2"), "knn-20"),
    ],
)
def test_wrong_options_are_shown_in_a_box(
    args: tuple[str, ...], words: str, command: Command
) -> None:
    code, _, err = command(*args)
    assert code == Exit.USAGE and words in err and "Traceback" not in err


def test_config_with_a_typo(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  lrr: 1\n")
    code, text = refusal(command("pretrain", "--config", file, "--out", tmp_path / "run"))
    assert code == Exit.USAGE
    assert text == f"{file}: optim.lrr - no such setting - did you mean optim.lr?"
    code, text = refusal(command("pretrain", "--config", tmp_path / "none.yaml"))
    assert code == Exit.NO_INPUT and "No such file" in text


@pytest.mark.parametrize("name", ["evaluate", "embed", "digest"])
def test_a_folder_without_a_run(name: str, command: Command, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        code, text = refusal(command(name, path))
        assert code == Exit.NO_INPUT and str(path) in text
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["evaluate", "embed"])
def test_a_file_of_another_program(name: str, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, file)
    code, text = refusal(command(name, file, "--data", "clipart"))
    assert code == Exit.UNTRUSTED and "not an encoder of clsa" in text
    assert list(contents(tmp_path)) == ["other.safetensors"]


def test_evaluation_without_labels(finished: Path, command: Command, tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (20, 20), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    before = contents(finished)
    result = command("evaluate", finished, "--data", tmp_path, "--device", "cpu")
    code, text = refusal(result)
    assert code == Exit.BAD_DATA and "0 of 10 training pictures have labels" in text
    assert contents(finished) == before


def test_control_characters_in_names_stay_on_one_line(command: Command) -> None:
    code, text = refusal(command("evaluate", "a\nb\x1b[31mc"))
    assert code == Exit.NO_INPUT and text.startswith("a\\nb\\x1b[31mc - ")


def test_debug_shows_the_traceback(command: Command) -> None:
    for args in (("--debug", "evaluate", "nowhere"), ("evaluate", "nowhere", "--debug")):
        code, _, err = command(*args)
        assert code == Exit.NO_INPUT and err.startswith("Traceback") and "ClsaError" in err
        assert err.splitlines()[-1].startswith("error: nowhere - ")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(COMMANDS, "digest", broken)
    with pytest.raises(ZeroDivisionError):
        main(["digest", "x"])


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    def interrupted(args: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "digest", interrupted)
    assert refusal(command("digest", "x"))[0] == Exit.PREEMPTED


def test_a_reader_that_leaves_early_is_no_error() -> None:
    shell = f"{sys.executable} -m clsa recipes | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("moco-v1 ")


# ---- good input


def test_the_printed_next_steps_work(
    drawings: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("pretrain", "--data", drawings, "--out", "my run", *TINY)
    assert code == 0
    for line in (
        "  clsa evaluate 'my run' ",
        "  clsa embed 'my run' ",
        "  tensorboard --logdir 'my run/",
    ):
        assert f"\n{line}" in out
    script = re.search(r'python -c "(.*)"', out)
    assert script
    names: dict[str, Any] = {}
    exec(script[1], names)
    assert names["encoder"](torch.zeros(1, 3, 16, 16)).shape == (1, 256)
    for name in re.findall(r"\w+\.(?:png|jsonl|yaml)", out):
        assert (tmp_path / "my run" / name).is_file()


def test_digest_is_one_sha256_of_the_newest_checkpoint(finished: Path, command: Command) -> None:
    code, out, err = command("digest", finished)
    assert code == 0 and err == "" and re.fullmatch(r"[0-9a-f]{64}\n", out)
    saved = checkpoint.load_newest(finished / "checkpoints")
    assert saved
    state = {key: saved.state[key] for key in ("method", "optimizer", "step")}
    assert out.strip() == digests.digest(state)


def test_python_and_the_command_line_do_the_same(
    drawings: Path, finished: Path, tmp_path: Path
) -> None:
    out = clsa.pretrain(drawings, tmp_path / "run", **TINY_PYTHON)
    assert out == tmp_path / "run"
    assert checkpoint.run_digest(out) == checkpoint.run_digest(finished)
    a, b = (clsa.load_encoder(run).state_dict() for run in (out, finished))
    assert digests.digest(a) == digests.digest(b)


def test_a_config_file_does_the_same(finished: Path, command: Command, tmp_path: Path) -> None:
    config, out = finished / "config.yaml", tmp_path / "run"
    assert command("pretrain", "--config", config, "--out", out)[0] == 0
    assert checkpoint.run_digest(out) == checkpoint.run_digest(finished)


def test_the_same_command_again_changes_no_weight(
    drawings: Path, finished: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert command("pretrain", "--data", drawings, "--out", out, *TINY)[0] == 0
    before, after = contents(finished), contents(out)
    for name in ("encoder.safetensors", "metrics.jsonl", "checkpoints/step-000002.ckpt"):
        assert before[name] == after[name]


def test_python_names_unknown_options_too(drawings: Path, tmp_path: Path) -> None:
    with pytest.raises(clsa.ClsaError, match=r"clsa.pretrain: batchsize - .* batch_size\?"):
        clsa.pretrain(drawings, tmp_path / "run", batchsize=8)
    with pytest.raises(clsa.ClsaError, match=r"lr - .* optim.lr\?") as caught:
        clsa.pretrain(drawings, tmp_path / "run", lr=0.1)
    assert caught.value.code == Exit.USAGE and not (tmp_path / "run").exists()
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        operator.attrgetter("pretrian")(clsa)
    assert all(getattr(clsa, name) is not None for name in clsa.__all__)


def test_packed_pictures_train_the_same_weights(
    drawings: Path, command: Command, tmp_path: Path
) -> None:
    (drawings / "zebra").mkdir()
    try:
        (drawings / "zebra" / "broken.png").write_bytes(b"")
        out = tmp_path / "my pack"
        code, printed, _ = command("pack", "--data", drawings, "--out", out, "--workers", "0")
        runs = [tmp_path / "plain", tmp_path / "packed"]
        for data, run in zip((drawings, out), runs, strict=True):
            assert command("pretrain", "--data", data, "--out", run, *TINY)[0] == 0
    finally:
        shutil.rmtree(drawings / "zebra")
    assert code == 0 and re.match(r"packed 40 pictures, \d\.\d MB in 1 shard\n", printed)
    assert "\nleft out as unreadable: 1 (see '" in printed
    assert f"\nNext: clsa pretrain --data '{out}' --out runs/packed\n" in printed
    plain, packed = (checkpoint.run_digest(run) for run in runs)
    assert plain == packed


def test_packing_again_says_so(drawings: Path, command: Command, tmp_path: Path) -> None:
    args = ("pack", "--data", drawings, "--out", tmp_path / "packed", "--workers", "0")
    assert command(*args)[1].startswith("packed 40 pictures")
    code, printed, err = command(*args)
    assert code == 0 and printed.startswith("packed already: 40 pictures")
    assert err.startswith("pictures: 40 pictures (webp 40), ") and err.count("\n") == 1
    code, text = refusal(command(*args, "--size", "32"))
    assert code == Exit.USAGE and "size: 320 -> 32" in text
    code, text = refusal(command("pack", "--out", tmp_path / "other"))
    assert code == Exit.USAGE and "no pictures given" in text
    shard = tmp_path / "packed" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, text = refusal(
        command("pretrain", "--data", tmp_path / "packed", "--out", tmp_path / "r")
    )
    assert code == Exit.BAD_DATA and "shard-000000.tar - damaged" in text
    assert not (tmp_path / "r").exists()


def test_demo_refuses_unknown_and_large_recipes(command: Command) -> None:
    assert "did you mean clsa-small?" in refusal(command("demo", "--recipe", "clsa-smal"))[1]
    assert "use clsa-multi-small" in refusal(command("demo", "--recipe", "clsa-multi"))[1]


def test_a_resolved_config_does_not_take_another_recipe(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(resolve({"recipe": "clsa-small"}).to_yaml())
    code, text = refusal(command("pretrain", "--config", file, "--recipe", "moco-v2-small"))
    assert code == Exit.USAGE and "was resolved from clsa-small" in text


def test_names_that_are_not_utf_8_go_through(
    drawings: Path, command: Command, tmp_path: Path
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.copytree(drawings, odd)
    code, _, err = command("pretrain", "--data", odd, "--out", tmp_path / "run", *TINY)
    assert code == 0, err
    assert command("evaluate", tmp_path / "run", "--protocol", "knn-20")[0] == 0


def test_unlabelled_pictures_are_judged_on_a_labelled_val(
    drawings: Path, command: Command, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in drawings.rglob("*.webp"):
        shutil.copy(path, flat)
    args = ["--data", flat, "--val", drawings, *TINY, "--probe-every", "1", "--epochs", "1"]
    args[args.index("--max-steps") + 1] = "5"
    code, _, err = command("pretrain", "--out", tmp_path / "run", *args)
    assert code == 0 and "20-NN" in err, err
    code, out, err = command("evaluate", tmp_path / "run", "--protocol", "knn-20")
    assert code == 0 and "val-holdout" in out, err


def test_an_extended_run_is_on_record_and_the_old_command_refused(
    drawings: Path, command: Command, tmp_path: Path
) -> None:
    out, original = (
        tmp_path / "run",
        ("pretrain", "--data", drawings, "--out", tmp_path / "run", *TINY),
    )
    assert command(*original, "--epochs", "1")[0] == 0
    code, printed, err = command("extend", out, "--epochs", "2", "--max-minutes", "5")
    assert code == 0 and "clsa evaluate" in printed
    assert "note: epochs 1 -> 2 at step 2: rates follow the longer schedule" in err
    assert json.loads((out / "history.jsonl").read_text()) == {"step": 2, "epochs": [1, 2]}
    assert json.loads((out / "status.json").read_text())["step"] == 10
    code, text = refusal(command(*original, "--epochs", "1"))
    assert code == Exit.USAGE and "holds another run (epochs: 2 -> 1)" in text
    assert command(*original, "--epochs", "2")[0] == 0
    code, text = refusal(command("extend", out, "--epochs", "1"))
    assert code == Exit.USAGE
    assert text.startswith(f"{out}: --epochs 1 - the run already has 2 epochs - ")
    code, text = refusal(command("extend", tmp_path / "nowhere", "--epochs", "1"))
    assert code == Exit.NO_INPUT and "config.yaml" in text


def test_changed_pictures_are_accepted_when_asked_for(
    drawings: Path, command: Command, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "run"
    shutil.copytree(drawings, folder)
    args = ("pretrain", "--data", folder, "--out", out, *TINY)
    assert command(*args)[0] == 0
    next(folder.rglob("*.webp")).unlink()
    code, text = refusal(command(*args))
    assert code == Exit.USAGE and "data changed: +0 -1 ~0 (digest " in text
    code, _, err = command(*args, "--accept-data-change")
    assert code == 0 and "continues with the weights of step-000002 at step 0, epoch 1" in err
    assert command(*args)[0] == 0
    staged = (*args, "--stages", "classes:2", "--out", tmp_path / "other", "--accept-data-change")
    assert "cannot be separated from" in refusal(command(*staged))[1]
