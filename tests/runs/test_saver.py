"""Saving a run: a disk that refuses costs saves before it costs the run."""

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
    """Refuses to flush with the error number "refuses", unless it is 0."""
    disk, fsync = {"refuses": 0}, os.fsync

    def refuse(handle: int) -> None:
        if disk["refuses"]:
            raise OSError(disk["refuses"], os.strerror(disk["refuses"]))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    return disk


def test_two_misses_are_told_and_the_next_save_counts_anew(
    saver: Saver, disk: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_to(saver, 3)
    for step, number in enumerate((errno.ENOSPC, errno.EIO, 0, errno.EROFS, errno.EDQUOT, 0), 4):
        disk["refuses"] = number
        save_to(saver, step)
    told = capsys.readouterr().err.splitlines()
    where = saver.state.folder.checkpoints
    assert [line.partition(" - ")[0] for line in told] == [
        f"error: cannot save step {step} ({where})" for step in (4, 5, 7, 8)
    ]
    assert told[0].endswith(" - previous step 3 is intact") and "No space left" in told[0]
    assert told[2].endswith(" - previous step 6 is intact") and "Read-only" in told[2]
    assert steps(saver) == [6, 9] and not list(where.glob(".*"))


def test_the_third_miss_in_a_row_and_the_last_save_end_the_run(
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


def test_room_is_told_where_it_is_what_lacks(
    saver: Saver, disk: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 200_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    disk["refuses"] = errno.ENOSPC
    with pytest.raises(ClsaError, match=r"\) - 0\.2 MB free, 0\.2 MB needed - no step"):
        save_to(saver, 1, last=True)


def test_the_size_that_is_told_is_the_size_on_the_disk(saver: Saver) -> None:
    loss = saver.state.method(torch.ones(2, 300)).sum()
    loss.backward()
    saver.state.optimizer.step()
    save_to(saver, 1)
    size = (saver.state.folder.checkpoints / "step-000001.ckpt").stat().st_size
    assert saver.state.num_bytes() == pytest.approx(size, rel=0.05)


def test_a_bug_in_saving_is_no_miss(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ClsaError("what", "why", "what next")

    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(ClsaError, match="what - why"):
        save_to(saver, 1)


def test_what_cannot_be_deleted_is_told(
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
    told = capsys.readouterr().err
    assert told.startswith("warning: cannot delete ") and told.count("\n") == 1
    monkeypatch.undo()
    save_to(saver, 4)
    assert steps(saver) == [3, 4]


def damage(saver: Saver, *of: int) -> None:
    for step in of:
        (saver.state.folder.checkpoints / f"step-{step:06d}.ckpt").write_bytes(b"")


def test_the_one_gone_on_from_stays_and_damaged_newer_ones_give_way(saver: Saver) -> None:
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
    assert steps(again) == [3, 9, 12]  # the start itself deletes none that may yet be mended
    save_to(again, 4)
    assert steps(again) == [3, 4]
    for step in (5, 6, 7):
        save_to(again, step)
    assert steps(again) == [3, 6, 7]
