"""Packed sets as a source: the same crops as from the original folder; every kind of damage."""

import functools
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile
from PIL import Image

from clsa.loading import crops
from clsa.loading.loader import Crops, batches, eval_images
from clsa.loading.order import Order
from clsa.options.commands import PackOptions
from clsa.options.run import DataOptions, StrongOptions, ViewOptions, WeakViews
from clsa.pictures import shards
from clsa.pictures.decode import DecodeError
from clsa.pictures.opening import open_source, open_val
from clsa.pictures.pack import pack
from clsa.pictures.quarantine import Quarantine
from clsa.pictures.shards import INDEX, SHARD, Shards, shard_name
from clsa.pictures.sources import Source
from clsa.system.errors import ClsaError, Exit
from clsa.views.specs import strong_specs, weak_specs
from clsa.views.transform import crop_params
from tests.support.pictures import encoded, jpeg_folder, photograph
from tests.support.refusals import refusal

CPU = torch.device("cpu")
OPTIONS = DataOptions()
STREAMED = DataOptions(resident_limit=1e-9, workers=0)
VIEWS = ViewOptions(size=32, weak=WeakViews(sizes=(32,)))
SPECS = weak_specs(VIEWS, keyed=True) + strong_specs(VIEWS, StrongOptions(sizes=(16,)), 2)


def packed(data: Path, out: Path, **options: Any) -> Shards:
    pack(PackOptions(data=str(data), out=out, **{"workers": 0, **options}))
    source = open_source(str(out), "train", OPTIONS)
    assert isinstance(source, Shards)
    return source


def opening(root: Path) -> tuple[str, Exit]:
    return refusal(lambda: open_source(str(root), "train", OPTIONS))


def collect(source: Source, options: DataOptions, steps: int = 5) -> list[Crops]:
    order = Order(len(source), 4, seed=3)
    return list(batches(source, SPECS, order, 0, steps, CPU, options))


def assert_same(got: list[Crops], expected: list[Crops], most: float, mean: float) -> None:
    """Equal pictures and labels; pixels that differ by at most `most`, by `mean` on average."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
        for x, y in zip(a.crops, b.crops, strict=True):
            difference = (x.float().round() - y.float().round()).abs()
            assert difference.max() <= most and difference.mean() <= mean


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six small JPEGs of several sizes. Tests must not change them."""
    root = tmp_path_factory.mktemp("folder")
    for name in ("ant", "bee"):
        jpeg_folder(root / name, [(60, 80), (80, 60), (50, 50), (33, 120), (40, 40), (90, 41)])
    return root


@pytest.fixture(scope="module")
def kept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures, packed in three shards. Tests must not change them."""
    out = tmp_path_factory.mktemp("kept")
    packed(folder, out, shard_mb=0.015)
    assert len(list(out.glob("*.tar"))) == 3
    return out


# ---- the same crops as from the folder


def test_kept_pictures_give_the_batches_of_the_folder(folder: Path, kept: Path) -> None:
    plain, source = (open_source(str(root), "train", OPTIONS) for root in (folder, kept))
    expected = collect(plain, STREAMED)
    assert_same(collect(source, STREAMED), expected, 0, 0)
    assert_same(collect(source, STREAMED.model_copy(update={"workers": 2})), expected, 0, 0)
    resized = DataOptions(resident_size=32)
    assert_same(collect(source, resized), collect(plain, resized), 0, 0)


def test_resident_and_streamed_shards_give_the_same_batches(tmp_path: Path) -> None:
    plain = open_source(str(jpeg_folder(tmp_path / "in", [(40, 48)] * 9)), "train", OPTIONS)
    source = packed(tmp_path / "in", tmp_path / "out")
    resident = collect(source, OPTIONS)
    assert resident[0].crops[0].dtype == torch.float32
    assert_same(resident, collect(plain, OPTIONS), 0, 0)
    assert_same(resident, collect(source, STREAMED), 1, 0.35)


def test_resized_pictures_are_cut_where_the_originals_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(240, 320), (320, 240), (200, 200), (133, 480), (90, 100)]
    root = tmp_path / "in"
    root.mkdir()
    for i, (height, width) in enumerate(sizes):
        soft = Image.fromarray(photograph(i, height // 10, width // 10))
        soft = soft.resize((width, height), Image.Resampling.BICUBIC)
        (root / f"{i}.jpg").write_bytes(encoded(soft, "JPEG", quality=95))
    plain = open_source(str(root), "train", OPTIONS)
    source = packed(root, tmp_path / "out", size=100)
    assert [source.read(i).shape[:2] for i in (0, 3, 4)] == [(100, 133), (100, 361), (90, 100)]
    drawn: list[np.ndarray] = []

    def noting(*args: Any) -> Any:
        cuts = crop_params(*args)
        drawn.append(cuts[0])
        return cuts

    monkeypatch.setattr(crops, "crop_params", noting)
    batches, boxes = [], []
    for each in (source, plain):
        batches.append(collect(each, STREAMED))
        boxes.append(np.concatenate(drawn))
        drawn.clear()
    np.testing.assert_array_equal(*boxes)
    assert_same(*batches, most=30, mean=2.5)
    shifted = [
        batch._replace(crops=[view.roll(1, 3) for view in batch.crops]) for batch in batches[0]
    ]
    with pytest.raises(AssertionError):  # shifted by one pixel
        assert_same(shifted, batches[1], most=30, mean=2.5)
    whole = [next(eval_images(each, np.arange(5), 48, 0.875, CPU))[1] for each in (source, plain)]
    assert (whole[0] - whole[1]).abs().mean() < 3


def test_resized_pictures_of_one_size_are_streamed(tmp_path: Path) -> None:
    """In a resident set, boxes would be drawn on the size after packing."""
    source = packed(jpeg_folder(tmp_path / "in", [(120, 160)] * 5), tmp_path / "out", size=60)
    batches = collect(source, OPTIONS)
    assert batches[0].crops[0].dtype == torch.uint8
    assert_same(batches, collect(source, STREAMED), 0, 0)


def test_a_packed_picture_is_not_reduced_twice(tmp_path: Path) -> None:
    jpeg_folder(tmp_path / "in", [(640, 800), (80, 100)])
    source = packed(tmp_path / "in", tmp_path / "out", size=160)
    large, small = source.open(0), source.open(1)
    assert (large.height, large.width) == (640, 800)
    shapes = [large.pixels(reduction).shape[0] for reduction in (1, 2, 4, 8)]
    assert shapes == [160, 160, 160, 80]  # packed at 1/4: 1/8 of the original is 1/2 of it
    assert [small.pixels(reduction).shape[0] for reduction in (1, 2, 4, 8)] == [80, 40, 20, 10]


# ---- a source like any other


def test_subsets_classes_and_splits(folder: Path, kept: Path, tmp_path: Path) -> None:
    source = open_source(str(kept), "train", OPTIONS)
    part = source.subset(np.array([7, 2]))
    assert list(part.ids) == ["bee/01.jpg", "ant/02.jpg"] and part.labels.tolist() == [1, 0]
    for i, whole in enumerate((7, 2)):
        np.testing.assert_array_equal(part.read(i), source.read(whole))
    chosen = tmp_path / "classes.txt"
    chosen.write_text("bee\n")
    few = open_source(str(kept), "train", DataOptions(class_list=chosen, num_images=2))
    assert list(few.ids) == ["bee/00.jpg", "bee/01.jpg"] and few.labels.tolist() == [0, 0]
    val = open_val(DataOptions(data=str(folder), val=str(kept)), ["bee", "cow"])
    assert val is not None and val.labels.tolist() == [-1] * 6 + [0] * 6


def test_names_keep_their_bytes(tmp_path: Path) -> None:
    root = tmp_path / "in"
    jpeg_folder(root, [(20, 20)] * 2)
    (root / "00.jpg").rename(root / b"caf\xe9.jpg".decode("utf-8", "surrogateescape"))
    (root / "01.jpg").rename(root / "new\nline.jpg")
    source = packed(root, tmp_path / "out")
    assert list(source.ids) == list(open_source(str(root), "train", OPTIONS).ids)
    assert len(source.digest()) == 64


def test_the_digest_sees_names_labels_and_bytes(folder: Path, kept: Path, tmp_path: Path) -> None:
    source = open_source(str(kept), "train", OPTIONS)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in kept.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    digests = {source.digest(), open_source(str(moved), "train", OPTIONS).digest()}
    assert len(digests) == 1
    digests.add(packed(folder, tmp_path / "smaller", size=20).digest())
    digests.add(packed(folder, tmp_path / "one", shard_mb=1.0).digest())
    digests.add(source.subset(np.arange(5)).digest())
    digests.add(source.with_classes(["bee"]).digest())
    assert len(digests) == 5
    for name, image in (("black", np.zeros((8, 8, 3))), ("white", np.full((8, 8, 3), 255))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.bmp").write_bytes(encoded(image.astype(np.uint8), "BMP"))
        digests.add(packed(tmp_path / name, tmp_path / f"{name}-packed").digest())
    assert len(digests) == 7


def test_a_packed_set_can_be_sent_to_a_spawned_worker(kept: Path) -> None:
    source = open_source(str(kept), "train", OPTIONS)
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(11), source.read(11))


def test_few_shards_are_open_at_a_time(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    closed: list[int] = []

    class Counted(shards._File):
        def __init__(self, path: str):
            opened.append(path)
            super().__init__(path)

        def __del__(self) -> None:
            closed.append(self.descriptor)
            super().__del__()

    monkeypatch.setattr(shards, "_File", Counted)
    again = functools.lru_cache(maxsize=2)(shards._opened.__wrapped__)
    monkeypatch.setattr(shards, "_opened", again)
    source = open_source(str(kept), "train", OPTIONS)
    assert isinstance(source, Shards) and not opened  # shards open lazily
    for i in [*range(12), *range(12)]:
        source.read(i)
    assert len(opened) == 6 and len(closed) == 4


# ---- damage


def copy_of(kept: Path, out: Path) -> Path:
    out.mkdir()
    for path in kept.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def test_damaged_shards_are_found_before_anything_runs(kept: Path, tmp_path: Path) -> None:
    root = copy_of(kept, tmp_path / "set")
    shard = root / shard_name(1)
    whole = shard.read_bytes()
    for data, told in ((whole[:-1], "damaged"), (whole + b"\0", "damaged"), (None, "missing")):
        shard.unlink()
        if data is not None:
            shard.write_bytes(data)
        text, code = opening(root)
        assert code == Exit.BAD_DATA and f"{shard_name(1)} - {told}" in text
    shard.mkdir()
    assert opening(root)[1] == Exit.BAD_DATA
    shard.rmdir()
    shard.write_bytes(whole)
    assert len(open_source(str(root), "train", OPTIONS)) == 12


def test_a_shard_damaged_later_loses_only_its_own_pictures(kept: Path, tmp_path: Path) -> None:
    root = copy_of(kept, tmp_path / "set")
    source = open_source(str(root), "train", OPTIONS)
    assert isinstance(source, Shards)
    lost = np.flatnonzero(source.places[:, SHARD] == 1)
    (root / shard_name(1)).unlink()
    cut = np.flatnonzero(source.places[:, SHARD] == 2)
    (root / shard_name(2)).write_bytes(b"short")
    quarantine = Quarantine(source, [source.ids[i] for i in (*lost[:2], *cut[:2], 0)])
    assert quarantine.reasons == dict.fromkeys(
        [*lost[:2].tolist(), *cut[:2].tolist()], "unreadable"
    )
    with pytest.raises(DecodeError, match="ends before the picture"):
        source.read(int(cut[0]))


def arrays_of(root: Path) -> dict[str, np.ndarray]:
    with open(root / INDEX, "rb") as file, NpzFile(file, allow_pickle=False) as members:
        return {name: members[name] for name in members}


def changed_meta(arrays: dict[str, np.ndarray], **changes: Any) -> np.ndarray:
    meta = {**json.loads(arrays["clsa_pack"].tobytes()), **changes}
    meta = {name: value for name, value in meta.items() if value is not ...}
    return np.frombuffer(json.dumps(meta).encode(), np.uint8)


def test_an_index_of_another_version(kept: Path, tmp_path: Path) -> None:
    root = copy_of(kept, tmp_path / "set")
    arrays = arrays_of(root)
    arrays["clsa_pack"] = changed_meta(arrays, version=2)
    np.savez(root / INDEX, allow_pickle=False, **arrays)
    text, code = opening(root)
    assert code == Exit.BAD_DATA and "format 2, this clsa reads format 1" in text


def wrong_indices(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Invalid indices, each named by what is wrong with it."""
    meta = functools.partial(changed_meta, arrays)
    places = arrays["places"]

    def placed(row: int, column: int, value: int) -> dict[str, np.ndarray]:
        changed = places.copy()
        changed[row, column] = value
        return {"places": changed}

    huge = np.iinfo(np.int64).max
    return {
        "no places": {"places": None},
        "no labels": {"labels": None},
        "no names": {"ids": None},
        "float places": {"places": places.astype(np.float64)},
        "short places": {"places": places[:-1]},
        "narrow places": {"places": places[:, :4]},
        "scalar labels": {"labels": np.int64(3)},
        "small labels": {"labels": arrays["labels"].astype(np.int32)},
        "text labels": {"labels": arrays["labels"].astype(str)},
        "a label too high": {"labels": arrays["labels"] + 1},
        "a label too low": {"labels": arrays["labels"] - 2},
        "names cut": {"ids": arrays["ids"][:40]},
        "names of another kind": {"ids": arrays["ids"].astype(np.int64)},
        "names with a zero more": {"ids": np.append(arrays["ids"], np.uint8(0))},
        "shard -1": placed(0, 0, -1),
        "shard 3": placed(0, 0, 3),
        "offset -1": placed(3, 1, -1),
        "offset huge": placed(3, 1, huge),
        "length huge": placed(11, 2, huge),
        "length -1": placed(11, 2, -1),
        "length past the end": placed(11, 2, 1 << 20),
        "height 0": placed(5, 3, 0),
        "width -5": placed(5, 4, -5),
        "width huge": placed(5, 4, huge),
        "meta a list": {"clsa_pack": np.frombuffer(b"[1]", np.uint8)},
        "meta no JSON": {"clsa_pack": np.frombuffer(b"{", np.uint8)},
        "meta no UTF-8": {"clsa_pack": np.frombuffer(b"\xff\xfe\xff", np.uint8)},
        "meta nested": {"clsa_pack": np.frombuffer(b"[" * 100_000, np.uint8)},
        "no version": {"clsa_pack": meta(version=...)},
        "no classes": {"clsa_pack": meta(classes=...)},
        "classes a number": {"clsa_pack": meta(classes=7)},
        "shards a number": {"clsa_pack": meta(shards=7)},
        "shards of numbers": {"clsa_pack": meta(shards=[7, 7, 7])},
        "a size that is text": {"clsa_pack": meta(shards=[{"size": "x", "sha256": "y"}] * 3)},
        "a size beyond int64": {"clsa_pack": meta(shards=[{"size": 1 << 70, "sha256": ""}] * 3)},
        "sizes infinite": {"clsa_pack": meta(shards=[{"size": float("inf"), "sha256": ""}] * 3)},
        "objects": {"labels": np.array([None] * 12, dtype=object)},
    }


def test_hostile_indices_are_refused(kept: Path, tmp_path: Path) -> None:
    root = copy_of(kept, tmp_path / "set")
    arrays = arrays_of(root)
    for name, changes in wrong_indices(arrays).items():
        wrong = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
        np.savez(root / INDEX, **wrong)
        text, code = opening(root)
        assert code == Exit.BAD_DATA and "index.npz - damaged (" in text, name
    np.savez_compressed(root / INDEX, allow_pickle=False, **arrays, more=np.zeros(1 << 24))
    text, code = opening(root)  # 128 MB in a few kB
    assert code == Exit.BAD_DATA and "larger than the file" in text
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        huge, {"descr": "<i8", "fortran_order": False, "shape": (1 << 50, 5)}
    )
    np.savez(root / INDEX, allow_pickle=False, **arrays)
    with zipfile.ZipFile(root / INDEX) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(root / INDEX, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, huge.getvalue() if name == "places.npy" else data)
    assert opening(root)[1] == Exit.BAD_DATA


def test_a_damaged_index_gives_one_error_line_or_a_readable_set(kept: Path, tmp_path: Path) -> None:
    root = copy_of(kept, tmp_path / "set")
    whole = (root / INDEX).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(300):
        data = bytearray(whole)
        if trial % 3:
            for place in rng.integers(0, len(data), 1 + trial % 5):
                data[place] ^= int(rng.integers(1, 256))
        else:
            del data[int(rng.integers(0, len(data))) :]
        (root / INDEX).write_bytes(data)
        try:
            source = open_source(str(root), "train", OPTIONS)
        except ClsaError as error:
            assert error.code in (Exit.BAD_DATA, Exit.NO_INPUT) and "\n" not in str(error)
            refused += 1
            continue
        for i in range(len(source)):
            source.read(i)
    assert refused > 200


def test_an_index_of_another_program_is_ignored(tmp_path: Path) -> None:
    root = jpeg_folder(tmp_path / "set", [(20, 20)] * 3)
    np.savez(root / INDEX, images=np.zeros((2, 4, 4, 3), np.uint8))
    source = open_source(str(root), "train", OPTIONS)
    assert list(source.ids) == ["00.jpg", "01.jpg", "02.jpg"] and not isinstance(source, Shards)


def test_an_index_without_read_permission(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may read every file
    text, code = opening(kept)
    assert "Permission denied" in text and code == Exit.NO_INPUT
