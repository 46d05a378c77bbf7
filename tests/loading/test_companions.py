"""Companions: pictures appended to each batch after those of the order; their rows and views."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clsa.loading.crops import Crops
from clsa.loading.loader import batches
from clsa.loading.order import Companions, Order, Rows
from clsa.options.run import DataOptions, ViewOptions, WeakViews
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Folder
from clsa.system import dist
from clsa.system.errors import ClsaError
from clsa.views.specs import weak_specs
from tests.support.pictures import jpeg_folder

CPU = torch.device("cpu")
SPECS = weak_specs(ViewOptions(size=24, weak=WeakViews(sizes=(16,))), keyed=True)
STREAMED, RESIDENT = DataOptions(resident_limit=1e-9, workers=0), DataOptions()


class Twins(Companions):
    """Appends the first pictures of the step again, each twice."""

    def __init__(self, count: int):
        self.count = count

    def rows(self, order: Order, step: int) -> Rows:
        index = np.repeat(order.indices(step)[: self.count // 2], 2)
        return Rows(index, order.count + step * self.count + np.arange(self.count))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = jpeg_folder(tmp_path_factory.mktemp("equal"), [(40, 48)] * 11)
    source = open_source(str(root), "train", RESIDENT)
    assert isinstance(source, Folder)
    source.labels, source.classes = np.arange(11) % 3, ["a", "b", "c"]
    return source


def collect(
    source: Folder, options: DataOptions, companions: Companions | None, steps: int = 3
) -> list[Crops]:
    order = Order(len(source), 4, seed=3)
    return list(
        batches(source, SPECS, order, 0, steps, CPU, options, companions=companions)
    )  # fmt: skip


def test_companions_follow_the_pictures_of_the_order(photographs: Folder) -> None:
    order = Order(len(photographs), 4, seed=3)
    plain = collect(photographs, STREAMED, None)
    for step, (batch, alone) in enumerate(
        zip(collect(photographs, STREAMED, Twins(6)), plain, strict=True)
    ):
        first = order.indices(step)
        assert batch.index.tolist() == [*first, *np.repeat(first[:3], 2)]
        assert batch.drawn.tolist() == [*first, *range(11 + 6 * step, 17 + 6 * step)]
        assert batch.labels.tolist() == (batch.index % 3).tolist()
        for crops, before in zip(batch.crops, alone.crops, strict=True):
            assert torch.equal(crops[:4], before)  # companions do not change the others
            assert not torch.equal(crops[4], crops[5])  # two crops of one picture


def test_a_resident_set_gives_the_same_batches(photographs: Folder) -> None:
    streamed, resident = (
        collect(photographs, options, Twins(4)) for options in (STREAMED, RESIDENT)
    )
    for a, b in zip(streamed, resident, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.drawn, b.drawn)
        assert torch.equal(a.labels, b.labels)
        for x, y in zip(a.crops, b.crops, strict=True):
            assert (x.float() - y.round()).abs().max() <= 1


def test_each_process_takes_its_share_of_both(
    photographs: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = collect(photographs, STREAMED, Twins(6), steps=1)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shares += collect(photographs, STREAMED, Twins(6), steps=1)
    for name in ("index", "labels", "drawn"):
        numbers = [getattr(share, name) for share in shares]
        joined = torch.cat([*(part[:2] for part in numbers), *(part[2:] for part in numbers)])
        assert torch.equal(joined, getattr(whole, name))
    crops = [share.crops[0] for share in shares]
    joined = torch.cat([*(part[:2] for part in crops), *(part[2:] for part in crops)])
    assert torch.equal(joined, whole.crops[0])
    with pytest.raises(ClsaError, match="pictures added to each batch 5 - not divisible among 2"):
        collect(photographs, STREAMED, Twins(5))


def test_an_unreadable_companion_is_replaced(tmp_path: Path) -> None:
    root = jpeg_folder(tmp_path / "equal", [(40, 48)] * 11)
    source = open_source(str(root), "train", RESIDENT)
    order = Order(11, 4, seed=3)
    broken = int(order.indices(0)[0])
    (root / source.ids[broken]).write_bytes(b"")
    for options in (STREAMED, RESIDENT):
        (batch,) = batches(source, SPECS, order, 0, 1, CPU, options, companions=Twins(2))
        assert batch.index[4:].tolist() == [broken, broken]
        assert all(view.float().std() > 0 for view in batch.crops)
