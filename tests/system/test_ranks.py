import json
import time
from typing import Any

import pytest
import torch.distributed as td

from clsa.system import ranks
from clsa.system.errors import ClsaError, Exit
from clsa.system.ranks import Report, _lost_error
from clsa.system.signals import Asked, StopError, signal_of

MET = RuntimeError("[gloo/transport] Connection closed by peer. And more")


def error_after(error: BaseException | None) -> ClsaError:
    """The error on rank 0 after rank 1 has ended with `error`, or without one."""
    said = Report("it had finished", Exit.OK) if error is None else Report.of(error)
    reports = {0: Report("at step 5"), 1: Report(*json.loads(json.dumps(said)))}
    return _lost_error(reports, 2, 0, 5, MET)


@pytest.mark.parametrize("code", [Exit.USAGE, Exit.BAD_DATA, Exit.UNHEALTHY, Exit.IO])
def test_all_ranks_take_the_exit_code_of_the_one_that_ends(code: Exit) -> None:
    end = error_after(ClsaError("rank 1", "went wrong", "mend it", code))
    assert end.code == code and "rank 1 - went wrong - mend it" in str(end)
    assert ("the same command resumes it" in str(end)) == (code == Exit.IO)


@pytest.mark.parametrize("error", [ValueError("a bug"), None])
def test_a_rank_with_a_bug_or_an_early_end_is_lost_for_the_others(error: Exception | None) -> None:
    end = error_after(error)
    assert end.code == Exit.IO and "lost rank 1 at step 5" in str(end)


@pytest.mark.parametrize(
    "error", [Asked("SIGUSR1"), StopError("at 3", "SIGUSR1", "go on", "SIGUSR1")]
)
def test_a_signal_to_one_stops_all_and_all_know_which(error: BaseException) -> None:
    end = error_after(error)
    assert end.code == Exit.PREEMPTED and signal_of(end) == "SIGUSR1"
    assert str(end) == (
        "stopped at step 5 - rank 1 was stopped by SIGUSR1 - the same command resumes it"
    )


def test_a_silent_rank_is_named_or_else_the_places_of_all_ranks() -> None:
    here, there = Report("at step 5"), Report("at step 6")
    assert "lost rank 1 of 2 at step 5" in str(_lost_error({0: here}, 2, 0, 5, MET))
    diverged = str(_lost_error({0: here, 1: there}, 2, 0, 5, MET))
    assert "diverged at step 5" in diverged and "rank 1 at step 6" in diverged


class Hanging:
    """A store whose process is suspended: no call returns."""

    def wait(self, *_: object) -> None:
        time.sleep(60)


class Answering:
    """A store in which `keys` are set, with a new beat at each of `beats` looks."""

    def __init__(self, *keys: str, beats: int = 0):
        self.keys, self.beats = keys, beats

    def wait(self, keys: list[str], _: object) -> None:
        if keys[0] not in self.keys:
            time.sleep(0.01)
            raise td.DistStoreError("not yet")

    def check(self, keys: list[str]) -> bool:
        return keys[0] in self.keys

    def add(self, *_: object) -> int:
        self.beats = max(self.beats - 1, 0)
        return self.beats


@pytest.mark.parametrize(
    ("store", "told"),
    [
        (Hanging(), "timed out after 0 s without a sign of rank 0"),
        (Answering("at/0"), "the connection to rank 0 has ended"),
        (Answering(), "timed out"),
        (Answering("done", "at/0"), None),
    ],
)
def test_waiting_for_rank_0_ends_whatever_the_store_does(store: Any, told: str | None) -> None:
    waiting = object.__new__(ranks.ProcessGroup)
    waiting.store, waiting.timeout_s = store, 0.3
    begun = time.monotonic()
    if told is None:
        waiting.wait_for_first("done")
    else:
        with pytest.raises(RuntimeError, match=told):
            waiting.wait_for_first("done")
    assert time.monotonic() - begun < 10


def test_rank_0_is_waited_for_while_it_shows_signs_of_life() -> None:
    waiting = object.__new__(ranks.ProcessGroup)
    waiting.store, waiting.timeout_s = Answering(beats=80), 0.3  # pyright: ignore
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="timed out"):
        waiting.wait_for_first("done")
    assert time.monotonic() - begun > 0.8
