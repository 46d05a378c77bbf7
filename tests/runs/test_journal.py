import errno
import json
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clsa.methods.method import Landmarks
from clsa.runs.folder import RunFolder
from clsa.runs.journal import Journal
from clsa.system.errors import ClsaError, Exit


def journal(folder: RunFolder, speaks: bool = True) -> Journal:
    folder.path.mkdir(exist_ok=True)
    return Journal(folder, 0, 4, 2, Landmarks("contrast", 8.38, 3.51), speaks)


def test_metrics_and_tensorboard_hold_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    with journal(folder) as log:
        log.count(8, 0.0)
        log.count(8, 0.0)
        log.log(2, {"contrast": 7.5, "kl": 0.25, "lr": 0.1})
        log.write({"step": 2, "epoch": 1, "knn": 40.0})
    first, second = (json.loads(line) for line in folder.metrics.read_text().splitlines())
    assert (first["step"], first["epoch"], first["contrast"]) == (2, 1.0, 7.5)
    assert first["images_per_s"] > 0 and 0 <= first["data_wait"] <= 1
    assert second == {"step": 2, "epoch": 1, "knn": 40.0}
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    (event,) = board.Scalars("contrast")
    assert (event.step, event.value) == (2, 7.5)
    printed = capsys.readouterr().err
    assert "contrast 7.50 (chance 8.38, floor 3.51) · KL 0.250" in printed
    assert "step 2/4" in printed


def test_without_tensorboard_the_metrics_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, tensorboard: Any) -> RunFolder:
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        marks = Landmarks("contrast", 8.38, 3.51)
        with Journal(folder, 0, 4, 2, marks, True, tensorboard) as log:
            log.log(2, {"contrast": 7.5})
        return folder

    assert run("on", "on").tensorboard.exists() and not run("off", "off").tensorboard.exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    folder = run("auto", "auto")
    assert not folder.tensorboard.exists() and folder.metrics.read_text().count("\n") == 1
    with pytest.raises(ClsaError, match=r"TensorBoard.*clsa\[tensorboard\]"):
        run("asked", "on")


def test_other_ranks_say_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    with journal(folder, speaks=False) as log:
        log.count(8, 0.0)
        log.log(2, {"contrast": 7.5})
        log.say("hello")
    assert not folder.metrics.exists() and capsys.readouterr().err == ""


def test_lines_are_kept_while_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        def __init__(self, file: IO[bytes]):
            self.file, self.room = file, 20

        def write(self, data: bytes) -> int:
            part = data[: self.room]
            self.room -= len(part)
            if not part:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(part)

        def close(self) -> None:
            self.file.close()

    folder = RunFolder(tmp_path / "run")
    with journal(folder) as log:
        disk = Full(log.file)
        log.file = disk  # pyright: ignore
        for step in (1, 2):
            log.write({"step": step, "knn": 1.0})
        disk.room = 1000
        log.write({"step": 3, "knn": 1.0})
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    warning = "warning: cannot write metrics.jsonl yet, lines are kept - "
    assert capsys.readouterr().err == f"{warning}No space left on device\n"


def test_tensorboard_gives_up_on_a_full_disk_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = RunFolder(tmp_path / "run")
    with journal(folder) as log:
        writer = log.board.file_writer.event_writer._async_writer  # pyright: ignore
        writer._writer.write = refuse
        for step in range(1, 9):
            log.write({"step": step, "knn": 1.0})
            writer._worker.join(timeout=1.0)
    assert len(folder.metrics.read_text().splitlines()) == 8
    warning = "warning: tensorboard/ gets nothing more until the next start - "
    assert capsys.readouterr().err == f"{warning}No space left on device\n"


def test_a_path_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.metrics.mkdir(parents=True)
    with pytest.raises(ClsaError) as caught, journal(folder):
        pass
    assert caught.value.code == Exit.CANNOT_WRITE
