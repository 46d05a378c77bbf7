import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from clsa.system import signals, workers
from clsa.system.errors import ClsaError, Exit


class Pictures(Dataset):
    """Number n reads picture 10 n; number 3 calls `end`."""

    def __init__(self, end: Callable[[], object]):
        self.end = end

    def __getitem__(self, number: int) -> int:
        workers.at(10 * number)
        if number == 3:
            self.end()
        return number


def run(end: Callable[[], object], count: int = 2) -> Iterator[Any]:
    return workers.results(Pictures(end), range(6), count, 2, "picture {}".format)


def boom() -> None:
    raise ValueError("boom")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV"),
        (lambda: os.kill(os.getpid(), signal.SIGSTOP), "no answer in 1 s"),
        (lambda: os._exit(0), "exit 0"),
        (boom, "- boom -"),
    ],
)
def test_the_error_names_the_worker_its_picture_and_the_cause(
    end: Callable[[], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "TIMEOUT_S", 1)
    began = time.monotonic()
    with pytest.raises(ClsaError, match=message) as caught:
        list(run(end))
    text = str(caught.value)
    assert caught.value.code == Exit.IO and "\n" not in text
    assert "picture 30, batch 3" in text and "worker 1 (pid " in text
    assert time.monotonic() - began < 30


def test_a_single_process_stops_waiting_when_it_is_asked_to_stop() -> None:
    began = time.monotonic()
    with signals.stop_on_signals() as stop:
        found = []
        for number in run(lambda: time.sleep(600), count=1):
            found.append(number)
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert found == [0, 1, 2] and stop.signal_name == "SIGTERM"
    assert time.monotonic() - began < 10


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_workers import run
stream = run(lambda: None)
print(next(stream), flush=True)
import multiprocessing, time
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    process.kill()
    process.wait()
    give_up = time.monotonic() + 10
    while any(_lives(pid) for pid in pids) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not any(_lives(pid) for pid in pids)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_shared_memory_is_counted_for_all_processes_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status = os.statvfs("/dev/shm")
    needed = int(0.7 * status.f_bavail * status.f_frsize)
    workers.require_shared_memory(needed)
    workers.require_shared_memory.cache_clear()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ClsaError, match="the workers need") as caught:
        workers.require_shared_memory(needed)
    assert caught.value.code == Exit.USAGE


class _Immortal(multiprocessing.Process):
    """A process that cannot be killed, as one in uninterruptible sleep."""

    def kill(self) -> None: ...


def test_a_worker_that_does_not_die_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "KILL_S", 0.1)
    process = _Immortal(target=time.sleep, args=(60,))
    process.start()
    try:
        workers._kill([process])
        assert process.is_alive() and process not in multiprocessing.active_children()
    finally:
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()


def test_too_few_open_files_are_refused_before_the_first_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import resource

    taken = len(os.listdir("/proc/self/fd"))
    for spare, is_enough in ((24, True), (22, False)):  # two workers need 24
        limits = (taken + spare, taken + spare)
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        if is_enough:
            workers.require_files(2)
            continue
        with pytest.raises(ClsaError, match=r"2 workers need 24 - raise ulimit -n") as refused:
            workers.require_files(2)
        assert refused.value.code == Exit.USAGE
