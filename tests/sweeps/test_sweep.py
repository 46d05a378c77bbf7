"""Sweeps of tiny runs: which runs are repeated, failures, interruptions, refusals."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clsa.options.commands import SweepOptions
from clsa.recipes import resolve
from clsa.runs.checkpoint import run_digest
from clsa.sweeps import sweep as module
from clsa.sweeps.sweep import sweep
from clsa.system.errors import ClsaError, Exit
from clsa.training import fit
from clsa.training.start import pretrain
from tests.support.pictures import clipart_folder
from tests.support.refusals import refusal

TINY: dict[str, Any] = {
    "recipe": "clsa-small",
    "batch_size": 16,
    "epochs": 1,
    "probe_every": 0,
    "device": "cpu",
    "views": {"size": 16, "weak": {"sizes": [16]}},
    "strong.sizes": [16],
    "model": {"projector_hidden": 32, "projector_dim": 16, "norm_groups": 2},
    "method.queue_size": 20,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 drawings in two class folders: two steps of 16 an epoch."""
    return clipart_folder(tmp_path_factory.mktemp("pictures"), classes=2, each=20)


Start = Callable[..., Path]


@pytest.fixture
def start(pictures: Path, tmp_path: Path) -> Start:
    """A function that starts the same one-axis sweep in the folder `tmp_path / "out"`."""

    def run(rounds: tuple[int, ...] = (3, 5), base: Any = None, **asked: Any) -> Path:
        data = {"data": str(pictures), "workers": 0}
        text = {
            "name": "tiny",
            "protocol": ["knn-20"],
            "base": {**TINY, "data": data, **(base or {})},
            "grid": {"strong.rounds": list(rounds)},
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(text))
        given = {"sweep": str(tmp_path / "tiny.yaml"), "out": tmp_path / "out", **asked}
        return sweep(SweepOptions(**given))

    return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that are trained (+) and judged (?), in order, by name."""
    seen: list[str] = []

    def spied(name: str, sign: str, folder: Callable[[Any], Path]) -> None:
        whole = getattr(module, name)

        def spy(options: Any) -> Any:
            seen.append(sign + folder(options).name.removeprefix("strong.rounds-"))
            return whole(options)

        monkeypatch.setattr(module, name, spy)

    spied("pretrain", "+", lambda options: options.out)
    spied("evaluate", "?", lambda options: options.run)
    return seen


def table(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "table.json").read_text())["runs"]


def test_a_sweep_runs_each_cell_once_and_resumes(
    start: Start, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = start()
    assert calls == ["+3_seed-0", "?3_seed-0", "+5_seed-0", "?5_seed-0"]
    told, progress = capsys.readouterr()
    assert "strong.rounds" in told and str(out / "table.md") in told
    assert "[2/2] strong.rounds=5 seed=0\n" in progress
    runs = table(out)
    assert [run["reason"] for run in runs] == ["finished", "finished"]
    assert [(run["step"], run["pictures_seen"], run["epoch"]) for run in runs] == [(2, 32, 1.0)] * 2
    assert all(run["ms_per_picture"] > 0 for run in runs)
    judged = json.loads((out / "strong.rounds-3_seed-0" / "results.json").read_text())
    assert runs[0]["records"] == judged

    # the same command: nothing is run; the table stays as it is
    calls.clear()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    start()
    assert calls == [] and "already done" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

    # one more seed and one more protocol: only the new runs are trained
    more: dict[str, Any] = {"seeds": (0, 1), "protocol": ("knn-20", "knn-strong")}
    weights = (out / "strong.rounds-3_seed-0" / "encoder.safetensors").read_bytes()
    start(**more)
    assert calls[:2] == ["+3_seed-0", "?3_seed-0"] and calls[4:6] == ["+3_seed-1", "?3_seed-1"]
    assert (out / "strong.rounds-3_seed-0" / "encoder.safetensors").read_bytes() == weights
    titles = "| strong.rounds | knn-20 | knn-20 gain | knn-strong | knn-strong gain | seeds |"
    assert titles in (out / "table.md").read_text()

    # an encoder other than the judged one is trained and judged again
    calls.clear()
    (out / "strong.rounds-3_seed-1" / "encoder.safetensors").write_bytes(weights)
    start(**more)
    assert calls == ["+3_seed-1", "?3_seed-1"]


def test_runs_of_a_sweep_equal_clsa_pretrain_to_the_bit(
    start: Start, pictures: Path, tmp_path: Path
) -> None:
    out = start((5,))
    values = {
        **{key: value for key, value in TINY.items() if "." not in key},
        "data": {"data": str(pictures), "workers": 0},
        "strong": {"sizes": [16], "rounds": 5},
        "method": {"queue_size": 20},
        "out": str(tmp_path / "alone"),
    }
    alone = pretrain(resolve(values))
    assert run_digest(out / "strong.rounds-5_seed-0") == run_digest(alone)


def test_a_run_that_fails_does_not_stop_the_others(
    start: Start,
    calls: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = module.pretrain
    errors = {
        3: ClsaError("step 1", "not finite | odd", "lower it", Exit.UNHEALTHY),
        7: ValueError("a bug\nin two lines"),
    }

    def failing(options: Any) -> Path:
        if options.strong.rounds in errors:
            raise errors[options.strong.rounds]
        return whole(options)

    monkeypatch.setattr(module, "pretrain", failing)
    text, code = refusal(lambda: start((3, 5, 7)))
    assert code == Exit.UNHEALTHY and text.startswith(
        "2 of 3 runs failed - strong.rounds-3_seed-0: "
    )
    out = tmp_path / "out"
    assert [run["code"] for run in table(out)] == [76, 0, 1]
    page = (out / "table.md").read_text()
    assert "seed 0 failed: step 1 - not finite \\| odd - lower it |" in page
    assert "seed 0 failed: a bug |" in page and "in two lines" in capsys.readouterr().err
    monkeypatch.setattr(module, "pretrain", whole)
    calls.clear()
    start((3, 5, 7))  # only the failed runs are tried again
    assert [call for call in calls if call[0] == "?"] == ["?3_seed-0", "?7_seed-0"]
    assert "failed" not in (out / "table.md").read_text()


@pytest.mark.parametrize("where", ["second run", "last step", "judging"])
def test_an_interruption_saves_writes_the_table_and_is_resumed(
    where: str, start: Start, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, name = (module, "evaluate") if where == "judging" else (fit, "train_step")
    whole, count = getattr(home, name), 0

    def interrupting(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == {"second run": 3, "last step": 2, "judging": 1}[where]:
            signal.raise_signal(signal.SIGTERM)
        return whole(*args)

    monkeypatch.setattr(home, name, interrupting)
    text, code = refusal(lambda: start())
    out = tmp_path / "out"
    page = (out / "table.md").read_text()
    assert code == Exit.PREEMPTED and "SIGTERM" in text
    if where == "second run":
        assert text.startswith("stopped at step 1 of 2 - SIGTERM")
        assert "seed 0 stopped at step 1, epoch 0.5 of 1: interrupted |" in page
    else:
        assert text.startswith("stopped before [2/2] strong.rounds=5 seed=0 - SIGTERM")
        assert "seed 0 not run yet |" in page
    assert "| 3 | " in page and table(out)[0]["reason"] == "finished"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    calls.clear()
    start()
    assert (
        calls == ["+5_seed-0", "?5_seed-0"] and "interrupted" not in (out / "table.md").read_text()
    )


def test_a_full_disk_ends_the_sweep(
    start: Start, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(options: Any) -> None:
        raise ClsaError("cannot write x", "No space left on device", "free some space", Exit.IO)

    monkeypatch.setattr(module, "pretrain", full)
    assert refusal(lambda: start())[1] == Exit.IO
    assert [run["code"] for run in table(tmp_path / "out")] == [Exit.IO, 0]


def test_a_run_stopped_by_max_minutes_is_judged_marked_and_not_continued(
    start: Start, calls: list[str]
) -> None:
    base = {"epochs": 3}
    out = start((3,), base, max_minutes=1e-6)
    assert table(out)[0]["reason"] == "max_minutes" and table(out)[0]["step"] == 1
    assert (
        "seed 0 stopped at step 1, epoch 0.5 of 3: max\\_minutes" in (out / "table.md").read_text()
    )
    calls.clear()
    start((3,), base, max_minutes=1e-6)
    assert calls == []
    start((3,), base)  # without the limit it continues
    assert calls == ["+3_seed-0", "?3_seed-0"]
    assert table(out)[0]["step"] == 6 and "minutes" not in (out / "table.md").read_text()
    assert {x["encoder_digest"] for x in table(out)[0]["records"]} < {
        x["encoder_digest"]
        for x in json.loads((out / "strong.rounds-3_seed-0" / "results.json").read_text())
    }  # records of the stopped encoder no longer count


# ---- refused before anything is run or written


def test_a_dry_run_writes_nothing(
    start: Start, calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(seeds=(0, 1), dry_run=True)
    assert capsys.readouterr().out.splitlines() == [
        "[1/4] strong.rounds=3 seed=0", "[2/4] strong.rounds=5 seed=0",
        "[3/4] strong.rounds=3 seed=1", "[4/4] strong.rounds=5 seed=1",
        f"4 runs in {tmp_path / 'out'}; nothing was run or written",
    ]  # fmt: skip
    assert calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "words", "code"),
    [
        ({"strong": {"round": 3}}, "did you mean strong.rounds?", Exit.USAGE),
        ({"data": {"data": "nowhere"}}, "no such folder, file or data set", Exit.NO_INPUT),
        ({"data": {"data": ""}}, "no pictures given", Exit.USAGE),
    ],
)
def test_a_bad_cell_is_refused_first(
    base: Any, words: str, code: Exit, start: Start, calls: list[str], tmp_path: Path
) -> None:
    text, found = refusal(lambda: start(base=base))
    assert words in text and found == code and calls == [] and not (tmp_path / "out").exists()


def test_pictures_that_cannot_judge_are_refused_first(
    start: Start, calls: list[str], pictures: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(pictures.rglob("*.webp"))):
        shutil.copyfile(path, flat / f"{number}.webp")
    text, _ = refusal(lambda: start(data=str(flat)))
    assert "label" in text and calls == [] and not (tmp_path / "out").exists()


def test_folders_of_something_else_are_refused(
    start: Start, calls: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    text, code = refusal(lambda: start())
    assert "neither empty nor a sweep's folder" in text and code == Exit.USAGE
    (out / "letter.txt").unlink()
    start((3,))
    calls.clear()
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "holds another sweep" in refusal(lambda: start((7,)))[0]
    assert "holds another sweep" in refusal(lambda: start((3,), {"epochs": 2}))[0]
    (out / "sweep.yaml").unlink()
    assert "neither empty nor a sweep's folder" in refusal(lambda: start((3,)))[0]
    (out / "sweep.yaml").write_text("seeds: x")
    assert "sweep.yaml: seeds" in refusal(lambda: start((3,)))[0]
    files.pop(out / "sweep.yaml")
    assert calls == [] and all(
        path.stat().st_mtime_ns == t for path, t in files.items() if path != out
    )
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    assert refusal(lambda: start(out=blocked))[1] == Exit.CANNOT_WRITE


def test_under_torchrun_it_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refusal(lambda: start())[0]
