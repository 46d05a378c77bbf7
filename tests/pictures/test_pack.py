"""`clsa pack`: contents of the shards, other programs that read them, interruptions, refusals."""

import errno
import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clsa.loading.loader import batches
from clsa.loading.order import Order
from clsa.options.commands import PackOptions
from clsa.options.run import DataOptions, StrongOptions, ViewOptions, WeakViews
from clsa.pictures import pack as packing
from clsa.pictures.decode import DecodeError, decode
from clsa.pictures.named_sets import Split
from clsa.pictures.opening import open_source
from clsa.pictures.pack import Packed, pack
from clsa.system import lock
from clsa.system.errors import Exit
from clsa.views.specs import strong_specs, weak_specs
from tests.support.pictures import encoded, jpeg_folder, photograph
from tests.support.refusals import refusal

OPTIONS = DataOptions()
SIZE = 40


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


KEPT = {
    "a/gray.webp": encoded(Image.fromarray(photograph(1, 30, 44)[..., 0]), "WEBP", lossless=True),
    "a/small.jpg": encoded(photograph(2, SIZE, 60), "JPEG", quality=90),
    "a/turned.jpg": encoded(photograph(3, 24, 50), "JPEG", exif=turned(6)),
    "b/small.png": encoded(photograph(4, 20, 24)),
    "b/palette.gif": encoded(Image.fromarray(photograph(5, 33, 20)).quantize(64), "GIF"),
    "b/wide.bmp": encoded(photograph(6, 12, 90), "BMP"),
    "b/wrong-name.jpg": encoded(photograph(7, 25, 25), "TIFF"),
}
RESIZED = {
    "a/large.jpg": encoded(photograph(8, 150, 201), "JPEG", quality=92),
    "a/one-more.png": encoded(photograph(9, SIZE + 1, 300)),
    "b/huge.jpg": encoded(photograph(10, 700, 330), "JPEG", quality=92),
    "b/turned-large.jpg": encoded(photograph(11, 90, 160), "JPEG", quality=92, exif=turned(8)),
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two classes and a loose picture; some small, some large, in every format."""
    root = tmp_path / "mixed"
    for name, data in {**KEPT, **RESIZED, "loose.png": KEPT["b/small.png"]}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Twelve JPEGs; a shard of `TINY_SHARDS` MB holds a few of them."""
    return jpeg_folder(tmp_path / "many", [(50, 64), (64, 50), (30, 30)] * 4)


TINY_SHARDS = 0.008


def packed(data: object, out: Path, **options: Any) -> Packed:
    return pack(PackOptions(data=str(data), out=out, **{"size": SIZE, "workers": 0, **options}))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- contents of the shards


def test_small_pictures_keep_their_bytes_and_large_ones_are_resized(
    mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "packed"
    result = packed(mixed, out)
    assert result[:2] == (12, 1) and result.left_out == 0 and result.fresh
    assert result.num_bytes == (out / "shard-000000.tar").stat().st_size
    source, plain = (open_source(str(root), "train", OPTIONS) for root in (out, mixed))
    assert list(source.ids) == list(plain.ids) and source.classes == plain.classes == ["a", "b"]
    assert source.labels.tolist() == plain.labels.tolist() and -1 in source.labels
    for i, name in enumerate(source.ids):
        before, after = plain.read(i), source.read(i)
        picture = source.open(i)
        assert (picture.height, picture.width) == before.shape[:2]
        data = source.encoded(i)
        assert data is not None
        if name not in RESIZED:
            assert data == (mixed / name).read_bytes()
            np.testing.assert_array_equal(after, before)
            continue
        with Image.open(io.BytesIO(RESIZED[name])) as image:
            upright = ImageOps.exif_transpose(image)
            scale = SIZE / min(upright.size)
            sides = (round(upright.width * scale), round(upright.height * scale))
            reference = np.asarray(upright.resize(sides, Image.Resampling.LANCZOS), np.float64)
        assert min(after.shape[:2]) == SIZE and after.shape == reference.shape
        assert np.abs(after - reference).mean() < 4  # grain: JPEG halves the resolution of chroma
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG" and 0x0112 not in image.getexif()


def test_large_photographs_are_decoded_reduced_yet_at_twice_the_size(tmp_path: Path) -> None:
    smooth = Image.fromarray(photograph(1, 60, 80)).resize((1600, 1200), Image.Resampling.BICUBIC)
    jpeg_folder(tmp_path / "in", [(10, 10)])
    (tmp_path / "in" / "large.jpg").write_bytes(encoded(smooth, "JPEG", quality=95))
    plain = open_source(str(tmp_path / "in"), "train", OPTIONS)
    asked: list[int] = []
    opened = packing.open_picture

    def noting(*given: Any) -> Any:
        picture = opened(*given)
        decoder = picture.decode
        object.__setattr__(picture, "decode", lambda r: asked.append(r) or decoder(r))
        return picture

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "open_picture", noting)
        for size in (75, 76, 150, 151, 300, 301, 1199):
            result = packing._encode(plain, 1, size, 95)
            assert (result.height, result.width) == (1200, 1600)
            got = decode(result.data)
            assert got.shape == (size, round(1600 * size / 1200), 3)
            reference = np.asarray(smooth.resize(got.shape[1::-1], Image.Resampling.LANCZOS))
            assert np.abs(got - reference.astype(np.float64)).mean() < 2
    assert asked == [8, 4, 4, 2, 2, 1, 1]


def test_quality_applies_to_the_jpegs(tmp_path: Path) -> None:
    plain = open_source(str(jpeg_folder(tmp_path, [(300, 300)])), "train", OPTIONS)
    sizes = [len(packing._encode(plain, 0, 100, quality).data) for quality in (30, 92, 100)]
    assert sizes[0] * 2 < sizes[1] < sizes[2]


def test_arrays_become_pngs(tmp_path: Path) -> None:
    images = np.stack([photograph(i, 16, 20) for i in range(5)])
    np.savez(tmp_path / "set.npz", images=images, labels=np.array(["x", "y", "x", "y", "x"]))
    packed(tmp_path / "set.npz", tmp_path / "out")
    source = open_source(str(tmp_path / "out"), "train", OPTIONS)
    assert source.classes == ["x", "y"] and source.labels.tolist() == [0, 1, 0, 1, 0]
    assert list(source.ids) == ["0", "1", "2", "3", "4"]
    for i, image in enumerate(images):
        np.testing.assert_array_equal(source.read(i), image)
        assert (source.encoded(i) or b"").startswith(b"\x89PNG")
    np.savez(tmp_path / "gray.npz", images=np.repeat(images[..., :1], 3, axis=1))
    packed(tmp_path / "gray.npz", tmp_path / "gray", size=16)
    source = open_source(str(tmp_path / "gray"), "train", OPTIONS)
    assert source.read(0).shape == (38, 16, 3)
    assert (source.open(0).height, source.open(0).width) == (48, 20)


def test_pictures_too_long_for_a_jpeg_become_pngs(tmp_path: Path) -> None:
    strip = np.zeros((9, 80_000, 3), np.uint8)
    strip[:, ::1000] = 255
    np.savez(tmp_path / "set.npz", images=strip[None])
    packed(tmp_path / "set.npz", tmp_path / "out", size=8)
    source = open_source(str(tmp_path / "out"), "train", OPTIONS)
    assert source.read(0).shape == (8, 71_111, 3) and source.open(0).width == 80_000


def test_tar_reads_the_shards(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    result = packed(mixed, out, shard_mb=0.01)
    source = open_source(str(out), "train", OPTIONS)
    shards = sorted(out.glob("*.tar"))
    assert len(shards) == result.shards > 2
    found: dict[str, bytes] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
                stream = tar.extractfile(member)
                assert stream is not None
                found[member.name] = stream.read()
    keys = list(dict.fromkeys(name.partition(".")[0] for name in found))
    assert keys == [f"{i:09d}" for i in range(12)]
    for i, key in enumerate(keys):
        pictures = [name for name in found if name.startswith(key) and not name.endswith("cls")]
        assert len(pictures) == 1 and found[pictures[0]] == source.encoded(i)
        label = found.get(f"{key}.cls")
        assert (-1 if label is None else int(label)) == source.labels[i]
    kinds = {Path(name).suffix for name in found}
    assert kinds == {".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".cls"}


def test_webdataset_reads_the_shards(mixed: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    out = tmp_path / "packed"
    packed(mixed, out, shard_mb=0.01)
    source, shards = open_source(str(out), "train", OPTIONS), sorted(out.glob("*.tar"))
    reader = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    compared = 0
    for i, sample in enumerate(reader.decode("rgb8")):
        assert sample["__key__"] == f"{i:09d}" and sample.get("cls", -1) == source.labels[i]
        pixels = sample.get("jpg", sample.get("png"))
        if pixels is not None and source.ids[i] != "a/turned.jpg":  # webdataset ignores EXIF
            np.testing.assert_array_equal(pixels, source.read(i))
            compared += 1
    assert i == 11 and compared == 7


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_byte(mixed: Path, tmp_path: Path, workers: int) -> None:
    packed(mixed, tmp_path / "alone", shard_mb=0.01)
    packed(mixed, tmp_path / "helped", shard_mb=0.01, workers=workers)
    assert contents(tmp_path / "helped") == contents(tmp_path / "alone")


def test_splits_are_packed_one_by_one(tmp_path: Path) -> None:
    root = tmp_path / "layout"
    for split, count in (("train", 3), ("val", 2)):
        for name in ("ant", "bee"):
            jpeg_folder(root / split / name, [(50, 60)] * count)
    for split in ("train", "val"):
        packed(root, tmp_path / "packed" / split, split=split)
    counts: dict[Split, int] = {"train": 6, "val": 4}
    for split, count in counts.items():
        source = open_source(str(tmp_path / "packed"), split, OPTIONS)
        assert len(source) == count and source.classes == ["ant", "bee"]


# ---- unreadable pictures


def test_unreadable_pictures_are_left_out_and_listed(many: Path, tmp_path: Path) -> None:
    whole = (many / "00.jpg").read_bytes()
    (many / "03.jpg").write_bytes(b"no picture")
    (many / "05.jpg").write_bytes(whole[: len(whole) // 2])
    (many / "08.jpg").write_bytes((many / "02.jpg").read_bytes()[:700])  # a small one
    (many / "11.jpg").write_bytes(b"")
    out = tmp_path / "packed"
    result = packed(many, out, shard_mb=TINY_SHARDS)
    assert (result.pictures, result.left_out) == (8, 4)
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert lines == [
        {"path": "03.jpg", "reason": "not-an-image"},
        {"path": "05.jpg", "reason": "truncated"},
        {"path": "08.jpg", "reason": "truncated"},
        {"path": "11.jpg", "reason": "empty"},
    ]
    source = open_source(str(out), "train", OPTIONS)
    assert source.ids == [f"{i:02d}.jpg" for i in range(12)]
    lost = (3, 5, 8, 11)
    for i in range(12):
        if i not in lost:
            assert source.read(i).shape[2] == 3
            continue
        with pytest.raises(DecodeError, match="empty"):
            source.open(i)
    names: list[str] = []
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            names += tar.getnames()
    assert names == [f"{i:09d}.jpg" for i in range(12) if i not in lost]


def test_gaps_are_replaced_like_unreadable_pictures(many: Path, tmp_path: Path) -> None:
    (many / "03.jpg").write_bytes(b"no picture")
    (many / "11.jpg").write_bytes(b"")
    packed(many, tmp_path / "out", size=64, shard_mb=TINY_SHARDS)
    views = ViewOptions(size=16, weak=WeakViews(sizes=(16,)))
    specs = weak_specs(views, keyed=True) + strong_specs(views, StrongOptions(sizes=(16,)), 2)
    streamed = DataOptions(resident_limit=1e-9, workers=0)
    shown = []
    for data in (many, tmp_path / "out"):
        source = open_source(str(data), "train", OPTIONS)
        order = Order(len(source), 4, seed=0)
        args = (source, specs, order, 0, 6, torch.device("cpu"), streamed)
        shown.append(list(batches(*args)))
    for ours, theirs in zip(*shown, strict=True):
        assert torch.equal(ours.index, theirs.index)
        for one, other in zip(ours.crops, theirs.crops, strict=True):
            assert torch.equal(one, other)


def test_too_many_unreadable_pictures_end_the_pack(tmp_path: Path) -> None:
    root = jpeg_folder(tmp_path / "in", [(20, 20)] * 14)
    for i in range(1, 12):
        (root / f"{i:02d}.jpg").write_bytes(b"")
    text, code = refusal(lambda: packed(root, tmp_path / "out"))
    assert code == Exit.BAD_DATA and "11 unreadable pictures among 14" in text
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 11
    assert (
        "not finished" in refusal(lambda: open_source(str(tmp_path / "out"), "train", OPTIONS))[0]
    )
    for i in range(1, 12):  # the same command again, once they are repaired
        (root / f"{i:02d}.jpg").write_bytes((root / "00.jpg").read_bytes())
    result = packed(root, tmp_path / "out")
    assert (result.pictures, result.left_out) == (14, 0)
    assert (tmp_path / "out" / "quarantine.jsonl").read_text() == ""


def test_every_broken_picture_is_named_at_once_and_a_higher_limit_finishes(tmp_path: Path) -> None:
    """12 of 40 are cut; a limit of 29 % of 40 is 11 (11.6 rounded down), one of 30 % is 12."""
    root = jpeg_folder(tmp_path / "in", [(20, 20)] * 40)
    broken = [f"{i:02d}.jpg" for i in (*range(0, 33, 3), 39)]
    for name in broken:
        (root / name).write_bytes((root / name).read_bytes()[:-40])
    out = tmp_path / "out"
    for limit in (None, "29%", 11):
        text, code = refusal(lambda limit=limit: packed(root, out, max_unreadable=limit))
        assert code == Exit.BAD_DATA and "12 unreadable pictures among 40" in text
        assert "--max-unreadable" in text and not (out / "index.npz").exists()
        lines = (out / "quarantine.jsonl").read_text().splitlines()
        assert [json.loads(line)["path"] for line in lines] == broken
    result = packed(root, out, max_unreadable="30%")
    assert (result.pictures, result.left_out) == (28, 12)


@pytest.mark.parametrize("limit", ["-1", "some", "1 percent", "%"])
def test_a_limit_is_a_number_or_a_share(limit: str) -> None:
    with pytest.raises(ValueError, match="40 or a share such as 1%"):
        DataOptions(max_unreadable=limit)


@pytest.mark.parametrize("side", [20, 200])  # the bytes are kept; a JPEG is made
def test_a_value_range_is_the_same_before_and_after_packing(tmp_path: Path, side: int) -> None:
    (tmp_path / "in").mkdir()
    flat = np.full((side, side), 819, np.uint16)
    (tmp_path / "in" / "a.png").write_bytes(encoded(Image.fromarray(flat), "PNG"))
    packed(tmp_path / "in", tmp_path / "out", value_range=(0, 4095), size=64)
    scaled = OPTIONS.model_copy(update={"value_range": (0.0, 4095.0)})
    for source in (
        open_source(str(tmp_path / "in"), "train", scaled),
        open_source(str(tmp_path / "out"), "train", OPTIONS).subset(np.arange(1)),
    ):
        assert np.abs(source.read(0).astype(int) - 51).max() <= 1  # 255 * 819 / 4095
    text, _ = refusal(lambda: packed(tmp_path / "in", tmp_path / "out", size=64))
    assert "value_range: [0.0, 4095.0] -> None" in text


def test_a_range_rises() -> None:
    with pytest.raises(ValueError, match="the lower value comes first"):
        DataOptions(value_range=(5, 5))


# ---- interruptions


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[None]:
    """Inside this context, picture number `at` interrupts the packing as Ctrl-C does."""
    encode = packing._encode

    def encode_until(source: Any, row: int, *options: int) -> Any:
        if row == at:
            raise KeyboardInterrupt
        return encode(source, row, *options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "_encode", encode_until)
        yield


def test_an_interrupted_pack_continues_after_its_finished_shards(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (many / "02.jpg").write_bytes(b"")
    packed(many, tmp_path / "whole", shard_mb=TINY_SHARDS)
    expected, out = contents(tmp_path / "whole"), tmp_path / "out"
    for at in (0, 1, 7, 11):
        with interrupted(monkeypatch, at):
            packed(many, out, shard_mb=TINY_SHARDS)
        text, code = refusal(lambda: open_source(str(out), "train", OPTIONS))
        assert "packing has not finished" in text and code == Exit.BAD_DATA
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(kept) == 2
    # What a killed process leaves: half a shard, a temporary file.
    (out / ".shard-000002.tar.tmp-1").write_bytes(b"half")
    last = max(kept)
    last.write_bytes(last.read_bytes()[:-1])
    other = packing._encode
    seen: list[int] = []
    monkeypatch.setattr(
        packing, "_encode", lambda s, row, *o: seen.append(row) or other(s, row, *o)
    )
    assert packed(many, out, shard_mb=TINY_SHARDS).left_out == 1
    assert contents(out) == expected
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept if path != last)
    assert min(seen) > 0 and seen == list(range(min(seen), 12))


def test_an_interruption_before_the_index_loses_nothing(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(many, tmp_path / "whole", shard_mb=TINY_SHARDS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(packing._Job, "_write_index", stop)
        packed(many, tmp_path / "out", shard_mb=TINY_SHARDS)
    monkeypatch.delattr(packing, "_encode")  # nothing is read again
    packed(many, tmp_path / "out", shard_mb=TINY_SHARDS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pictures_that_changed_since_are_packed_again(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with interrupted(monkeypatch, 11):
        packed(many, out, shard_mb=TINY_SHARDS)
    assert len(list(out.glob("*.tar"))) == 2
    for i in range(2, 12):
        (many / f"{i:02d}.jpg").unlink()
    packed(many, out, shard_mb=TINY_SHARDS)
    packed(many, tmp_path / "fresh", shard_mb=TINY_SHARDS)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_full_disk_is_reported_and_the_next_start_finishes(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        text, code = refusal(lambda: packed(many, tmp_path / "out"))
    assert code == Exit.IO and "No space left" in text
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert packed(many, tmp_path / "out").pictures == 12


# ---- folders that are in use or hold something else


def test_leftovers_of_a_killed_pack_are_removed(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".packing").mkdir(parents=True)
    left = (".packing/.pack.json.tmp-99999", ".shard-000001.tar.tmp-99999", ".index.npz.tmp-99999")
    packed(many, tmp_path / "whole")
    packed(many, out)  # writes pack.json again
    for name in left:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"half")
    (out / "index.npz").unlink()
    manifest = {"size": SIZE, "quality": 92, "shard_mb": 256.0, "data": str(many), "split": "train"}
    digest = open_source(str(many), "train", OPTIONS).digest()
    (out / ".packing" / "pack.json").write_text(json.dumps({**manifest, "pictures": digest}))
    packed(many, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_two_packs_do_not_write_one_folder(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WAIT_S", 0)
    with lock.only_writer(tmp_path / "out"):
        text, code = refusal(lambda: packed(many, tmp_path / "out"))
    assert "in use by pid" in text and code == Exit.USAGE
    packed(many, tmp_path / "out")


def test_the_same_pack_again_changes_nothing(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = packed(many, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = packed(many, out, workers=1)
    assert again == first._replace(fresh=False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    for change, told in (
        ({"size": 20}, "size: 40 -> 20"),
        ({"quality": 50}, "quality: 92 -> 50"),
        ({"shard_mb": 1.0}, "shard_mb: 256.0 -> 1.0"),
    ):
        text, code = refusal(lambda change=change: packed(many, out, **change))
        assert code == Exit.USAGE and f"holds another pack ({told})" in text
    (many / "00.jpg").unlink()
    assert "(other pictures)" in refusal(lambda: packed(many, out))[0]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps


def test_an_unfinished_pack_of_something_else_is_left_alone(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with interrupted(monkeypatch, 11):
        packed(many, out, shard_mb=TINY_SHARDS)
    before = contents(out)
    text, code = refusal(lambda: packed(many, out, shard_mb=TINY_SHARDS, size=20))
    assert code == Exit.USAGE and "holds an unfinished pack (size: 40 -> 20)" in text
    other = jpeg_folder(tmp_path / "other", [(20, 20)] * 2)
    text, code = refusal(lambda: packed(other, out, shard_mb=TINY_SHARDS))
    assert code == Exit.USAGE and "data: " in text
    assert contents(out) == before


def test_folders_with_other_files_are_refused(many: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays" / "index.npz", images=np.zeros((1, 2, 2), np.uint8))
    for name in ("notes", "arrays"):
        before = contents(tmp_path / name)
        text, code = refusal(lambda name=name: packed(many, tmp_path / name))
        assert code == Exit.USAGE and "neither empty nor a packed set" in text
        assert contents(tmp_path / name) == before
    assert refusal(lambda: packed(many, many))[1] == Exit.USAGE
    file = tmp_path / "file"
    file.write_text("")
    assert refusal(lambda: packed(many, file))[1] == Exit.CANNOT_WRITE
    assert refusal(lambda: packed(tmp_path / "nowhere", tmp_path / "x"))[1] == Exit.NO_INPUT
    assert not (tmp_path / "x").exists()


def test_a_packed_set_is_not_packed_again(many: Path, tmp_path: Path) -> None:
    packed(many, tmp_path / "once")
    text, code = refusal(lambda: packed(tmp_path / "once", tmp_path / "twice"))
    assert code == Exit.USAGE and "packed already" in text and not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("kind", "ending"),
    [("AVIF", "avif"), ("JPEG2000", "jp2"), ("TIFF", "tif"), ("PNG", "png"), ("WEBP", "webp")],
)
def test_members_end_as_the_format_of_their_bytes(kind: str, ending: str) -> None:
    data = encoded(photograph(0, 16, 16), kind)
    assert packing._ending(data) == ending and decode(data).shape == (16, 16, 3)
