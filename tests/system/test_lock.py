"""One writer per folder: the holder is named, the lock of a killed process is taken over."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clsa.system import lock
from clsa.system.errors import ClsaError, Exit
from clsa.system.lock import NAME, only_writer

HOST = socket.gethostname()


@pytest.fixture(params=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """On a file system with locks, and on one without."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "flock", refuse)
        monkeypatch.setattr(lock, "SETTLE_S", 0.01)
    yield request.param == "locks"


@pytest.fixture
def dead() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_folder_is_made_and_left_without_the_lock(tmp_path: Path, locks: bool) -> None:
    out = tmp_path / "a" / "b"
    with pytest.raises(ZeroDivisionError), only_writer(out):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []  # it stayed empty
    with only_writer(out):
        assert (out / NAME).read_text().startswith(f"{os.getpid()} {HOST} ")
        (out / "file").write_text("")
    assert [path.name for path in out.iterdir()] == ["file"]
    (out / "file").unlink()
    with only_writer(out):
        pass
    assert list(out.iterdir()) == []  # it was there before


def test_the_holder_is_named_at_once(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from clsa.system.lock import only_writer\n"
    code += "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with pytest.raises(ClsaError) as caught, only_writer(tmp_path):
        pass
    expected = rf"{tmp_path} in use by pid {holder.pid} on host {HOST} since \d\d:\d\d - .*"
    assert caught.value.code == Exit.USAGE and re.fullmatch(expected, str(caught.value))
    holder.communicate()
    with only_writer(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(
    tmp_path: Path, dead: int, locks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / NAME).write_text(f"{dead} {HOST} 12:03\n")
    with only_writer(tmp_path):
        assert (tmp_path / NAME).read_text().startswith(f"{os.getpid()} ")
    holder = f"pid {dead} on host {HOST} since 12:03"
    note = f"note: {tmp_path} is taken over from {holder}, which has ended\n"
    assert capsys.readouterr().err == note


@pytest.mark.parametrize("text", [b"", b"12", b"\xff\xfe\0", b"-3 host 12:00\n"])
def test_a_torn_lock_belongs_to_nobody(
    tmp_path: Path, text: bytes, locks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / NAME).write_bytes(text)
    with only_writer(tmp_path):
        pass
    assert capsys.readouterr().err == ""


def test_without_locks_a_lock_of_another_host_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / NAME).write_text("7 elsewhere 12:03\n")
    with (
        pytest.raises(ClsaError, match="in use by pid 7 on host elsewhere since 12:03"),
        only_writer(tmp_path),
    ):
        pass
    assert (tmp_path / NAME).read_text() == "7 elsewhere 12:03\n"


def test_workers_that_outlive_their_parent_hold_it_for_a_while(
    tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WAIT_S", 0.1)
    handle = os.open(tmp_path / NAME, os.O_RDWR | os.O_CREAT)
    os.write(handle, f"{dead} {HOST} 12:03\n".encode())
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ClsaError, match=f"pid {dead}"), only_writer(tmp_path):
        pass
    os.close(handle)
    with only_writer(tmp_path):
        pass
