"""Resuming: changed pictures are counted, missing keys named, new machines noted; extending."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clsa.learning import models
from clsa.learning.neighbours import Neighbours
from clsa.learning.optim import build_optimizer
from clsa.methods import METHODS, build_method
from clsa.methods.method import Extent
from clsa.options.commands import ExtendOptions
from clsa.options.config import flatten
from clsa.options.run import RunOptions
from clsa.pictures import fingerprints
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Pictures, joined
from clsa.recipes import resolve
from clsa.runs import checkpoint, digests
from clsa.runs.computing import Computing
from clsa.runs.data_change import Given
from clsa.runs.folder import FREE, RunFolder
from clsa.runs.state import State
from clsa.system import environment
from clsa.system.errors import ClsaError, Exit
from clsa.training.extend import extend
from clsa.training.stages import pretrain
from tests.fault import changes, resumes, tiny
from tests.support.small_encoder import shrink_encoder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a step of a run take milliseconds."""
    monkeypatch.setattr(models, "_create", models._create)
    shrink_encoder()


def run_of(pictures: Path, out: Path, **over: Any) -> RunOptions:
    """A tiny run, saved once an epoch."""
    return tiny.options(pictures, out, save_minutes=15, **over)


def make_state(root: Path, **given: Any) -> State:
    options = tiny.options(Path("none"), root)
    method = build_method(options, Extent(100, 0, 6, 120))
    optimizer = build_optimizer(method, options.optim, method.fixed_rate)
    for param in method.parameters():
        if param.requires_grad:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return State(method, optimizer, "ab12", RunFolder(root), step=1, given=Given(**given))


def write(state: State, values: dict[str, Any], **facts: Any) -> None:
    told = {"step": 1, "environment": state.environment(), **facts}
    checkpoint.save(state.folder.checkpoints, "step-000001", values, told)


# ---- what a checkpoint holds


def test_missing_and_unexpected_keys_are_named_with_the_version(
    tmp_path: Path, small: None
) -> None:
    state = make_state(tmp_path)
    state.save(keep=False, best=False)
    saved = checkpoint.load_newest(state.folder.checkpoints)
    assert saved and saved.facts["clsa"] == "0.1.0" and state.resume() == []
    whole = saved.state

    def without(*path: Any) -> dict[str, Any]:
        values = copy.deepcopy(whole)
        holder = values
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]
        return values

    for path, told in (
        (("method", "queue.pointer"), "missing key method/queue.pointer (written by clsa 0.1.0)"),
        (("optimizer", "state", 3), "missing key optimizer/state/3/momentum_buffer"),
        (("optimizer", "param_groups", 0, "momentum"), "missing key optimizer/param_groups/0/mom"),
        (("best",), "missing key best "),
        (("keys",), "missing key keys "),
        (("skips",), "missing key skips/in_row and 1 more"),
    ):
        write(state, without(*path), clsa="0.1.0")
        with pytest.raises(ClsaError) as caught:
            state.resume()
        assert caught.value.code == Exit.NO_INPUT and f"step-000001.ckpt - {told}" in str(
            caught.value
        )
    more = copy.deepcopy(whole)
    more["method"]["bank.rows"] = torch.zeros(1)
    for values in (more, checkpoint.with_keys({k: v for k, v in more.items() if k != "keys"})):
        write(state, values)
        with pytest.raises(ClsaError, match=r"unexpected key method/bank\.rows"):
            state.resume()


def test_a_tensor_of_another_shape_is_one_line(tmp_path: Path, small: None) -> None:
    state = make_state(tmp_path)
    values = {key: value for key, value in state.as_dict().items() if key != "keys"}
    values["method"] = {**values["method"], "queue.rows": torch.zeros(3, 16)}
    write(state, checkpoint.with_keys(values))
    with pytest.raises(ClsaError, match=r"ckpt - size mismatch for queue\.rows.* - ") as caught:
        state.resume()
    assert caught.value.code == Exit.NO_INPUT and "\n" not in str(caught.value)


# ---- on which machine


def test_another_machine_is_reported(tmp_path: Path, small: None) -> None:
    state = make_state(tmp_path)
    now = state.environment()
    assert set(now) == {"torch", "threads", "processes", "cpu", "device"}
    write(state, state.as_dict(), environment={**now, "threads": 64, "torch": "2.0"})
    differences = f"torch 2.0 -> {now['torch']}, threads 64 -> {now['threads']}"
    assert state.resume() == [f"bitwise equality not promised: {differences}"]
    for unknown in (None, "x", {}, {"another": 1}, now):
        assert environment.describe_change(unknown, now) == ""
    told = environment.describe_change({**now, "processes": 2}, now)
    assert told.endswith("processes 2 -> 1; each process has its own batch norm statistics")


# ---- which pictures


def test_what_changed_among_the_pictures_is_counted(tmp_path: Path) -> None:
    root, kept = tmp_path / "pictures", tmp_path / "pictures.npz"
    options = tiny.options(root, tmp_path / "run").data
    tiny.make_pictures(root)
    source = open_source(str(root), "train", options)
    digest = source.digest()
    fingerprints.keep(kept, source, digest)
    assert kept.stat().st_size < 100 * 12 + 1500
    (root / "all" / "007.png").unlink()
    (root / "all" / "008.png").rename(root / "all" / "renamed.png")
    with open(root / "all" / "009.png", "ab") as file:
        file.write(b"x")
    for number in range(15):
        (root / "all" / f"new-{number:02d}.png").write_bytes(b"")
    now = open_source(str(root), "train", options)
    told = fingerprints.describe_change(kept, now, digest, now.digest())
    names = "+ all/new-00.png, + all/new-01.png, + all/new-02.png, ~ all/009.png"
    assert told == f"+16 -2 ~1 (digest {digest[:4]} -> {now.digest()[:4]}): {names}"
    backwards = source.subset(np.arange(100)[::-1])
    told = fingerprints.describe_change(kept, backwards, digest, backwards.digest())
    assert told.startswith("+0 -0 ~0 (") and told.endswith("in another order")
    for damage in (b"", b"PK\x03\x04 and nothing"):
        kept.write_bytes(damage)
        told = fingerprints.describe_change(kept, now, digest, now.digest())
        assert told.endswith("does not say which pictures")
    fingerprints.keep(kept, now, now.digest())  # rewritten
    assert fingerprints.describe_change(kept, now, now.digest(), "ef56").startswith("+0 -0 ~0 ")


def test_changed_labels_and_pixels_in_memory_are_reported_too(tmp_path: Path) -> None:
    images = np.zeros((10, 4, 4, 3), np.uint8)
    source = Pictures(images, np.arange(10) % 2, ["a", "b"])
    fingerprints.keep(tmp_path / "kept", source, source.digest())
    labels, other = source.labels.copy(), images.copy()
    labels[3], other[5, 0, 0, 0] = -1, 1
    for now, told in (
        (Pictures(images, labels, ["a", "b"]), "+0 -0 ~1 "),
        (Pictures(other, labels, ["a", "b"]), "+0 -0 ~2 "),
        (joined([source.subset(np.arange(4)), source.subset(np.arange(4, 10))]), "+0 -0 ~0 "),
    ):
        found = fingerprints.describe_change(tmp_path / "kept", now, source.digest(), now.digest())
        assert found.startswith(told), found


def test_the_order_in_which_the_system_lists_a_folder_has_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny.make_pictures(tmp_path / "pictures")
    options = tiny.options(root, tmp_path / "run").data
    before = open_source(str(root), "train", options).digest()
    tiny.shuffle_listings()
    try:
        assert sorted(os.listdir(root / "all")) != os.listdir(root / "all")
        assert open_source(str(root), "train", options).digest() == before
    finally:
        tiny.restore_listings()


def grown(root: Path) -> None:
    """16 pictures more: seven steps an epoch instead of six."""
    for number in range(16):
        shutil.copy(root / "all" / f"{number:03d}.png", root / "all" / f"new-{number:02d}.png")


@pytest.mark.parametrize(("stop", "begin"), [(15, 14), (12, 14), (4, 0)])
def test_accepted_pictures_restart_the_epoch(
    tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str], stop: int, begin: int
) -> None:
    root, out = tiny.make_pictures(tmp_path / "pictures"), tmp_path / "run"
    pretrain(run_of(root, out, epochs=3, max_steps=stop))
    weights = checkpoint.load_newest(out / "checkpoints")
    grown(root)
    with pytest.raises(ClsaError, match=r"data changed: \+16 -0 ~0 \(.*--accept-data-change$"):
        pretrain(run_of(root, out, epochs=3))
    seen: dict[str, Any] = {}
    keep = State.keep_pictures

    def spied(self: State) -> None:
        keep(self)
        seen.update(step=self.step, weights=copy.deepcopy(self.method.state_dict()))
        seen["on disk"] = sorted(tiny.manifests(out))

    State.keep_pictures = spied
    try:
        pretrain(run_of(root, out, epochs=3, accept_data_change=True, max_steps=begin + 9))
    finally:
        State.keep_pictures = keep
    assert weights and seen["step"] == begin and max(seen["on disk"]) == begin
    assert digests.digest(seen["weights"]) == digests.digest(weights.state["method"])
    missing = set(range(stop + 1, begin + 1))  # steps are numbered as if every epoch had been long
    assert set(tiny.losses(out)) == set(range(1, min(begin + 9, 21) + 1)) - missing
    capsys.readouterr()
    pretrain(run_of(root, out, epochs=3))  # accepted once for all later starts
    assert "data changed" not in capsys.readouterr().err
    assert max(tiny.losses(out)) == 21 and max(tiny.manifests(out)) == 21
    (line,) = RunFolder(out).read_history()
    assert line["step"] == begin and line["data_changed"].startswith("+16 -0 ~0 (digest ")
    assert "accept_data_change: false" in (out / "config.yaml").read_text()


def test_changed_pictures_lose_no_kept_and_no_best_checkpoint(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = resumes.classed(tmp_path / "pictures"), tmp_path / "run"
    told: dict[str, Any] = {"epochs": 4, "keep_every": 1, "probe_every": 1}
    pretrain(run_of(root, out, max_steps=20, **told))
    folder, checkpoints = RunFolder(out), out / "checkpoints"
    before, best = changes.contents(checkpoints), {path.name for path in checkpoints.glob("best*")}
    kept = {f"step-{step:06d}" for step in (6, 12, 18)}
    encoder = folder.best_encoder.read_bytes()
    with open(root / "a" / "009.png", "ab") as file:  # as many steps an epoch as before
        file.write(b"x")

    def refused(*_: Any, **__: Any) -> None:
        raise ClsaError("cannot write", "disk full", "free some space", Exit.IO)

    with monkeypatch.context() as patch:  # the refused save leaves all as it was
        patch.setattr(State, "save", refused)
        with pytest.raises(ClsaError, match="disk full"):
            pretrain(run_of(root, out, accept_data_change=True, **told))
    assert folder.read_history() == [] and folder.best_encoder.read_bytes() == encoder
    found = {Path(path).name: data for path, data in changes.contents(checkpoints).items()}
    assert found == {Path(path).name: data for path, data in before.items()}
    for number in (1, 2):
        pretrain(run_of(root, out, max_steps=21, accept_data_change=True, **told))
        assert [line["step"] for line in folder.read_history()] == [18] * number
        with open(root / "a" / "009.png", "ab") as file:
            file.write(b"x")
    aside = checkpoints / "before-change-1"
    there = {path.stem for place in (checkpoints, aside) for path in place.glob("step*.ckpt")}
    assert there >= kept and {path.name for path in aside.glob("best*")} == best
    for path, data in before.items():
        if Path(path).stem in kept and "000018" not in path:
            assert Path(path).read_bytes() == data
        if "000018" in path and "step" in path:  # the weights of step 20 took its name
            assert (aside / Path(path).name).read_bytes() == data
    assert (out / "encoder-best-before-change-1.safetensors").read_bytes() == encoder


def test_methods_with_a_row_per_picture_refuse_changed_ones(tmp_path: Path, small: None) -> None:
    assert Neighbours.holds_pictures and METHODS["pcl"].holds_pictures
    state = make_state(tmp_path, accepts_change=True)
    state.save(keep=False, best=False)
    state.data_digest = "cd34"
    assert state.resume()[0].startswith("data changed: other pictures; continues with the weights")
    state.method.holds_pictures = True
    with pytest.raises(ClsaError, match="keeps a row for each picture"):
        state.resume()


# ---- which options


def leaves() -> dict[str, RunOptions]:
    """Every leaf option over all methods, with the options of a run that has it."""
    found: dict[str, RunOptions] = {}
    for name in METHODS:
        recipe = "moco-v2-small" if name == "moco" else f"{name}-small"
        run = resolve({"recipe": recipe})
        found |= {key: run for key in flatten(run) if key not in found}
    return found


def with_other(options: Any, key: str) -> Any:
    """`options` with another value under a dotted key."""
    name, _, rest = key.partition(".")
    value = getattr(options, name)
    other = with_other(value, rest) if rest else tiny.other(value)
    return options.model_copy(update={name: other})


@pytest.mark.parametrize("key", leaves())
def test_each_option_is_free_or_a_change_is_refused_by_name(key: str, tmp_path: Path) -> None:
    run = leaves()[key].model_copy(update={"out": tmp_path / "run"})
    folder = RunFolder(run.out)
    folder.claim(run, Computing(threads=1, precision="fp32"))
    folder.encoder.write_bytes(b"something to lose")
    folder.check(run)
    changed = with_other(run, key)
    assert flatten(changed)[key] != flatten(run)[key]
    if key in FREE:
        folder.check(changed)
    else:
        with pytest.raises(ClsaError) as caught:
            folder.check(changed)
        told = f"({key}: {flatten(run)[key]} -> {flatten(changed)[key]})"
        assert caught.value.code == Exit.USAGE and told in str(caught.value)


def test_only_known_options_are_free() -> None:
    assert set(leaves()) >= FREE


def test_a_config_of_another_version_names_what_is_unknown(tmp_path: Path) -> None:
    run = resolve({"recipe": "clsa-small", "out": str(tmp_path / "run")})
    folder = RunFolder(run.out)
    folder.claim(run, Computing(threads=1, precision="fp32"))
    text = folder.config.read_text()
    folder.config.write_text(text + "ema_decay: 0.9\n")
    with pytest.raises(ClsaError, match=r"config\.yaml: ema_decay - no such setting"):
        folder.check(run)
    folder.config.write_text(text.replace("keep_every: 0\n", ""))  # as if this option were newer
    folder.check(run)


# ---- longer


def test_an_extended_run_goes_on_and_says_so(
    tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tiny.make_pictures(tmp_path / "pictures"), tmp_path / "run"
    pretrain(run_of(root, out, epochs=2, max_steps=100))
    short = tiny.losses(out)
    out = out.rename(tmp_path / "moved")  # a moved folder still works
    with pytest.raises(ClsaError, match="the run already has 2 epochs - give a larger total"):
        extend(ExtendOptions(run=out, epochs=1))
    extend(ExtendOptions(run=out, epochs=2))
    assert "note: the run already has 2 epochs" in capsys.readouterr().err
    with pytest.raises(ClsaError, match=f"or train for longer: clsa extend {out} --epochs 4$"):
        pretrain(run_of(root, out, epochs=4))
    assert tiny.losses(out) == short and RunFolder(out).read_history() == []
    extend(ExtendOptions(run=out, epochs=4, max_minutes=1e-6))
    told = "note: epochs 2 -> 4 at step 12: rates follow the longer schedule from here on"
    assert told in capsys.readouterr().err
    status = json.loads((out / "status.json").read_text())
    assert status["reason"] == "max_minutes" and status["step"] == 13
    extend(ExtendOptions(run=out, epochs=4))  # the same call resumes it without a note
    assert "note: epochs" not in capsys.readouterr().err
    extend(ExtendOptions(run=out, epochs=4))
    losses = tiny.losses(out)
    assert max(losses) == 24 and {step: losses[step] for step in short} == short
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    whole = tmp_path / "whole"
    pretrain(run_of(root, whole, epochs=4))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    longer = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert all(rates[step] == longer[step] for step in range(13, 25)) and rates[8] != longer[8]
    assert RunFolder(out).read_history() == [{"step": 12, "epochs": [2, 4]}]
    with pytest.raises(ClsaError, match=r"holds another run \(epochs: 4 -> 2\)"):
        pretrain(run_of(root, out, epochs=2))
    pretrain(run_of(root, out, epochs=4))
    extend(ExtendOptions(run=out, epochs=5))
    assert [line["epochs"] for line in RunFolder(out).read_history()] == [[2, 4], [4, 5]]


def test_an_extension_that_began_at_step_0_is_resumed_by_the_same_call(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tiny.make_pictures(tmp_path / "pictures"), tmp_path / "run"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "keep_pictures", killed)  # config.yaml is written, no step is saved
        with pytest.raises(KeyboardInterrupt):
            pretrain(run_of(root, out, epochs=1))
        with pytest.raises(KeyboardInterrupt):
            extend(ExtendOptions(run=out, epochs=2))
    assert RunFolder(out).read_options().epochs == 2
    moved = root.rename(tmp_path / "moved")
    where = {"data": str(moved), "workers": 1, "device": "auto"}
    extend(ExtendOptions.parse({"run": str(out), "epochs": 2, **where}, "options"))
    assert max(tiny.losses(out)) == 12 and RunFolder(out).read_history() == []
    found = RunFolder(out).read_options()
    assert {"data": found.data.data, "workers": found.data.workers, "device": "auto"} == where


def test_an_extension_may_take_other_pictures(tmp_path: Path, small: None) -> None:
    root, out = tiny.make_pictures(tmp_path / "pictures"), tmp_path / "run"
    pretrain(run_of(root, out, epochs=2))
    grown(root)
    with pytest.raises(ClsaError, match=r"data changed: \+16 -0 ~0"):
        extend(ExtendOptions(run=out, epochs=3))
    extend(ExtendOptions(run=out, epochs=3, accept_data_change=True))
    assert max(tiny.losses(out)) == 21  # seven steps an epoch now
    told = [set(line) - {"step"} for line in RunFolder(out).read_history()]
    assert {"data_changed"} in told and {"epochs"} in told


def test_what_cannot_be_extended(tmp_path: Path) -> None:
    with pytest.raises(ClsaError, match=r"holds no run .* - give the folder of a run$") as caught:
        extend(ExtendOptions(run=tmp_path, epochs=2))
    assert caught.value.code == Exit.NO_INPUT
    staged = resolve({"recipe": "continual-small", "stages": ["classes:2"]})
    RunFolder(tmp_path / "run").claim(staged, Computing(threads=1, precision="fp32"))
    with pytest.raises(ClsaError, match="a run in stages cannot be extended"):
        extend(ExtendOptions(run=tmp_path / "run", epochs=2000))


def test_history_is_kept_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_history() == []
    for _ in range(2):  # the second time as after a kill
        folder.note(3, epochs=[1, 2])
    folder.note(9, data_changed="+1")
    assert folder.read_history() == [
        {"step": 3, "epochs": [1, 2]},
        {"step": 9, "data_changed": "+1"},
    ]


def test_a_torn_line_of_the_history_loses_no_other_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.note(3, epochs=[1, 2])
    whole = folder.history.read_bytes()
    for damage in (b'{"step": 9, "ep', b"\xff\x00\xc2\x85\r", b"17\n"):
        folder.history.write_bytes(whole + damage)
        assert folder.read_history() == [{"step": 3, "epochs": [1, 2]}]
        folder.note(12, data_changed="+1")
        assert [line["step"] for line in folder.read_history()] == [3, 12]
        assert folder.history.read_bytes().startswith(whole + damage)
    folder.history.unlink()
    folder.history.mkdir()  # unreadable, for root too
    with pytest.raises(ClsaError, match=r"history\.jsonl - Is a directory"):
        folder.note(15, data_changed="+2")
