"""A run keeps a bad step; `replay` computes it again from the same state, pictures and draws."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clsa.cli.main import main
from clsa.options.commands import ReplayOptions
from clsa.options.run import RunOptions
from clsa.recipes import resolve
from clsa.runs import checkpoint, digests
from clsa.runs.saver import BUNDLES
from clsa.training import fit, stages, step
from clsa.training.replay import Replay, describe, replay
from clsa.training.start import pretrain
from tests.support.pictures import clipart_folder

BAD = 3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clipart_folder(tmp_path_factory.mktemp("set"), classes=2, each=22)


def options(pictures: Path, out: Path, **over: Any) -> RunOptions:
    values: dict[str, Any] = {
        "recipe": "moco-v2-small",
        "data": {"data": str(pictures), "workers": 0},
        "out": str(out),
        "batch_size": 8,
        "epochs": 2,
        "probe_every": 0,
        "device": "cpu",
        "views": {"size": 16, "weak": {"sizes": (16,)}},
        "model": {"projector_hidden": 32, "projector_dim": 16, "norm_groups": 2},
        "method": {"queue_size": 20},
    }
    return resolve({**values, **over})


def overflow(monkeypatch: pytest.MonkeyPatch, steps: range, back: bool = True) -> None:
    """Make the first weights too large in some steps; with `back`, restore them afterwards."""
    step_of = step.train_step

    def broken(model: Any, state: Any, crops: Any, run: Any) -> Any:
        weight = next(state.method.network.parameters())
        before, is_bad = weight.detach().clone(), state.step in steps
        if is_bad:
            weight.data.mul_(3e38)
        stats = step_of(model, state, crops, run)
        if is_bad and back:
            weight.data.copy_(before)
        return stats

    monkeypatch.setattr(fit, "train_step", broken)


@pytest.fixture
def run(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that overflowed at one step; its bundle holds the weights that overflowed."""
    overflow(monkeypatch, range(BAD, BAD + 1), back=False)
    out = pretrain(options(pictures, tmp_path / "run", max_steps=BAD + 2))
    monkeypatch.undo()
    return out


def test_a_bad_step_is_found_again_with_what_overflows(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = run / "bad" / f"step-{BAD:06d}.ckpt"
    shown = replay(ReplayOptions(bundle=bundle))
    assert shown.is_bad and shown.step == BAD and shown.worlds == (1, 1)
    assert not shown.weights and not shown.views
    assert shown.outputs[0].startswith("network.encoder.")
    assert shown.reason.startswith("non-finite loss (nan)") and shown.gradients[0] in shown.reason
    assert main(["replay", str(bundle)]) == 0
    said = capsys.readouterr().out
    assert f"step {BAD} was skipped: non-finite loss (nan)" in said
    assert "the replay is not finite again: contrast nan" in said
    assert "The network overflows" in said
    assert "process" not in said


def test_what_is_kept_is_the_state_before_the_step(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It equals the state of a run that ends there, except for the weights this test broke."""
    saved, facts = checkpoint.load_one(run / "bad" / f"step-{BAD:06d}.ckpt")
    assert saved["bad"]["world"] == 1
    whole = pretrain(options(pictures, tmp_path / "whole", max_steps=BAD))
    before, _ = checkpoint.load_one(whole / "checkpoints" / f"step-{BAD:06d}.ckpt")
    assert saved["step"] == facts["step"] == BAD
    differing = [
        name
        for name, value in before["method"].items()
        if not torch.equal(value, saved["method"][name])
    ]
    assert len(differing) == 1 and differing[0].startswith("network.encoder.")
    ends = [digests.digest(each["optimizer"]) for each in (before, saved)]
    assert ends[0] == ends[1]


def test_a_broken_picture_is_named(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_views = step.make_views
    shown: list[int] = []

    def views(crops: Any, specs: Any, step: int, run: Any) -> Any:
        batch = make_views(crops, specs, step, run)
        if step == BAD:
            batch.views[1][5, 0, 0, 0] = torch.inf
            shown.append(int(crops.index[5]))
        return batch

    monkeypatch.setattr(step, "make_views", views)
    monkeypatch.setattr("clsa.training.replay.make_views", views)
    out = pretrain(options(pictures, tmp_path / "run", max_steps=BAD + 1))
    found = replay(ReplayOptions(bundle=out / "bad" / f"step-{BAD:06d}.ckpt"))
    names = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.*"))
    assert shown[0] == shown[1] and found.views == [("weak0", names[shown[0]])]


def test_a_step_that_is_good_in_the_replay_is_reported_as_good(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    agree = step.agree
    seen: list[int] = []

    def cosmic(*args: Any) -> Any:
        seen.append(0)
        found = agree(*args)
        return found._replace(is_bad=True) if len(seen) == BAD + 1 else found

    monkeypatch.setattr(step, "agree", cosmic)
    out = pretrain(options(pictures, tmp_path / "run", max_steps=BAD + 1))
    assert main(["replay", str(out / "bad" / f"step-{BAD:06d}.ckpt")]) == 0
    said = capsys.readouterr().out
    assert "the replay is finite" in said and "not in the state" in said


def test_pictures_that_moved_are_given_and_others_are_refused(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    bundle = str(run / "bad" / f"step-{BAD:06d}.ckpt")
    assert main(["replay", bundle, "--data", str(moved)]) == 0
    next(moved.rglob("*.*")).unlink()
    capsys.readouterr()
    assert main(["replay", bundle, "--data", str(moved)]) == 2
    assert "not those of the run - give their path with --data" in capsys.readouterr().err


def test_a_file_that_is_no_bundle_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = sorted((run / "checkpoints").glob("*.ckpt"))
    assert main(["replay", str(checkpoints[-1])]) == 66
    assert "not the saved state of a bad step" in capsys.readouterr().err
    assert main(["replay", str(run / "bad" / "step-000099.ckpt")]) == 66
    damaged = run / "bad" / f"step-{BAD:06d}.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["replay", str(damaged)]) == 66
    assert "sha256 mismatch" in capsys.readouterr().err


def test_a_run_keeps_the_first_of_each_row_and_no_more_than_three(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_of = fit.train_step
    overflow(monkeypatch, range(2, 10, 2))
    every_other = fit.train_step
    assert every_other is not step_of
    out = pretrain(options(pictures, tmp_path / "run"))
    kept = sorted(path.stem for path in (out / "bad").glob("*.ckpt"))
    assert kept == ["step-000002", "step-000004", "step-000006"] and len(kept) == BUNDLES
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [3, 5, 7, 9]


def test_a_full_disk_costs_the_bundle_not_the_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    overflow(monkeypatch, range(BAD, BAD + 1))
    save = checkpoint.save

    def full(folder: Path, *args: Any) -> Path:
        if folder.name == "bad":
            raise checkpoint.ClsaError(str(folder), "No space left on device", "make room")
        return save(folder, *args)

    monkeypatch.setattr(checkpoint, "save", full)
    out = pretrain(options(pictures, tmp_path / "run", max_steps=BAD + 2))
    assert "step 3 cannot be replayed later" in capsys.readouterr().err
    assert checkpoint.load_newest(out / "checkpoints") is not None


def test_a_new_run_in_the_same_folder_removes_old_bundles(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(monkeypatch, range(100))
    for lr in (0.06, 0.03):
        with pytest.raises(
            checkpoint.ClsaError, match=r"5 bad steps .* `clsa replay .*step-000000"
        ):
            pretrain(options(pictures, tmp_path / "run", optim={"lr": lr}))
        saved, _ = checkpoint.load_one(tmp_path / "run" / "bad" / "step-000000.ckpt")
        assert f"lr: {lr}\n" in saved["bad"]["options"]


def test_a_run_in_stages_keeps_no_bundle_and_does_not_mention_it(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    overflow(monkeypatch, range(1, 2))
    run = options(pictures, tmp_path / "run", stages=("classes:2",), epochs=1,
                  continual={"keep": "nothing"})  # fmt: skip
    stages.pretrain(run)
    assert "was skipped" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("bad/*"))


def test_what_only_another_process_found_decides_the_verdict() -> None:
    facts: dict[str, Any] = {
        "step": 4, "reason": "x", "worlds": (2, 2), "others": [], "losses": {"contrast": math.nan},
        "norm": math.nan, "weights": [], "outputs": ["a.b"], "gradients": ["c"],
        "anywhere": (True, False, True, True),
    }  # fmt: skip
    first = describe(Replay(**facts, rank=0, views=[]))
    other = describe(Replay(**facts, rank=1, views=[("weak0", "cat.png")]))
    assert first.endswith("A view is not finite: look at these pictures, and report it.")
    assert "process 1:   not finite: views: weak0 of cat.png" in other
    assert "was skipped" in first and "was skipped" not in other
    assert "torchrun" not in first
    good = {**facts, "others": ["precision"], "anywhere": (False,) * 4}
    assert describe(Replay(**good, rank=0, views=[])).endswith(
        "may be what differs here: precision."
    )
    alone = describe(Replay(**{**facts, "worlds": (2, 1)}, rank=0, views=[]))
    assert alone.endswith("The run had 2 processes: torchrun with as many repeats its sums.")


@pytest.mark.parametrize(
    ("anywhere", "words"),
    [
        ((False, False, False, False), "is not in the state"),
        ((True, True, True, True), "weights were bad"),
        ((True, False, False, True), "network overflows"),
        ((True, False, False, False), "All outputs are finite"),
    ],
)
def test_the_verdict_follows_the_first_that_is_broken(
    anywhere: tuple[bool, ...], words: str
) -> None:
    shown = Replay(4, "x", (1, 1), [], 0, {}, 1.0, [], [], [], [], anywhere)
    assert words in describe(shown).splitlines()[-1]
