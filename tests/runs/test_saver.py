"""Saving a run: two refused saves are survived; a third in a row, or the last, ends the run."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clsa.methods.method import Landmarks
from clsa.recipes import resolve
from clsa.runs import checkpoint
from clsa.runs.folder import RunFolder
from clsa.runs.journal import Journal
from clsa.runs.saver import Saver
from clsa.runs.state import State
from clsa.system.errors import ClsaError, Exit


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    folder = RunFolder(tmp_path / "run")
    method = nn.Linear(300, 100)
    optimizer = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9)
    state = State(method, optimizer, "digest", folder)  # pyright: ignore
    journal = Journal(folder, 0, 9, 3, Landmarks("loss", 1.0, 0.0), True)
    return Saver(state, resolve({"recipe": "clsa-small"}), journal)


def save_to(saver: Saver, step: int, last: bool = False, keep: bool = False) -> None:
    saver.state.step = step
    saver.save(keep, best=False, last=last)


def steps(saver: Saver) -> list[int]:
    found = saver.state.folder.checkpoints.glob("step-*")
    return sorted({int(path.stem[5:]) for path in found})


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Makes fsync fail with the error number under "refuses", unless that is 0."""
    disk, fsync = {"refuses": 0}, os.fsync

    def refuse(handle: int) -> None:
        if disk["refuses"]:
            raise OSError(disk["refuses"], os.strerror(disk["refuses"]))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    return disk


def test_two_failed_saves_are_reported_and_a_good_one_resets_the_count(
    saver: Saver, disk: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_to(saver, 3)
    for step, number in enumerate((errno.ENOSPC, errno.EIO, 0, errno.EROFS, errno.EDQUOT, 0), 4):
        disk["refuses"] = number
        save_to(saver, step)
    lines = capsys.readouterr().err.splitlines()
    where = saver.state.folder.checkpoints
    assert [line.partition(" - ")[0] for line in lines] == [
        f"error: cannot save step {step} ({where})" for step in (4, 5, 7, 8)
    ]
    assert lines[0].endswith(" - previous step 3 is intact") and "No space left" in lines[0]
    assert lines[2].endswith(" - previous step 6 is intact") and "Read-only" in lines[2]
    assert steps(saver) == [6, 9] and not list(where.glob(".*"))


def test_the_third_failure_in_a_row_or_a_failed_last_save_ends_the_run(
    saver: Saver, disk: dict[str, int]
) -> None:
    disk["refuses"] = errno.EROFS
    save_to(saver, 1)
    save_to(saver, 2)
    with pytest.raises(ClsaError, match=r"cannot save step 3 .* - no step is saved yet") as caught:
        save_to(saver, 3)
    assert caught.value.code == Exit.IO
    disk["refuses"] = 0
    save_to(saver, 4)
    disk["refuses"] = errno.ENOSPC
    with pytest.raises(ClsaError, match="previous step 4 is intact") as caught:
        save_to(saver, 5, last=True)
    assert caught.value.code == Exit.IO


def test_a_lack_of_room_is_reported_in_numbers(
    saver: Saver, disk: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 200_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    disk["refuses"] = errno.ENOSPC
    with pytest.raises(ClsaError, match=r"\) - 0\.2 MB free, 0\.2 MB needed - no step"):
        save_to(saver, 1, last=True)


def test_the_reported_size_is_the_size_on_the_disk(saver: Saver) -> None:
    loss = saver.state.method(torch.ones(2, 300)).sum()
    loss.backward()
    saver.state.optimizer.step()
    save_to(saver, 1)
    size = (saver.state.folder.checkpoints / "step-000001.ckpt").stat().st_size
    assert saver.state.num_bytes() == pytest.approx(size, rel=0.05)


def test_a_bug_in_saving_is_raised_at_once(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ClsaError("what", "why", "what next")

    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(ClsaError, match="what - why"):
        save_to(saver, 1)


def test_a_checkpoint_that_cannot_be_deleted_is_reported(
    saver: Saver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.stem == "step-000001":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    for step in (1, 2, 3):
        save_to(saver, step)
    assert steps(saver) == [1, 2, 3]
    warning = capsys.readouterr().err
    assert warning.startswith("warning: cannot delete ") and warning.count("\n") == 1
    monkeypatch.undo()
    save_to(saver, 4)
    assert steps(saver) == [3, 4]


def damage(saver: Saver, *of: int) -> None:
    for step in of:
        (saver.state.folder.checkpoints / f"step-{step:06d}.ckpt").write_bytes(b"")


def test_the_resumed_checkpoint_stays_and_damaged_newer_ones_give_way(saver: Saver) -> None:
    for step in (3, 9, 12):
        save_to(saver, step, keep=step == 3)
    manifest = saver.state.folder.checkpoints / "step-000003.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "keep": False}))
    damage(saver, 9, 12)
    notes = saver.state.resume()
    assert (
        saver.state.step == 3
        and [note.split(",")[-1] for note in notes] == [" using step-000003"] * 2
    )
    again = Saver(saver.state, saver.options, saver.journal)
    assert steps(again) == [3, 9, 12]  # the start deletes none: damaged ones may still be repaired
    save_to(again, 4)
    assert steps(again) == [3, 4]
    for step in (5, 6, 7):
        save_to(again, step)
    assert steps(again) == [3, 6, 7]
