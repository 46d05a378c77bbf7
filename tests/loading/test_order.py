"""Order of the pictures, replacements of unreadable ones, and how ranks agree on them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as td
from torch.multiprocessing.spawn import spawn

from clsa.loading.order import Order, candidates
from clsa.options.run import DataOptions
from clsa.pictures import decode, shards, sources
from clsa.pictures.opening import open_source
from clsa.pictures.quarantine import REASONS, Quarantine
from clsa.pictures.sources import Folder
from clsa.system import dist
from clsa.system.errors import ClsaError, Exit
from tests.support.pictures import jpeg_folder


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


def test_every_raised_reason_is_listed() -> None:
    text = "".join(
        Path(str(module.__file__)).read_text("utf-8") for module in (decode, sources, shards)
    )
    raised = set(re.findall(r"DecodeError\(\s*\"([a-z-]+)\"", text))
    assert raised == set(REASONS) and len(set(REASONS)) == len(REASONS)


def test_a_later_start_retries_unreadable_pictures(tmp_path: Path) -> None:
    jpeg_folder(tmp_path, [(20, 20)] * 30)
    source = open_source(str(tmp_path), "train", DataOptions())
    broken = [tmp_path / source.ids[i] for i in range(11)]
    for path in broken:
        path.write_bytes(b"")
    earlier = Quarantine(source)
    earlier.add({7: "empty", 3: "empty"})
    assert list(earlier.by_id().items()) == [("03.jpg", "empty"), ("07.jpg", "empty")]
    later = Quarantine(source, {*earlier.by_id(), "gone.png", "20.jpg"})
    assert later.reasons == earlier.reasons
    with pytest.raises(ClsaError, match="11 unreadable") as caught:
        Quarantine(source, {path.name for path in broken})
    assert caught.value.code == Exit.BAD_DATA
    for path in broken[2:]:
        path.write_bytes((tmp_path / "20.jpg").read_bytes())
    mended = Quarantine(source, {path.name for path in broken})
    assert mended.reasons == {0: "empty", 1: "empty"}


def test_sharing_in_one_process_changes_nothing() -> None:
    quarantine = Quarantine(folder(30))
    quarantine.share()
    assert quarantine.reasons == {}
    found = dict(enumerate(REASONS))
    quarantine.add(found)
    quarantine.share()
    assert quarantine.reasons == found


def _share(rank: int, rendezvous: str, out: str) -> None:
    """One of two ranks: share twice; save the reasons after the first, the error of the second."""
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
