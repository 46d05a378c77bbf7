"""The other processes of a run: waiting for them, and naming the one that is lost.

The errors of collectives name no rank, so the processes also share a key-value store. A process
that ends writes the reason there. When a collective fails, each process writes there where it is;
a process that writes nothing is lost.
"""

import json
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as td
from torch.distributed.rendezvous import rendezvous

from clsa.system import slurm
from clsa.system.errors import RESUMABLE, ClsaError, Exit, code_of, first_line
from clsa.system.signals import StopError, signal_of, stop_on_signals

ROLL_S = 3.0  # torchrun ends the others soon after the first has ended
BEAT_S = 1.0
_LOST = re.compile(r"gloo|nccl|connection|broken pipe|timed out|timeout", re.IGNORECASE)


class Report(NamedTuple):
    """What a process reports to the others."""

    text: str
    """Where the process is, or why it has ended."""
    code: int | None = None
    """Its exit code, if it has ended."""
    signal: str = ""
    """Name of the signal that ended it, if one did."""

    @classmethod
    def of(cls, error: BaseException) -> "Report":
        """The report of a process that ends with this error."""
        text = f"{type(error).__name__}: {first_line(error)}"
        return cls(text, int(code_of(error)), signal_of(error))


class ProcessGroup:
    """The processes of one group, as this one sees them.

    Args:
        backend: backend of torch.distributed.
        timeout_s: how long a process waits for another before it counts that one as lost.
        gpu: GPU of this process, for nccl.
    """

    def __init__(self, backend: str, timeout_s: float, gpu: torch.device | None):
        limit = timedelta(seconds=timeout_s)
        self.store, self.rank, self.world = next(rendezvous("env://", timeout=limit))
        self.timeout_s, self.ended, self.waits = timeout_s, False, 0
        store = td.PrefixStore("group", self.store)  # pyright: ignore[reportPrivateImportUsage]
        td.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world, timeout=limit,
            device_id=gpu,
        )  # fmt: skip

    def say(self, said: Report) -> None:
        """Report to the others, once only, why this process ends or where it is."""
        if not self.ended:
            self.ended = True
            with suppress(RuntimeError):  # the store may be gone
                self.store.set(f"at/{self.rank}", json.dumps(said))

    def lost(self, step: int, error: BaseException) -> ClsaError:
        """The error for a failed collective; asks the others, for a few seconds, where they are."""
        reports = {self.rank: Report(f"at step {step}")}
        _within(ROLL_S + BEAT_S, lambda: self._call_roll(reports))
        return _lost_error(dict(reports), self.world, self.rank, step, error)

    def _call_roll(self, reports: dict[int, Report]) -> None:
        until = time.monotonic() + ROLL_S
        self.say(reports[self.rank])
        for rank in set(range(self.world)) - {self.rank}:
            left = timedelta(seconds=max(until - time.monotonic(), 0.01))
            with suppress(RuntimeError):
                self.store.wait([f"at/{rank}"], left)
                reports[rank] = Report(*json.loads(self.store.get(f"at/{rank}")))

    def linger(self, code: int) -> None:
        """Keep rank 0, which may hold the store, alive until the others have read why it ends.

        If the run was asked to stop, the others wait for rank 0, which may have to ask SLURM to
        requeue the job: torchrun ends all processes once the first has ended.
        """
        if self.rank == 0:
            others = [f"at/{rank}" for rank in range(1, self.world)]
            with suppress(RuntimeError):
                self.store.wait(others, timedelta(seconds=ROLL_S))
                time.sleep(BEAT_S / 4)  # the others have written and are about to read
            with suppress(RuntimeError):
                self.store.set("left/0", "")
        elif code == Exit.PREEMPTED:
            limit_s = slurm.TIMEOUT_S + 2 * ROLL_S
            _within(limit_s, lambda: self.store.wait(["left/0"], timedelta(seconds=limit_s)))
            time.sleep(BEAT_S / 4)  # rank 0 is at its last line

    def beat(self, done: threading.Event) -> None:
        """Count up `beats` in the store, as a sign of life, until `done` is set."""
        while not done.wait(BEAT_S):
            with suppress(RuntimeError):
                self.store.add("beats", 1)

    def wait_for_first(self, key: str) -> None:
        """Wait until rank 0 sets `key`; RuntimeError if rank 0 ends or gives no sign of life."""
        since, ends, done = [time.monotonic()], list[str](), threading.Event()

        # In a thread: if rank 0 holds the store and is suspended, a call may never return.
        listening = threading.Thread(
            target=self._listen, args=(key, since, ends, done), daemon=True
        )
        listening.start()
        while not ends and time.monotonic() - since[0] < self.timeout_s:
            listening.join(BEAT_S)
        done.set()
        if not ends:
            raise RuntimeError(f"timed out after {self.timeout_s:.0f} s without a sign of rank 0")
        if ends[0]:
            raise RuntimeError(ends[0])

    def _listen(self, key: str, since: list[float], ends: list[str], done: threading.Event) -> None:
        """Note signs of life of rank 0 in `since`, and how the wait for `key` ends in `ends`.

        The entry of `ends` is empty if `key` was set; otherwise it is the error.
        """
        beats = -1
        try:
            while not done.is_set():
                with suppress(td.DistStoreError):  # not set yet
                    self.store.wait([key], timedelta(seconds=BEAT_S))
                    return ends.append("")
                if self.store.check(["at/0"]):  # rank 0 may have set the key just before it ended
                    good = self.store.check([key])
                    return ends.append("" if good else "the connection to rank 0 has ended")
                if (now := self.store.add("beats", 0)) != beats:
                    beats, since[0] = now, time.monotonic()
        except RuntimeError as error:
            ends.append(str(error))


_peers: list[ProcessGroup] = []


@contextmanager
def joined(backend: str, timeout_s: float, gpu: torch.device | None) -> Iterator[None]:
    """Join the group that torchrun announces, and leave it at the end."""
    peers = ProcessGroup(backend, timeout_s, gpu)
    _peers.append(peers)
    try:
        with named(lambda: 0):
            yield
        peers.say(Report("it had finished", Exit.OK))
    except BaseException as error:
        with stop_on_signals():  # ignore them: this process ends anyway
            traceback.clear_frames(error.__traceback__)  # DistributedDataParallel holds the group
            td.destroy_process_group()  # now the collectives of the others fail
            peers.linger(code_of(error))
        raise
    else:
        td.destroy_process_group()
    finally:
        _peers.remove(peers)


@contextmanager
def named(step: Callable[[], int]) -> Iterator[None]:
    """Report to the others why this process ends; if another is lost, name that one.

    Args:
        step: how many steps are done.

    Raises:
        ClsaError: when another process is lost; 74, or the exit code of that process.
    """
    try:
        yield
    except BaseException as error:
        if not _peers:
            raise
        if type(error) in (RuntimeError, td.DistBackendError, td.DistNetworkError) and _LOST.search(
            str(error)
        ):
            raise _peers[-1].lost(step(), error) from error
        _peers[-1].say(Report.of(error))
        raise


@contextmanager
def first_alone(together: bool = True) -> Iterator[None]:
    """Let rank 0 take long inside; at the end the others wait for as long as rank 0 lives.

    Args:
        together: whether all ranks come here; if not, nobody waits.
    """
    if not _peers or not together:
        yield
        return
    peers = _peers[-1]
    peers.waits += 1
    key = f"done/{peers.waits}"
    if peers.rank:
        yield
        peers.wait_for_first(key)
        return
    done = threading.Event()
    heart = threading.Thread(target=peers.beat, args=(done,), daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()
    peers.store.set(key, "")


def _within(limit_s: float, call: Callable[[], object]) -> None:
    """Wait at most `limit_s` for a call: it may hang if rank 0 holds the store and is suspended."""

    def quietly() -> None:
        with suppress(RuntimeError):
            call()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(limit_s)


def _lost_error(
    reports: dict[int, Report], world: int, own: int, step: int, error: BaseException
) -> ClsaError:
    """The error that says, from the reports of the ranks, why a collective failed."""
    silent = [str(rank) for rank in range(world) if rank not in reports]
    ended = {rank: said for rank, said in reports.items() if said.code is not None}
    hint = "the same command resumes it"
    if ended:
        rank, said = next(iter(ended.items()))
        if said.code == Exit.PREEMPTED:
            why = f"rank {rank} was stopped by {said.signal or 'a signal'}"
            return StopError(f"stopped at step {step}", why, hint, said.signal)
        code = Exit.IO if said.code in (Exit.OK, Exit.BUG) else Exit(said.code)
        hint = hint if code in RESUMABLE else "fix what it reports"
        return ClsaError(f"lost rank {rank} at step {step}", f"it ended ({said.text})", hint, code)
    if silent:
        what = f"lost rank {', '.join(silent)} of {world} at step {step}"
        why = f"killed, suspended or without network; rank {own} got: {_short(error)}"
        return ClsaError(what, why, hint, Exit.IO)
    places = ", ".join(f"rank {rank} {said.text}" for rank, said in reports.items())
    why = f"they do not make the same calls ({places}); rank {own} got: {_short(error)}"
    return ClsaError(f"the {world} processes diverged at step {step}", why, hint, Exit.IO)


def _short(error: BaseException) -> str:
    """The first sentence of a library's error, without its place in the source code."""
    return re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". ")[0][:120]
