"""Batches: one order, the same crops on every path, replacements of unreadable pictures."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from clsa.loading import loader, streaming
from clsa.loading.crops import Crops, Cuts
from clsa.loading.loader import batches, eval_crops, eval_images
from clsa.loading.order import Order, candidates
from clsa.options.run import DataOptions, StrongOptions, ViewOptions, WeakViews
from clsa.pictures.opening import open_source
from clsa.pictures.quarantine import Quarantine
from clsa.pictures.sources import Folder, Pictures, Source
from clsa.system import dist, workers
from clsa.system.errors import ClsaError, Exit
from clsa.views.geometry import crop_one, reduction_for
from clsa.views.specs import ViewSpec, strong_specs, weak_specs
from clsa.views.transform import crop_params
from tests.support.pictures import encoded, jpeg_folder, photograph

CPU = torch.device("cpu")
VIEWS = ViewOptions(size=32, weak=WeakViews(sizes=(32,)))
SPECS = weak_specs(VIEWS, keyed=True) + strong_specs(VIEWS, StrongOptions(sizes=(16,)), 2)
STREAMED = DataOptions(resident_limit=1e-9, workers=0)
RESIDENT = DataOptions()


def collect(
    source: Source,
    first: int,
    last: int,
    options: DataOptions = STREAMED,
    batch_size: int = 4,
    quarantine: Quarantine | None = None,
) -> list[Crops]:
    order = Order(len(source), batch_size, seed=3)
    return list(batches(source, SPECS, order, first, last, CPU, options, quarantine))


def assert_equal(got: list[Crops], expected: list[Crops]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def assert_close(got: list[Crops], expected: list[Crops]) -> None:
    """Equal to 1/255: the uint8 path rounds after each of its two passes."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
        for x, y in zip(a.crops, b.crops, strict=True):
            assert x.shape == y.shape
            assert (x.round() - y.float()).abs().max() <= 1
            assert (x - y.float()).abs().mean() < 0.35


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Eleven JPEGs of four sizes."""
    sizes = [(60, 80), (80, 60), (50, 50), (33, 120)]
    root = jpeg_folder(tmp_path_factory.mktemp("photographs"), (sizes * 3)[:11])
    source = open_source(str(root), "train", RESIDENT)
    assert isinstance(source, Folder)
    source.labels = np.arange(11) % 3
    source.classes = ["a", "b", "c"]
    return source


@pytest.fixture
def equal_sized(tmp_path: Path) -> Path:
    return jpeg_folder(tmp_path / "equal", [(40, 48)] * 14)


# ---- order


def test_every_picture_appears_once_an_epoch(photographs: Folder) -> None:
    order = Order(11, 4, seed=3)
    assert order.steps_per_epoch == 2
    epochs = []
    for epoch in range(3):
        steps = [2 * epoch, 2 * epoch + 1]
        assert [order.epoch(step) for step in steps] == [epoch, epoch]
        epochs.append(np.concatenate([order.indices(step) for step in steps]))
        assert len(set(epochs[-1])) == 8 and set(epochs[-1]) <= set(range(11))
    assert not np.array_equal(epochs[0], epochs[1])
    whole = np.concatenate([Order(12, 4, seed=3).indices(step) for step in range(3)])
    assert sorted(whole) == list(range(12))
    served = torch.cat([batch.index for batch in collect(photographs, 2, 4)])
    assert served.tolist() == epochs[1].tolist()


# ---- paths


def test_batches_have_the_requested_views(photographs: Folder) -> None:
    (batch,) = collect(photographs, 0, 1)
    assert [tuple(view.shape) for view in batch.crops] == [(4, 3, s.size, s.size) for s in SPECS]
    assert all(view.dtype == torch.uint8 for view in batch.crops)
    assert batch.labels.tolist() == (batch.index % 3).tolist()
    assert batch.index.tolist() == Order(11, 4, seed=3).indices(0).tolist()


def test_crops_are_the_drawn_boxes(photographs: Folder) -> None:
    (batch,) = collect(photographs, 3, 4)
    for row, i in enumerate(batch.index.tolist()):
        picture = photographs.read(i)
        size = np.array([picture.shape[0]]), np.array([picture.shape[1]])
        for spec, view in zip(SPECS, batch.crops, strict=True):
            boxes, flips = crop_params(spec, 3, 1, np.array([i]), *size)
            top, left, height, width = boxes[0]
            cut = torch.from_numpy(picture[top : top + height, left : left + width].copy())
            small = torch.nn.functional.interpolate(
                cut.permute(2, 0, 1)[None].float(),
                (spec.size, spec.size),
                mode="bilinear",
                antialias=True,
            )[0]
            small = small.flip(2) if flips[0] else small
            assert (view[row].float() - small.round()).abs().max() <= 1


def test_reduced_pictures_give_the_same_crops(tmp_path: Path) -> None:
    folder = jpeg_folder(tmp_path, [(400, 600), (501, 333), (350, 350), (620, 410)])
    source = open_source(str(folder), "train", STREAMED)
    (batch,) = collect(source, 0, 1)
    reductions = []
    for row, i in enumerate(batch.index.tolist()):
        picture = source.open(i)
        pixels, full = picture.pixels(), (picture.height, picture.width)
        sides = [np.array([side]) for side in full]
        cuts = [crop_params(spec, 3, 0, np.array([i]), *sides) for spec in SPECS]
        reductions.append(reduction_for([boxes[0] for boxes, _ in cuts], [s.size for s in SPECS]))
        for spec, view, (boxes, flips) in zip(SPECS, batch.crops, cuts, strict=True):
            whole = crop_one(pixels, boxes[0], spec.size, bool(flips[0]), full)
            assert (view[row].float() - whole.float()).abs().mean() < 3
            shifted = whole.roll(2, 2)
            assert (view[row].float() - shifted.float()).abs().mean() > 3
    assert max(reductions) > 1


def test_workers_do_not_change_a_bit(photographs: Folder) -> None:
    expected = collect(photographs, 0, 6)
    for count in (1, 2):
        options = STREAMED.model_copy(update={"workers": count})
        assert_equal(collect(photographs, 0, 6, options), expected)


def test_resuming_gives_the_tail_of_an_uninterrupted_pass(photographs: Folder) -> None:
    whole = collect(photographs, 0, 6)
    for step in range(6):
        assert_equal(collect(photographs, step, 6), whole[step:])
    assert collect(photographs, 6, 6) == []


def test_resident_equals_streamed(equal_sized: Path) -> None:
    source = open_source(str(equal_sized), "train", RESIDENT)
    resident, streamed = collect(source, 0, 7, RESIDENT), collect(source, 0, 7)
    assert resident[0].crops[0].dtype == torch.float32
    assert streamed[0].crops[0].dtype == torch.uint8
    assert_close(resident, streamed)
    for step in (1, 3, 6):
        assert_equal(collect(source, step, 7, RESIDENT), resident[step:])
    images = np.stack([source.read(i) for i in range(len(source))])
    assert_equal(collect(Pictures(images, source.labels, []), 0, 7, RESIDENT), resident)
    assert_equal(collect(Pictures(images, source.labels, []), 0, 7), streamed)


def test_drawings_resident_equal_streamed() -> None:
    source = open_source("clipart", "train", DataOptions(num_images=60))
    assert_close(collect(source, 0, 5, RESIDENT, 16), collect(source, 0, 5, STREAMED, 16))


def test_resident_only_when_sizes_agree_and_fit(photographs: Folder, equal_sized: Path) -> None:
    assert collect(photographs, 0, 1, RESIDENT)[0].crops[0].dtype == torch.uint8
    source = open_source(str(equal_sized), "train", RESIDENT)
    need = 14 * 3 * 40 * 48 / 2**30
    just, short = (
        DataOptions(resident_limit=need),
        DataOptions(resident_limit=need * 0.99, workers=0),
    )
    assert collect(source, 0, 1, just)[0].crops[0].dtype == torch.float32
    assert collect(source, 0, 1, short)[0].crops[0].dtype == torch.uint8


def test_resident_size_makes_one_size_of_many(photographs: Folder) -> None:
    batch = collect(photographs, 0, 1, DataOptions(resident_size=24))[0]
    assert batch.crops[0].dtype == torch.float32
    squares = [images for _, images in eval_images(photographs, np.arange(11), 24, 1.0, CPU)]
    small = torch.cat(squares).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    expected = collect(Pictures(small, photographs.labels, []), 0, 1, RESIDENT)
    assert_equal([batch], expected)
    with pytest.raises(ClsaError, match="resident_limit") as caught:
        collect(photographs, 0, 1, DataOptions(resident_size=24, resident_limit=1e-6))
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize("options", [STREAMED, DataOptions(resident_size=24)])
def test_processes_share_a_batch_in_rank_order(
    photographs: Folder, options: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect(photographs, 0, 4, options)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shares.append(collect(photographs, 0, 4, options))
    joined = [
        Crops(
            [torch.cat(pair) for pair in zip(a.crops, b.crops, strict=True)],
            torch.cat([a.index, b.index]),
            torch.cat([a.labels, b.labels]),
            torch.cat([a.drawn, b.drawn]),
        )
        for a, b in zip(*shares, strict=True)
    ]
    if options.resident_size is None:
        assert_equal(joined, whole)
    else:  # matrix products of other batch sizes may round differently
        for got, expected in zip(joined, whole, strict=True):
            assert torch.equal(got.index, expected.index)
            for x, y in zip(got.crops, expected.crops, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-3)
    with pytest.raises(ClsaError, match="multiple of 2") as caught:
        collect(photographs, 0, 1, options, batch_size=5)
    assert caught.value.code == Exit.USAGE


def test_the_callers_random_state_is_left_alone(photographs: Folder) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(photographs, 0, 2, STREAMED.model_copy(update={"workers": 1}))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_ignore_the_signals_of_the_group(photographs: Folder) -> None:
    order = Order(len(photographs), 4, seed=3)
    options = STREAMED.model_copy(update={"workers": 1})
    before = children()
    running = batches(photographs, SPECS, order, 0, 40, CPU, options)
    got = [next(running)]
    started = children() - before
    assert started
    for worker in started:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker, number)
    got += list(running)
    assert_equal(got, collect(photographs, 0, 40))
    assert not children() & started


def children() -> set[int]:
    """Living processes whose parent is this one (Linux)."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(name))
    return found


def test_an_abandoned_pass_ends_its_workers(photographs: Folder) -> None:
    before = children()
    order = Order(len(photographs), 4, seed=3)
    options = STREAMED.model_copy(update={"workers": 2})
    running: Iterator[Crops] | None = batches(photographs, SPECS, order, 0, 999, CPU, options)
    assert running is not None
    next(running)
    assert len(children() - before) == 2
    running = None
    assert not children() - before


def test_a_killed_worker_gives_a_one_line_error(photographs: Folder) -> None:
    before = children()
    order = Order(len(photographs), 4, seed=3)
    options = STREAMED.model_copy(update={"workers": 1})
    running = batches(photographs, SPECS, order, 0, 9999, CPU, options)
    next(running)
    (worker,) = children() - before
    with pytest.raises(ClsaError, match="reading pictures failed") as caught:
        os.kill(worker, signal.SIGKILL)  # the handler may raise here, outside `batches`
        for _ in running:
            pass
    text = str(caught.value)
    assert caught.value.code == Exit.IO and "--workers" in text and "\n" not in text


def test_a_hanging_worker_gives_a_one_line_error(
    photographs: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "TIMEOUT_S", 1)
    monkeypatch.setattr(streaming._Steps, "_open_first", lambda *_: time.sleep(600))
    before, began = children(), time.monotonic()
    with pytest.raises(ClsaError, match=r"worker 0 .*no answer in 1 s") as caught:
        collect(photographs, 0, 2, STREAMED.model_copy(update={"workers": 1}))
    assert caught.value.code == Exit.IO
    assert time.monotonic() - began < 30 and children() <= before


def test_an_idle_worker_has_no_deadline(
    photographs: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "TIMEOUT_S", 1)
    order = Order(len(photographs), 4, seed=3)
    options = STREAMED.model_copy(update={"workers": 1})
    running = batches(photographs, SPECS, order, 0, 5, CPU, options)
    next(running)
    time.sleep(1.5)
    assert len(list(running)) == 4


def test_errors_from_elsewhere_are_not_blamed_on_workers() -> None:
    for error in (RuntimeError("CUDA out of memory"), ValueError("DataLoader")):
        with pytest.raises(type(error)), workers.failures():
            raise error
    text = "Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback\nMemoryError"
    workers.name_deaths()
    for error in (MemoryError(text), MemoryError()):
        with pytest.raises(ClsaError, match="- MemoryError -"), workers.failures():
            raise error
    second_report = partial(pytest.fail, "a second failure was reported")
    workers._on_death(second_report, lambda: "", signal.SIGCHLD, None)


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(1, 1, 1), (2, 1, 1), (6, 1, 5), (64, 1, 8), (64, 8, 7)]
)
def test_workers_are_the_share_of_the_cores_less_one(
    cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers.num_workers(None) == expected
    assert [workers.num_workers(given) for given in (0, 3, 12)] == [0, 3, 12]


def test_too_little_shared_memory_is_reported_before_the_first_step(photographs: Folder) -> None:
    huge = [ViewSpec("key", 2_000_000, (0.2, 1.0), 0)]
    order = Order(len(photographs), 4, seed=3)
    options = STREAMED.model_copy(update={"workers": 1})
    with pytest.raises(ClsaError, match="workers to 0") as caught:
        next(batches(photographs, huge, order, 0, 1, CPU, options))
    assert caught.value.code == Exit.USAGE


def test_large_pictures_are_cut_in_small_groups(
    photographs: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = collect(photographs, 0, 3)
    monkeypatch.setattr(streaming, "MAX_PENDING_BYTES", 20_000)
    assert_equal(collect(photographs, 0, 3), expected)


# ---- unreadable pictures


def spoil(root: Path, numbers: list[int]) -> None:
    for i in numbers:
        path = root / f"{i:02d}.jpg"
        path.write_bytes(path.read_bytes()[:200] if i % 2 else b"")


def test_bad_pictures_are_replaced_alike_on_every_path(equal_sized: Path) -> None:
    source = open_source(str(equal_sized), "train", RESIDENT)
    whole = collect(source, 0, 14, batch_size=7)
    source.labels = np.arange(14)
    spoil(equal_sized, [0, 3, 8])
    noted = [Quarantine(source) for _ in range(4)]
    streamed = collect(source, 0, 14, STREAMED, 7, noted[0])
    assert_equal(collect(source, 0, 14, STREAMED, 7, noted[1]), streamed)
    two = STREAMED.model_copy(update={"workers": 2})
    assert_equal(collect(source, 0, 14, two, 7, noted[2]), streamed)
    assert_equal(collect(source, 5, 14, STREAMED, 7), streamed[5:])
    resident = collect(source, 0, 14, RESIDENT, 7, noted[3])
    assert resident[0].crops[0].dtype == torch.float32
    assert_close(resident, streamed)
    for quarantine in noted:
        assert quarantine.reasons == {0: "empty", 3: "truncated", 8: "empty"}

    order, replaced = Order(14, 7, seed=3), 0
    for step, (before, after) in enumerate(zip(whole, streamed, strict=True)):
        assert torch.equal(before.index, after.index)
        for row, i in enumerate(after.index.tolist()):
            tried = candidates(order, order.epoch(step), i)
            assert after.labels[row] == next(k for k in tried if k not in (0, 3, 8))
            same = all(
                torch.equal(a[row], b[row]) for a, b in zip(before.crops, after.crops, strict=True)
            )
            assert same == (i not in (0, 3, 8))
            replaced += not same
    assert replaced == 3 * 7  # each bad picture once an epoch, for seven epochs


@pytest.mark.parametrize(
    "options", [STREAMED, RESIDENT, STREAMED.model_copy(update={"workers": 1})]
)
def test_too_many_bad_pictures_end_the_run(equal_sized: Path, options: DataOptions) -> None:
    spoil(equal_sized, list(range(11)))
    source = open_source(str(equal_sized), "train", RESIDENT)
    with pytest.raises(ClsaError, match=r"00\.jpg \(empty\), 01\.jpg \(truncated\)") as caught:
        collect(source, 0, 12, options)
    assert caught.value.code == Exit.BAD_DATA and "11 unreadable" in str(caught.value)


@pytest.mark.parametrize("options", [STREAMED, RESIDENT])
@pytest.mark.parametrize("bad", [list(range(14)), list(range(13))])
def test_some_bad_pictures_are_tolerated_but_not_a_set_of_only_bad_ones(
    equal_sized: Path, options: DataOptions, bad: list[int]
) -> None:
    spoil(equal_sized, bad)
    (equal_sized / "13.jpg").rename(equal_sized / "kept.jpg")
    for i in range(5, 13):
        (equal_sized / f"{i:02d}.jpg").unlink()
    source = open_source(str(equal_sized), "train", RESIDENT)  # 5 bad ones and kept.jpg
    if 13 in bad:
        with pytest.raises(ClsaError) as caught:
            collect(source, 0, 2, options, 3)
        assert caught.value.code == Exit.BAD_DATA
    else:
        got = collect(source, 0, 2, options, 3)
        assert all((batch.crops[0].float().std() > 1) for batch in got)


def test_a_picture_deleted_later_is_replaced(equal_sized: Path) -> None:
    source = open_source(str(equal_sized), "train", RESIDENT)
    (equal_sized / "05.jpg").unlink()
    quarantine = Quarantine(source)
    assert len(collect(source, 0, 6, STREAMED, 7, quarantine)) == 6
    assert quarantine.reasons == {5: "unreadable"}


# ---- evaluation


def test_evaluation_sees_centre_squares_in_order(equal_sized: Path) -> None:
    folder = open_source(str(equal_sized), "train", RESIDENT)
    images = np.stack([folder.read(i) for i in range(len(folder))])
    rows = np.array([5, 0, 13])
    ((got_rows, got),) = eval_images(folder, rows, 16, 0.875, CPU)
    ((memory_rows, memory),) = eval_images(
        Pictures(images, folder.labels, []), rows, 16, 0.875, CPU
    )
    assert got_rows.tolist() == memory_rows.tolist() == rows.tolist()
    centre = torch.from_numpy(images[rows, 2:37, 6:41]).permute(0, 3, 1, 2).float()  # 35 of 40 x 48
    expected = torch.nn.functional.interpolate(centre, (16, 16), mode="bilinear", antialias=True)
    assert got.dtype == memory.dtype == torch.float32
    assert (memory - expected).abs().max() < 0.01 and (got - expected.round()).abs().max() <= 1


def test_evaluation_leaves_unreadable_pictures_out(
    equal_sized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "EVAL_CHUNK", 4)
    spoil(equal_sized, [2, 12, 13])
    source = open_source(str(equal_sized), "train", RESIDENT)
    chunks = list(eval_images(source, np.arange(14), 16, 1.0, CPU))
    assert [len(rows) for rows, _ in chunks] == [4, 4, 3]
    assert all(len(rows) == len(images) for rows, images in chunks)
    rows = np.concatenate([rows for rows, _ in chunks])
    assert rows.tolist() == [0, 1, *range(3, 12)]


def test_evaluation_applies_the_given_cut_on_both_paths(equal_sized: Path) -> None:
    folder = open_source(str(equal_sized), "train", RESIDENT)
    images = np.stack([folder.read(i) for i in range(len(folder))])
    rows = np.array([5, 0, 13])

    def cut(index: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> Cuts:
        assert set(heights) == {40} and set(widths) == {48}
        boxes = np.stack([index, 2 * index, heights // 2, widths // 3], 1)
        return boxes, index % 2 == 1

    for source in (folder, Pictures(images, folder.labels, [])):
        ((kept, got),) = eval_crops(source, rows, 16, cut, CPU)
        assert kept.tolist() == rows.tolist()
        for i, crop in zip(rows, got, strict=True):
            part = torch.from_numpy(images[i, i : i + 20, 2 * i : 2 * i + 16].copy())
            expected = torch.nn.functional.interpolate(
                part.permute(2, 0, 1)[None].float(), (16, 16), mode="bilinear", antialias=True
            )[0]
            expected = expected.flip(2) if i % 2 else expected
            assert (crop.round() - expected.round()).abs().max() <= 1


def test_pictures_of_any_size_can_be_loaded(tmp_path: Path) -> None:
    """Pictures of 1 x 1, very narrow ones and large ones in one set."""
    shapes = [(1, 1), (1, 300), (300, 1), (700, 900)]
    for i, (height, width) in enumerate(shapes):
        (tmp_path / f"{i}.png").write_bytes(encoded(photograph(i, height, width)))
    batch = collect(open_source(str(tmp_path), "train", RESIDENT), 0, 1)[0]
    assert [len(view) for view in batch.crops] == [4, 4, 4]
