"""The other processes of a run: waiting for them, and naming the one that is lost.

Beside the collectives, whose errors name no rank, the processes share a key-value store. Whoever
ends says why there; when a collective fails, all say where they are, and who says nothing is lost.
"""

import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as td
from torch.distributed.rendezvous import rendezvous

from clsa.errors import ClsaError, Exit, first_line

ROLL_S = 3.0  # torchrun ends the others soon after the first
BEAT_S = 1.0
_LOST = re.compile(r"gloo|nccl|connection|broken pipe|timed out|timeout", re.IGNORECASE)


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

    def say_end(self, why: str) -> None:
        """Tell the others, once, why this process ends."""
        if not self.ended:
            self.ended = True
            with suppress(RuntimeError):  # the store may be gone
                self.store.set(f"at/{self.rank}", f"ended: {why}")

    def lost(self, step: int, error: BaseException) -> ClsaError:
        """What a failed collective means: asks all others where they are, for a few seconds."""
        heard = {self.rank: f"at step {step}"}
        # In a thread: where rank 0 holds the store and is stopped, a call may never return.
        asking = threading.Thread(target=self._call_roll, args=(heard,), daemon=True)
        asking.start()
        asking.join(ROLL_S + BEAT_S)
        return _told(dict(heard), self.world, self.rank, step, error)

    def _call_roll(self, heard: dict[int, str]) -> None:
        until = time.monotonic() + ROLL_S
        with suppress(RuntimeError):
            if not self.ended:
                self.ended = True
                self.store.set(f"at/{self.rank}", heard[self.rank])
        for rank in set(range(self.world)) - {self.rank}:
            left = timedelta(seconds=max(until - time.monotonic(), 0.01))
            with suppress(RuntimeError):
                self.store.wait([f"at/{rank}"], left)
                heard[rank] = self.store.get(f"at/{rank}").decode()

    def linger(self) -> None:
        """Rank 0, which may hold the store, lets the others read there why it ends."""
        others, limit = [f"at/{rank}" for rank in range(1, self.world)], timedelta(seconds=ROLL_S)
        if self.rank == 0:
            with suppress(RuntimeError):
                self.store.wait(others, limit)
                time.sleep(BEAT_S / 4)  # they have asked, and read next

    def beat(self, done: threading.Event) -> None:
        """Show that this process lives, until it is done."""
        while not done.wait(BEAT_S):
            with suppress(RuntimeError):
                self.store.add("beats", 1)

    def wait_for_first(self, key: str) -> None:
        """Until rank 0 sets `key`; raises RuntimeError when it ends or its heart stands still."""
        beats, since = -1, time.monotonic()
        while time.monotonic() - since < self.timeout_s:
            with suppress(td.DistStoreError):  # not yet
                self.store.wait([key], timedelta(seconds=BEAT_S))
                return
            if self.store.check(["at/0"]):
                raise RuntimeError("the connection to rank 0 has ended")
            if (now := self.store.add("beats", 0)) != beats:
                beats, since = now, time.monotonic()
        raise RuntimeError(f"timed out after {self.timeout_s:.0f} s without a sign of rank 0")


_peers: list[Peers] = []


@contextmanager
def joined(backend: str, timeout_s: float, gpu: torch.device | None) -> Iterator[None]:
    """Join the group that torchrun announces, and leave it at the end."""
    peers = Peers(backend, timeout_s, gpu)
    _peers.append(peers)
    try:
        with named(lambda: 0):
            yield
        peers.say_end("it was done")
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # their DistributedDataParallel holds the group
        td.destroy_process_group()  # now the others meet that
        peers.linger()
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
        ClsaError: 74, or 75 where it was asked to stop, when another process is lost.
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
        _peers[-1].say_end(f"{type(error).__name__}: {first_line(error)}")
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


def _told(
    heard: dict[int, str], world: int, own: int, step: int, error: BaseException
) -> ClsaError:
    silent = [str(rank) for rank in range(world) if rank not in heard]
    ended = {rank: text for rank, text in heard.items() if text.startswith("ended: ")}
    hint = "the same command resumes it"
    if ended:
        rank, text = next(iter(ended.items()))
        why = text.removeprefix("ended: ")
        if why.startswith("Asked"):
            why = f"rank {rank} was stopped by a signal ({why.partition(': ')[2]})"
            return ClsaError(f"stopped at step {step}", why, hint, Exit.PREEMPTED)
        return ClsaError(f"lost rank {rank} at step {step}", f"it ended ({why})", hint, Exit.IO)
    if silent:
        what = f"lost rank {', '.join(silent)} of {world} at step {step}"
        why = f"killed, stopped or without network; rank {own} met: {_short(error)}"
        return ClsaError(what, why, hint, Exit.IO)
    places = ", ".join(f"rank {rank} {text}" for rank, text in heard.items())
    why = f"they do not make the same calls ({places}); rank {own} met: {_short(error)}"
    return ClsaError(f"the {world} processes parted at step {step}", why, hint, Exit.IO)


def _short(error: BaseException) -> str:
    """What a library says, without the place in its own source."""
    return re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". ")[0][:120]
