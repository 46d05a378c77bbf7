"""The other processes of a run: waiting for them, and naming the one that is lost.

Beside the collectives, whose errors name no rank, the processes share a key-value store. Whoever
ends says why there; when a collective fails, all say where they are, and who says nothing is lost.
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

ROLL_S = 3.0  # torchrun ends the others soon after the first
BEAT_S = 1.0
_LOST = re.compile(r"gloo|nccl|connection|broken pipe|timed out|timeout", re.IGNORECASE)


class Said(NamedTuple):
    """What a process tells the others."""

    text: str
    """Where it is, or why it has ended."""
    code: int | None = None
    """With which exit code, if it has."""
    signal: str = ""
    """For which signal."""

    @classmethod
    def of(cls, error: BaseException) -> "Said":
        """The end by an error."""
        text = f"{type(error).__name__}: {first_line(error)}"
        return cls(text, int(code_of(error)), signal_of(error))


class Peers:
    """The processes of one group, as this one sees them.

    Args:
        backend: of torch.distributed.
        timeout_s: how long one waits for another before that counts as lost.
        gpu: of this process, for nccl.
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

    def say(self, said: Said) -> None:
        """Tell the others, once, why this process ends, or where it is."""
        if not self.ended:
            self.ended = True
            with suppress(RuntimeError):  # the store may be gone
                self.store.set(f"at/{self.rank}", json.dumps(said))

    def lost(self, step: int, error: BaseException) -> ClsaError:
        """What a failed collective means: asks all others where they are, for a few seconds."""
        heard = {self.rank: Said(f"at step {step}")}
        _within(ROLL_S + BEAT_S, lambda: self._call_roll(heard))
        return _told(dict(heard), self.world, self.rank, step, error)

    def _call_roll(self, heard: dict[int, Said]) -> None:
        until = time.monotonic() + ROLL_S
        self.say(heard[self.rank])
        for rank in set(range(self.world)) - {self.rank}:
            left = timedelta(seconds=max(until - time.monotonic(), 0.01))
            with suppress(RuntimeError):
                self.store.wait([f"at/{rank}"], left)
                heard[rank] = Said(*json.loads(self.store.get(f"at/{rank}")))

    def linger(self, code: int) -> None:
        """Rank 0, which may hold the store, lets the others read there why it ends.

        Where the run was asked to stop they end after rank 0, which has yet to say so to SLURM:
        with the first process that ends, torchrun ends the others.
        """
        if self.rank == 0:
            others = [f"at/{rank}" for rank in range(1, self.world)]
            with suppress(RuntimeError):
                self.store.wait(others, timedelta(seconds=ROLL_S))
                time.sleep(BEAT_S / 4)  # they have asked, and read next
            with suppress(RuntimeError):
                self.store.set("left/0", "")
        elif code == Exit.PREEMPTED:
            limit_s = slurm.TIMEOUT_S + 2 * ROLL_S
            _within(limit_s, lambda: self.store.wait(["left/0"], timedelta(seconds=limit_s)))
            time.sleep(BEAT_S / 4)  # it is at its last line

    def beat(self, done: threading.Event) -> None:
        """Show that this process lives, until it is done."""
        while not done.wait(BEAT_S):
            with suppress(RuntimeError):
                self.store.add("beats", 1)

    def wait_for_first(self, key: str) -> None:
        """Until rank 0 sets `key`; raises RuntimeError when it ends or its heart stands still."""
        since, ends, done = [time.monotonic()], list[str](), threading.Event()

        # In a thread: where rank 0 holds the store and is stopped, a call may never return.
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
        """Note each sign of life of rank 0, then how the wait for `key` ends: well if empty."""
        beats = -1
        try:
            while not done.is_set():
                with suppress(td.DistStoreError):  # not yet
                    self.store.wait([key], timedelta(seconds=BEAT_S))
                    return ends.append("")
                if self.store.check(["at/0"]):  # it may have set the key just before
                    good = self.store.check([key])
                    return ends.append("" if good else "the connection to rank 0 has ended")
                if (now := self.store.add("beats", 0)) != beats:
                    beats, since[0] = now, time.monotonic()
        except RuntimeError as error:
            ends.append(str(error))


_peers: list[Peers] = []


@contextmanager
def joined(backend: str, timeout_s: float, gpu: torch.device | None) -> Iterator[None]:
    """Join the group that torchrun announces, and leave it at the end."""
    peers = Peers(backend, timeout_s, gpu)
    _peers.append(peers)
    try:
        with named(lambda: 0):
            yield
        peers.say(Said("it was done", Exit.OK))
    except BaseException as error:
        with stop_on_signals():  # it ends anyway
            traceback.clear_frames(error.__traceback__)  # DistributedDataParallel holds the group
            td.destroy_process_group()  # now the others meet that
            peers.linger(code_of(error))
        raise
    else:
        td.destroy_process_group()
    finally:
        _peers.remove(peers)


@contextmanager
def named(step: Callable[[], int]) -> Iterator[None]:
    """Tell the others why this process ends, if it does; name the one whose end ends this one.

    Args:
        step: how many steps are done.

    Raises:
        ClsaError: when another process is lost; 74, or that one's own exit code.
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
        _peers[-1].say(Said.of(error))
        raise


@contextmanager
def first_alone(together: bool = True) -> Iterator[None]:
    """Rank 0 may take long inside; the others then wait for as long as it lives.

    Args:
        together: whether all ranks come here; else nobody waits.
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
    """Wait for a call, but no longer: where rank 0 holds the store and is stopped, it may hang."""

    def quietly() -> None:
        with suppress(RuntimeError):
            call()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(limit_s)


def _told(
    heard: dict[int, Said], world: int, own: int, step: int, error: BaseException
) -> ClsaError:
    silent = [str(rank) for rank in range(world) if rank not in heard]
    ended = {rank: said for rank, said in heard.items() if said.code is not None}
    hint = "the same command resumes it"
    if ended:
        rank, said = next(iter(ended.items()))
        if said.code == Exit.PREEMPTED:
            why = f"rank {rank} was stopped by {said.signal or 'a signal'}"
            return StopError(f"stopped at step {step}", why, hint, said.signal)
        code = Exit.IO if said.code in (Exit.OK, Exit.BUG) else Exit(said.code)
        hint = hint if code in RESUMABLE else "mend what it says"
        return ClsaError(f"lost rank {rank} at step {step}", f"it ended ({said.text})", hint, code)
    if silent:
        what = f"lost rank {', '.join(silent)} of {world} at step {step}"
        why = f"killed, stopped or without network; rank {own} met: {_short(error)}"
        return ClsaError(what, why, hint, Exit.IO)
    places = ", ".join(f"rank {rank} {said.text}" for rank, said in heard.items())
    why = f"they do not make the same calls ({places}); rank {own} met: {_short(error)}"
    return ClsaError(f"the {world} processes parted at step {step}", why, hint, Exit.IO)


def _short(error: BaseException) -> str:
    """What a library says, without the place in its own source."""
    return re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". ")[0][:120]
