import json
import time
from typing import Any

import pytest
import torch.distributed as td

from clsa.system import ranks
from clsa.system.errors import ClsaError, Exit
from clsa.system.ranks import Said, _told
from clsa.system.signals import Asked, StopError, signal_of

MET = RuntimeError("[gloo/transport] Connection closed by peer. And more")


def told(error: BaseException | None) -> ClsaError:
    """What rank 0 says when rank 1 has ended so."""
    said = Said("it was done", Exit.OK) if error is None else Said.of(error)
    heard = {0: Said("at step 5"), 1: Said(*json.loads(json.dumps(said)))}
    return _told(heard, 2, 0, 5, MET)


@pytest.mark.parametrize("code", [Exit.USAGE, Exit.BAD_DATA, Exit.UNHEALTHY, Exit.IO])
def test_the_exit_code_of_the_one_that_ends_is_that_of_all(code: Exit) -> None:
    end = told(ClsaError("rank 1", "went wrong", "mend it", code))
    assert end.code == code and "rank 1 - went wrong - mend it" in str(end)
    assert ("the same command resumes it" in str(end)) == (code == Exit.IO)


@pytest.mark.parametrize("error", [ValueError("a bug"), None])
def test_a_bug_of_one_and_its_early_end_are_a_loss_for_the_others(error: Exception | None) -> None:
    assert told(error).code == Exit.IO and "lost rank 1 at step 5" in str(told(error))


@pytest.mark.parametrize(
    "error", [Asked("SIGUSR1"), StopError("at 3", "SIGUSR1", "go on", "SIGUSR1")]
)
def test_a_signal_to_one_stops_all_and_all_know_which(error: BaseException) -> None:
    end = told(error)
    assert end.code == Exit.PREEMPTED and signal_of(end) == "SIGUSR1"
    assert str(end) == (
        "stopped at step 5 - rank 1 was stopped by SIGUSR1 - the same command resumes it"
    )


def test_the_silent_one_is_named_and_else_where_all_are() -> None:
    here, there = Said("at step 5"), Said("at step 6")
    assert "lost rank 1 of 2 at step 5" in str(_told({0: here}, 2, 0, 5, MET))
    parted = str(_told({0: here, 1: there}, 2, 0, 5, MET))
    assert "parted at step 5" in parted and "rank 1 at step 6" in parted


class Hanging:
    """A store whose process is stopped: no call returns."""

    def wait(self, *_: object) -> None:
        time.sleep(60)


class Answering:
    """A store that has what was set."""

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
def test_waiting_for_the_first_ends_whatever_its_store_does(store: Any, told: str | None) -> None:
    waiting = object.__new__(ranks.Peers)
    waiting.store, waiting.timeout_s = store, 0.3
    begun = time.monotonic()
    if told is None:
        waiting.wait_for_first("done")
    else:
        with pytest.raises(RuntimeError, match=told):
            waiting.wait_for_first("done")
    assert time.monotonic() - begun < 10


def test_a_first_that_shows_signs_of_life_is_waited_for() -> None:
    waiting = object.__new__(ranks.Peers)
    waiting.store, waiting.timeout_s = Answering(beats=80), 0.3  # pyright: ignore
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="timed out"):
        waiting.wait_for_first("done")
    assert time.monotonic() - begun > 0.8
