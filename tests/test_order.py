"""Order of the pictures, what replaces unreadable ones, and how ranks agree on those."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as td
from torch.multiprocessing.spawn import spawn

from clsa import decode, dist, sources
from clsa.errors import ClsaError, Exit
from clsa.order import REASONS, Order, Quarantine, candidates
from clsa.sources import Folder


def folder(count: int) -> Folder:
    ids = [f"{i:04d}.png" for i in range(count)]
    return Folder("nowhere", ids, np.full(count, -1, np.int64), [])


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ClsaError, match="at most 11") as caught:
        Order(11, 12, seed=0)
    assert caught.value.code == Exit.USAGE


def test_replacements_are_spread_evenly() -> None:
    order = Order(50, 5, seed=1)
    first = []
    for epoch in range(40):
        for i in range(50):
            tried = list(candidates(order, epoch, i))
            assert tried[0] == i and len(tried) == 65 and set(tried) <= set(range(50))
            first.append(tried[1])
    counts = np.bincount(first, minlength=50)  # 2,000 draws: 40 of each expected
    assert ((counts - 40) ** 2 / 40).sum() < 90  # chi-squared, 49 degrees: 0.03 % point is 88
    assert (np.array(first) == np.tile((np.arange(50) + 1) % 50, 40)).mean() < 0.05


def test_every_reason_has_its_place() -> None:
    text = "".join(Path(str(module.__file__)).read_text("utf-8") for module in (decode, sources))
    raised = set(re.findall(r"DecodeError\(\s*\"([a-z-]+)\"", text))
    assert raised == set(REASONS) and len(set(REASONS)) == len(REASONS)


def test_a_later_start_knows_what_an_earlier_one_found() -> None:
    source = folder(30)
    earlier = Quarantine(source)
    earlier.add({7: "broken", 3: "empty"})
    assert list(earlier.by_id().items()) == [("0003.png", "empty"), ("0007.png", "broken")]
    later = Quarantine(source, {**earlier.by_id(), "gone.png": "empty", "0001.png": "bored"})
    assert later.reasons == earlier.reasons
    later.add({i: "empty" for i in range(10, 18)})
    with pytest.raises(ClsaError, match="11 unreadable"):
        later.add({18: "empty"})
    with pytest.raises(ClsaError, match="11 unreadable") as caught:
        Quarantine(source, later.by_id())
    assert caught.value.code == Exit.BAD_DATA


def test_sharing_with_nobody_changes_nothing() -> None:
    quarantine = Quarantine(folder(30))
    quarantine.share()
    assert quarantine.reasons == {}
    found = dict(enumerate(REASONS))
    quarantine.add(found)
    quarantine.share()
    assert quarantine.reasons == found


def _share(rank: int, rendezvous: str, out: str) -> None:
    """Of two ranks: share twice; save what is known after the first, and the second's error."""
    td.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    quarantine = Quarantine(folder(30))
    quarantine.add({rank: "empty", 5: ("truncated", "broken")[rank]})
    quarantine.share()
    known = dict(quarantine.reasons)
    quarantine.add({10 + 4 * rank + k: "empty" for k in range(4)})  # 7 here, 11 together
    try:
        quarantine.share()
    except ClsaError as error:
        torch.save((dist.rank(), known, str(error), int(error.code)), f"{out}/{rank}")
    td.destroy_process_group()


def test_processes_share_one_budget(tmp_path: Path) -> None:
    spawn(_share, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert (first[0], second[0]) == (0, 1)
    assert first[1:] == second[1:]
    assert first[1] == {0: "empty", 1: "empty", 5: "broken"}
    assert "11 unreadable pictures among 30" in first[2] and first[3] == Exit.BAD_DATA
