"""Sources: what is listed, in which order, with which labels; and errors a user can act on."""

import gzip
import io
import os
import random
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from clsa.options.run import DataOptions
from clsa.pictures import listing
from clsa.pictures.decode import DecodeError
from clsa.pictures.named_sets import CLIPART
from clsa.pictures.opening import open_source, open_val
from clsa.pictures.sources import Folder, Pictures, Source
from clsa.system.errors import Exit
from tests.support.pictures import encoded, photograph
from tests.support.refusals import refusal

OPTIONS = DataOptions()
PICTURE = encoded(photograph(0, 9, 12))


def tree(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURE)
    return root


def opening(spec: object, options: DataOptions = OPTIONS) -> tuple[str, Exit]:
    return refusal(lambda: open_source(str(spec), "train", options))


# ---- folders


def test_subfolders_are_classes(tmp_path: Path) -> None:
    tree(tmp_path, ["dog/b.png", "dog/a.png", "cat/deep/er/x.png", "cat/z.PNG", "Emu/1.png"])
    source = open_source(str(tmp_path), "train", OPTIONS)
    assert source.ids == ["Emu/1.png", "cat/deep/er/x.png", "cat/z.PNG", "dog/a.png", "dog/b.png"]
    assert source.classes == ["Emu", "cat", "dog"]
    assert source.labels.tolist() == [0, 1, 1, 2, 2] and source.labels.dtype == np.int64
    np.testing.assert_array_equal(source.read(3), photograph(0, 9, 12))


@pytest.mark.parametrize(
    "names", [["b.png", "a.png"], ["one/b.png", "one/a.png"], ["one/b.png", "loose.png"]]
)
def test_folders_without_labels(tmp_path: Path, names: list[str]) -> None:
    source = open_source(str(tree(tmp_path, names)), "train", OPTIONS)
    assert source.ids == sorted(names)
    assert source.classes == [] and source.labels.tolist() == [-1] * len(names)


def test_loose_pictures_next_to_class_folders_are_unlabelled(tmp_path: Path) -> None:
    tree(tmp_path, ["x/a.png", "y/a.png", "loose.png", "z/none.txt"])
    source = open_source(str(tmp_path), "train", OPTIONS)
    assert source.ids == ["loose.png", "x/a.png", "y/a.png"]
    assert source.classes == ["x", "y"] and source.labels.tolist() == [-1, 0, 1]


def test_order_does_not_depend_on_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{folder}/{k}.png" for folder in ("é", "a", "Z", "a-b", "a.b") for k in range(5)]
    tree(tmp_path, names)
    expected = open_source(str(tmp_path), "train", OPTIONS)
    scan = os.scandir

    class Shuffled:
        def __init__(self, path: str):
            self.entries = list(scan(path))
            random.Random(7).shuffle(self.entries)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(listing.os, "scandir", Shuffled)
    got = open_source(str(tmp_path), "train", OPTIONS)
    assert got.ids == expected.ids and got.digest() == expected.digest()
    assert expected.classes == ["Z", "a", "a-b", "a.b", "é"]


def test_hidden_names_and_special_files_are_skipped_and_links_are_followed_once(
    tmp_path: Path,
) -> None:
    tree(tmp_path / "in", ["a/1.png", "b/1.png", "a/.hidden.png", ".git/x.png", "b/notes.txt"])
    tree(tmp_path / "out", ["c/1.png"])
    root = tmp_path / "in"
    os.mkfifo(root / "a" / "fifo.jpg")
    (root / "dir.jpg").mkdir()
    (root / "loop").symlink_to(root)
    (root / "away").symlink_to(tmp_path / "out")
    (root / "a" / "self.png").symlink_to(root / "a" / "self.png")
    (root / "a" / "dead.png").symlink_to(tmp_path / "nothing")
    (root / "a" / "link.png").symlink_to(root / "b" / "1.png")
    (root / "empty-class").mkdir()
    source = open_source(str(root), "train", OPTIONS)
    assert source.ids == ["a/1.png", "a/link.png", "away/c/1.png", "b/1.png"]
    assert source.classes == ["a", "away", "b"]
    told = "; ".join(source.taken)
    assert "links followed: away" in told and "anyway: loop" in told and ".txt 1" in told
    assert "hidden files and folders: 2" in told


def test_names_keep_their_bytes(tmp_path: Path) -> None:
    names = [b"-rf.png", b"caf\xe9.png", "café.png".encode(), "cafe\u0301.png".encode()]
    names += ["🦆.png".encode(), b"new\nline.png", b"n" * 251 + b".png"]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(PICTURE)
    source = open_source(str(tmp_path), "train", OPTIONS)
    assert [os.fsencode(name) for name in source.ids] == sorted(names)
    assert len(source.digest()) == 64
    for i in range(len(source)):
        assert source.read(i).shape == (9, 12, 3)


def test_a_fifo_or_a_lost_file_is_unreadable_not_a_hang(tmp_path: Path) -> None:
    tree(tmp_path, ["a.png", "b.png"])
    source = open_source(str(tmp_path), "train", OPTIONS)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    reasons: list[str] = []

    def read_both() -> None:
        for i in (0, 1):
            try:
                source.read(i)
            except DecodeError as error:
                reasons.append(error.reason)

    thread = threading.Thread(target=read_both, daemon=True)
    thread.start()
    thread.join(5)
    assert reasons == ["unreadable", "unreadable"]


def test_train_and_val_folders(tmp_path: Path) -> None:
    tree(
        tmp_path, ["train/a/1.png", "train/b/2.png", "train/c/2.png", "val/b/3.png", "val/x/4.png"]
    )
    options = DataOptions(data=str(tmp_path))
    train = open_source(str(tmp_path), "train", options)
    assert train.ids == ["a/1.png", "b/2.png", "c/2.png"]
    val = open_val(options, train.classes)
    assert val is not None and val.ids == ["b/3.png", "x/4.png"]
    assert val.classes == ["a", "b", "c"] and val.labels.tolist() == [1, -1]


def test_a_set_without_a_test_split_has_no_val(tmp_path: Path) -> None:
    tree(tmp_path, ["a/1.png", "b/1.png"])
    assert open_val(DataOptions(data=str(tmp_path)), ["a", "b"]) is None
    val = open_val(DataOptions(data="elsewhere", val=str(tmp_path)), ["b", "a"])
    assert val is not None and val.labels.tolist() == [1, 0]


def test_class_list_selects_and_orders(tmp_path: Path) -> None:
    tree(tmp_path, ["ant/1.png", "bee/1.png", "cow/1.png", "cow/2.png"])
    chosen = tmp_path / "classes.txt"
    chosen.write_text("cow\n\nant\n")
    options = DataOptions(class_list=chosen, num_images=2)
    source = open_source(str(tmp_path), "train", options)
    assert source.ids == ["ant/1.png", "cow/1.png"] and source.classes == ["cow", "ant"]
    assert source.labels.tolist() == [1, 0]
    assert len(open_source(str(tmp_path), "val", options)) == 3  # num_images is for training
    tree(tmp_path / "other", ["ant/1.png", "emu/1.png"])
    options = DataOptions(class_list=chosen, val=str(tmp_path / "other"))
    val = open_val(options, source.classes)
    assert val is not None and val.ids == ["ant/1.png"] and val.labels.tolist() == [1]
    chosen.write_text("cow\nbeee\n")
    text, code = opening(tmp_path, options)
    assert "did you mean bee?" in text and code == Exit.USAGE
    text, code = opening(tmp_path, DataOptions(class_list=tmp_path / "lost.txt"))
    assert "lost.txt" in text and code == Exit.NO_INPUT


def test_digest_sees_names_sizes_and_labels(tmp_path: Path) -> None:
    def digest() -> str:
        return open_source(str(tmp_path), "train", OPTIONS).digest()

    tree(tmp_path, ["a/1.png", "b/1.png"])
    seen = [digest()]
    assert digest() == seen[0]
    with open(tmp_path / "a" / "1.png", "ab") as file:
        file.write(b"\0")
    seen.append(digest())
    (tmp_path / "b" / "1.png").rename(tmp_path / "b" / "2.png")
    seen.append(digest())
    tree(tmp_path, ["b/3.png"])
    seen.append(digest())
    (tmp_path / "a").rename(tmp_path / "c")
    seen.append(digest())
    assert len(set(seen)) == len(seen)


# ---- lists and arrays


def test_lists(tmp_path: Path) -> None:
    tree(tmp_path, ["in/my photo.png", "in/b.png", "in/c 3.png"])
    listing = tmp_path / "list.txt"
    listing.write_text("in/my photo.png\tcat\nin/b.png dog\n\nin/c 3.png\n")
    source = open_source(str(listing), "train", OPTIONS)
    assert source.ids == ["in/my photo.png", "in/b.png", "in/c 3.png"]
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 1, -1]
    assert all(source.read(i).shape == (9, 12, 3) for i in range(3))
    listing.write_text("in/b.png 10\nin/c 3.png 9\nin/my photo.png -1\n")
    source = open_source(str(listing), "train", OPTIONS)
    assert source.classes == ["9", "10"] and source.labels.tolist() == [1, 0, -1]
    listing.write_text("in/b.png\n/nowhere/x.png\n")
    source = open_source(str(listing), "train", OPTIONS)
    assert source.classes == [] and source.labels.tolist() == [-1, -1]
    with pytest.raises(DecodeError, match="unreadable"):
        source.read(1)
    listing.write_text("\n")
    assert opening(listing)[1] == Exit.NO_INPUT


@pytest.mark.parametrize("key", ["images", "x", "arr_0"])
def test_npz(tmp_path: Path, key: str) -> None:
    path = tmp_path / "set.npz"
    images = np.stack([photograph(i, 8, 10) for i in range(4)])
    np.savez(path, allow_pickle=False, **{key: images}, y=np.array([5, 2, -1, 5]))
    source = open_source(str(path), "train", OPTIONS)
    assert source.classes == ["2", "5"] and source.labels.tolist() == [1, 0, -1, 1]
    assert source.ids == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(source.read(2), images[2])
    np.savez(
        path, allow_pickle=False, **{key: images[..., 0]}, labels=np.array(["b", "a", "b", "c"])
    )
    source = open_source(str(path), "train", OPTIONS)
    assert source.classes == ["a", "b", "c"] and source.labels.tolist() == [1, 0, 1, 2]
    np.testing.assert_array_equal(source.read(1), np.stack([images[1, ..., 0]] * 3, 2))
    part = source.subset(np.array([2, 1]))
    np.testing.assert_array_equal(part.read(1), source.read(1))
    assert isinstance(part, Pictures) and part.images.strides[-1] == 0  # not three copies
    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1
    first, second = Pictures(images, source.labels, []), Pictures(changed, source.labels, [])
    assert first.digest() == Pictures(images.copy(), source.labels, []).digest() != second.digest()


def test_wrong_npz(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    images = np.zeros((3, 4, 4, 3), np.uint8)
    wrong = [
        {"pictures": images},
        {"x": images.astype(np.float32) + 1.5},
        {"x": images.astype(np.float32) - 0.5},
        {"x": images.astype(np.int16)},
        {"x": images[0, 0]},
        {"x": np.zeros((3, 4, 4, 4), np.uint8)},
        {"x": np.array([images[0], None], dtype=object)},
        {"x": images, "y": np.zeros(2, int)},
        {"x": images, "y": np.zeros(3)},
    ]
    for arrays in wrong:
        np.savez(path, **arrays)
        assert opening(path)[1] == Exit.USAGE
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", b"no array")
    assert opening(path)[1] == Exit.USAGE
    np.savez(path, x=images)
    whole = path.read_bytes()
    spoilt = whole.replace(bytes(100), b"\1" * 100, 1)  # its checksum no longer matches
    for junk in (b"", b"junk", whole[:-40], spoilt):
        path.write_bytes(junk)
        text, code = opening(path)
        assert "damaged" in text and code == Exit.BAD_DATA
    marked = bytearray(whole)  # an unknown compression method; an encrypted member
    for place, value in ((whole.rindex(b"PK\1\2") + 10, 77), (whole.rindex(b"PK\1\2") + 8, 1)):
        marked[place] = value
        path.write_bytes(marked)
        text, code = opening(path)
        assert "damaged" in text and code == Exit.BAD_DATA
    np.save(path.with_suffix(".npy"), images)
    path.with_suffix(".npy").rename(path)
    assert opening(path)[1] == Exit.BAD_DATA


def test_an_npz_without_read_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, x=np.zeros((3, 4, 4, 3), np.uint8))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root may read every file
    text, code = opening(path)
    assert "Permission denied" in text and code == Exit.NO_INPUT


def test_sets_without_pictures(tmp_path: Path) -> None:
    tree(tmp_path / "tree", ["a/1.png", "b/1.png"])
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 4, 4, 3), np.uint8))
    (tmp_path / "list.txt").write_text("\n")
    (tmp_path / "empty").mkdir()
    for spec in ("none.npz", "list.txt", "empty"):
        text, code = opening(tmp_path / spec)
        assert f"{spec} - holds no pictures - " in text and code == Exit.NO_INPUT
        options = DataOptions(data=str(tmp_path / "tree"), val=str(tmp_path / spec))
        text, code = refusal(lambda options=options: open_val(options, ["a", "b"]))
        assert "holds no pictures" in text and code == Exit.NO_INPUT
    chosen = tmp_path / "classes.txt"
    chosen.write_text("\n")
    text, code = opening(tmp_path / "tree", DataOptions(class_list=chosen))
    assert "no pictures of the classes in" in text and code == Exit.NO_INPUT


# ---- what cannot be opened


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    text, code = opening("clipar")
    assert "did you mean clipart?" in text and code == Exit.NO_INPUT
    text, code = opening(tmp_path / "nowhere")
    assert "no such folder" in text and code == Exit.NO_INPUT
    (tmp_path / "notes.md").write_text("no picture")
    text, code = opening(tmp_path)
    assert ".webp" in text and code == Exit.NO_INPUT
    text, code = opening(tmp_path / "notes.md")
    assert ".npz" in text and code == Exit.USAGE
    tree(tmp_path, ["a.png"])
    text, code = opening(tmp_path / "a.png")
    assert "its folder" in text and code == Exit.USAGE
    assert opening("")[1] == Exit.USAGE
    assert opening("clipart:/x")[1] == Exit.USAGE
    assert opening("cifar10")[1] == Exit.USAGE
    assert opening(f"cifar10:{tmp_path / 'nowhere'}")[1] == Exit.NO_INPUT
    text, code = opening(f"stl10:{tmp_path}")
    assert "unlabeled_X.bin" in text and code == Exit.NO_INPUT
    text, code = opening(f"fashion-mnist:{tmp_path}")
    assert "train-images" in text and code == Exit.NO_INPUT
    assert opening(f"fashion-mnist:{tmp_path / 'nowhere'}")[1] == Exit.NO_INPUT


# ---- known sets


def halves(spec: str) -> tuple[Source, Source]:
    return open_source(spec, "train", OPTIONS), open_source(spec, "val", OPTIONS)


def test_clipart_is_embedded() -> None:
    with tarfile.open(CLIPART) as tar:
        assert len(tar.getmembers()) == 6504
    train, val = halves("clipart")
    assert isinstance(train, Pictures) and train.images.shape == (5837, 64, 64, 3)
    assert len(train.classes) == 28 and (train.labels >= 0).sum() == 1676 and len(val) == 667
    assert train.ids == sorted(train.ids) and val.classes == train.classes
    for source in (train, val):
        for name, label in zip(source.ids, source.labels, strict=True):
            folder = name.split("/")[-2]
            assert label == (-1 if folder == "unlabelled" else source.classes.index(folder))
    assert val.labels.min() >= 0


def write_idx(path: Path, values: np.ndarray) -> None:
    head = struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


def test_fashion_mnist(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored = {}
    for prefix, count in (("train", 6), ("t10k", 4)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
        stored[prefix] = images, labels
    both = zip(halves(f"fashion-mnist:{tmp_path}"), stored.values(), strict=True)
    for source, (images, labels) in both:
        assert source.labels.tolist() == labels.tolist() and source.classes[9] == "Ankle boot"
        for i, image in enumerate(images):
            np.testing.assert_array_equal(source.read(i), np.stack([image] * 3, 2))

    for packed in tmp_path.glob("t10k*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    val = open_source(f"fashion-mnist:{tmp_path}", "val", OPTIONS)
    assert val.labels.tolist() == stored["t10k"][1].tolist()
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    text, code = refusal(lambda: open_source(f"fashion-mnist:{tmp_path}", "val", OPTIONS))
    assert "t10k-labels-idx1-ubyte - No such file" in text and code == Exit.NO_INPUT

    path = tmp_path / "train-images-idx3-ubyte.gz"
    good = gzip.decompress(path.read_bytes())
    for bad in (good[:-1], good[:7], b"\0\0\x08\x01" + good[4:], b""):
        path.write_bytes(gzip.compress(bad))
        assert opening(f"fashion-mnist:{tmp_path}")[1] == Exit.BAD_DATA
    path.write_bytes(b"not gzip")
    assert opening(f"fashion-mnist:{tmp_path}")[1] == Exit.BAD_DATA
    write_idx(path, np.zeros((5, 28, 28), np.uint8))
    text, code = opening(f"fashion-mnist:{tmp_path}")
    assert "6 labels for 5" in text and code == Exit.BAD_DATA


def write_tar(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path


def planes(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) as CIFAR stores it: red plane, green plane, blue plane, rows first."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def test_cifar10(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    images = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 12, dtype=np.uint8)
    rows = np.concatenate([labels[:, None], planes(images)], 1)
    for k in range(5):
        (folder / f"data_batch_{k + 1}.bin").write_bytes(rows[2 * k : 2 * k + 2].tobytes())
    (folder / "test_batch.bin").write_bytes(rows[10:].tobytes())
    names = [f"class{k}" for k in range(10)]
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    tar = write_tar(tmp_path / "cifar-10-binary.tar.gz", folder)
    for path in (folder, tmp_path, tar):
        train, val = halves(f"cifar10:{path}")
        assert train.classes == names
        assert [*train.labels, *val.labels] == labels.tolist()
        read = [train.read(i) for i in range(10)] + [val.read(i) for i in range(2)]
        np.testing.assert_array_equal(read, images)
    (folder / "data_batch_3.bin").write_bytes(rows[0].tobytes()[:-1])
    text, code = opening(f"cifar10:{folder}")
    assert "data_batch_3.bin" in text and code == Exit.BAD_DATA
    (folder / "data_batch_3.bin").unlink()
    assert opening(f"cifar10:{folder}")[1] == Exit.NO_INPUT
    tar.write_bytes(tar.read_bytes()[:5000])
    assert opening(f"cifar10:{tar}")[1] == Exit.BAD_DATA
    tar.write_bytes(b"no tar at all")
    assert opening(f"cifar10:{tar}")[1] == Exit.BAD_DATA


def test_cifar100_uses_fine_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    images = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    coarse, fine = np.array([1, 2, 3, 4, 5]), np.array([99, 0, 50, 7, 8])
    rows = np.concatenate([coarse[:, None], fine[:, None], planes(images)], 1).astype(np.uint8)
    (folder / "train.bin").write_bytes(rows[:3].tobytes())
    (folder / "test.bin").write_bytes(rows[3:].tobytes())
    tar = write_tar(tmp_path / "cifar-100-binary.tar.gz", folder)
    for path in (folder, tar):
        train, val = halves(f"cifar100:{path}")
        assert train.labels.tolist() == [99, 0, 50] and val.labels.tolist() == [7, 8]
        assert len(train.classes) == 100
        np.testing.assert_array_equal(val.read(1), images[4])


def test_stl10_is_turned_upright(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = np.stack([photograph(i, 96, 96) for i in range(6)])
    columns_first = images.transpose(0, 3, 2, 1)
    (folder / "unlabeled_X.bin").write_bytes(columns_first[:2].tobytes())
    (folder / "train_X.bin").write_bytes(columns_first[2:4].tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 10]))
    (folder / "test_X.bin").write_bytes(columns_first[4:].tobytes())
    (folder / "test_y.bin").write_bytes(bytes([3, 2]))
    names = [f"class{k}" for k in range(10)]
    (folder / "class_names.txt").write_text("\n".join(names))
    tar = write_tar(tmp_path / "stl10_binary.tar.gz", folder)
    for path in (folder, tar):
        train, val = halves(f"stl10:{path}")
        assert train.labels.tolist() == [-1, -1, 0, 9] and val.labels.tolist() == [2, 1]
        assert train.classes == names
        np.testing.assert_array_equal([train.read(i) for i in range(4)], images[:4])
        np.testing.assert_array_equal([val.read(i) for i in range(2)], images[4:])


def test_hostile_tars_write_nothing(tmp_path: Path) -> None:
    record = bytes(2 + 3072)
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../../escaped.bin", "/tmp/escaped.bin", "data.pkl"):
            member = tarfile.TarInfo(name)
            member.size = len(record)
            tar.addfile(member, io.BytesIO(record))
        link = tarfile.TarInfo("train.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.parent.rglob("*"))
    assert opening(f"cifar100:{path}")[1] == Exit.NO_INPUT
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_classes_are_renumbered_by_name() -> None:
    images = np.zeros((4, 2, 2, 3), np.uint8)
    source = Pictures(images, np.array([0, 1, 2, -1]), ["a", "b", "c"])
    assert source.with_classes(["c", "z", "a"]).labels.tolist() == [2, -1, 0, -1]
    unlabelled = Folder("x", ["1", "2"], np.array([-1, -1]), []).with_classes(["a"])
    assert unlabelled.labels.tolist() == [-1, -1] and unlabelled.classes == ["a"]
