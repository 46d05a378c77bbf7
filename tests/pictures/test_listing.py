"""The listing of a folder and its cache: a cached listing equals a fresh one or is discarded."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clsa.options.run import DataOptions
from clsa.pictures import listing
from clsa.pictures.listing import Listing, list_images
from clsa.pictures.names import Names
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Folder

FILES = ["b/2.png", "b/deep/er/1.jpg", "b/a.png", "a/1.png", "loose.gif", "z/x.jpeg", "b.png"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for size, name in enumerate(FILES):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size + 1))
    (tmp_path / "pictures" / "empty" / "inner").mkdir(parents=True)
    return tmp_path / "pictures"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that accepts listings of any length, of folders of any age."""
    monkeypatch.setenv("CLSA_CACHE", str(tmp_path / "cache" / "here"))
    monkeypatch.setattr(listing, "MIN_CACHED", 0)
    monkeypatch.setattr(listing, "RACY_NS", -(10**12))
    return tmp_path / "cache" / "here"


def seen(root: Path) -> tuple[list[str], list[int], list[str], list[int]]:
    names, sizes, folders, owners, _ = list_images(str(root))
    return list(names), sizes.tolist(), folders, owners.tolist()


def fresh(root: Path) -> tuple[list[str], list[int], list[str], list[int]]:
    """A fresh listing of the folder, whatever is in the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSA_CACHE", "off")
        return seen(root)


def kept(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def signed(body: bytes) -> bytes:
    return listing._FORMAT + hashlib.sha256(body).digest() + body


def test_a_listing_is_in_byte_order_with_sizes_and_folders(root: Path) -> None:
    names, sizes, folders, owners = fresh(root)
    wanted = ["a/1.png", "b/2.png", "b/a.png", "b/deep/er/1.jpg", "b.png", "loose.gif", "z/x.jpeg"]
    assert names == wanted
    assert sizes == [FILES.index(name) + 1 for name in names]
    assert folders == ["", "a", "b", "b/deep", "b/deep/er", "empty", "empty/inner", "z"]
    assert [folders[owner] for owner in owners] == [os.path.dirname(name) for name in names]


def test_the_cache_gives_the_same_without_listing_again(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_source(str(root), "train", DataOptions())
    assert seen(root) == fresh(root) and kept(cache).stat().st_size < 2000

    def refuse(_: object) -> None:
        raise AssertionError("listed again")

    monkeypatch.setattr(listing.os, "scandir", refuse)
    second = open_source(str(root), "train", DataOptions())
    assert isinstance(second, Folder) and second.ids == first.ids
    assert second.classes == first.classes == ["a", "b", "z"]
    assert second.labels.tolist() == first.labels.tolist() == [0, 1, 1, 1, -1, -1, 2]
    assert second.digest() == first.digest()
    again = root.parent / "again"
    again.symlink_to(root)
    assert list_images(str(again)).names == list(first.ids)  # cached by the real path
    with pytest.raises(AssertionError, match="again"):
        fresh(root)


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda root: (root / "b" / "deep" / "new.png").write_bytes(b"1"),
    "in an empty folder": lambda root: (root / "empty" / "inner" / "new.png").write_bytes(b"1"),
    "removed": lambda root: (root / "a" / "1.png").unlink(),
    "renamed": lambda root: (root / "a" / "1.png").rename(root / "a" / "2.png"),
    "moved": lambda root: (root / "a" / "1.png").rename(root / "z" / "1.png"),
    "a folder renamed": lambda root: (root / "b").rename(root / "c"),
    "a folder added": lambda root: (root / "z" / "more").mkdir(),
    "a folder for a file": lambda root: ((root / "b.png").unlink(), (root / "b.png").mkdir()),
    "another size": lambda root: (root / "z" / "x.jpeg").write_bytes(bytes(77)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(root: Path, cache: Path, change: str) -> None:
    before = seen(root)
    time.sleep(0.02)  # a tick of the file system's clock
    CHANGES[change](root)
    after = seen(root)
    assert after == fresh(root) != before
    assert seen(root) == after and len(list(cache.iterdir())) == 1


def test_a_replaced_folder_is_seen(root: Path, cache: Path) -> None:
    seen(root)
    times = root.stat().st_atime_ns, root.stat().st_mtime_ns
    root.rename(root.with_name("old"))
    time.sleep(0.02)
    root.mkdir()
    (root / "only.png").write_bytes(b"1")
    os.utime(root, ns=times)  # as unpacking an archive does
    assert seen(root)[0] == ["only.png"]


def test_a_file_overwritten_in_place_is_seen_where_it_is_sampled(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = seen(root)
    (root / "loose.gif").write_bytes(bytes(99))
    with monkeypatch.context() as patch:
        patch.setattr(listing, "NUM_SAMPLED", 0)
        assert seen(root) == before
    assert seen(root) == fresh(root) != before
    (root / "loose.gif").unlink()
    (root / "loose.gif").symlink_to(root / "lost.gif")
    assert "loose.gif" not in seen(root)[0]


def test_a_change_during_the_listing_is_seen_by_the_next(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time.sleep(0.02)
    entries = listing._entries

    def disturbed(path: bytes, prefix: bytes, met: Any) -> list[tuple[bytes, int | None]]:
        found = entries(path, prefix, met)
        (root / "late.png").write_bytes(b"1")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(listing, "_entries", disturbed)
        assert "late.png" not in seen(root)[0]
    assert kept(cache).exists() and "late.png" in seen(root)[0]


def test_recently_changed_and_small_folders_are_not_cached(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(listing, "RACY_NS", 60 * 10**9)
        seen(root)
        assert not cache.exists()
    with monkeypatch.context() as patch:
        patch.setattr(listing, "MIN_CACHED", len(FILES))
        seen(root)
        assert not cache.exists()
    seen(root)
    assert kept(cache).exists() and cache.stat().st_mode & 0o077 == 0  # names are private


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"CLSA_CACHE": "off"}, None),
        ({"CLSA_CACHE": ""}, None),
        ({"CLSA_CACHE": "/own"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home"}, "/xdg/clsa"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home"}, "/home/.cache/clsa"),
        ({"HOME": "/home"}, "/home/.cache/clsa"),
    ],
)
def test_the_place_of_the_cache(
    variables: dict[str, str], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CLSA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    path = listing._cache_path("/some/where")
    assert (None if path is None else str(path.parent)) == wanted
    other = listing._cache_path("/some/where/else")
    assert path is None or (other is not None and other != path)


def test_a_cache_that_cannot_be_written_is_ignored(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    assert seen(root) == fresh(root) and cache.read_text() == "a file"
    monkeypatch.setenv("CLSA_CACHE", "/" + "long" * 2000)
    assert seen(root) == fresh(root)


def test_a_damaged_cache_is_replaced_by_a_new_listing(root: Path, cache: Path) -> None:
    wanted = seen(root)
    path = kept(cache)
    whole = path.read_bytes()
    spoilt = [whole[:size] for size in (*range(0, len(whole), 7), len(whole) - 1)]
    for place in range(0, len(whole), 5):
        spoilt.append(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
    spoilt += [whole + b"\0", b"junk", whole.replace(b"listing 2", b"listing 3")]
    for content in spoilt:
        path.write_bytes(content)
        assert listing._load(path) is None
    path.write_bytes(spoilt[3])
    assert seen(root) == wanted and path.read_bytes() == whole
    path.unlink()
    path.mkdir()
    assert seen(root) == wanted
    path.rmdir()
    os.mkfifo(path)
    assert listing._load(path) is None  # and does not wait for a writer


def test_a_forged_cache_is_refused(root: Path, cache: Path) -> None:
    seen(root)
    path = kept(cache)
    good = listing._load(path)
    assert good is not None
    names, sizes, folders, owners, _ = good.listing

    def load(*changed: Any) -> object:
        path.write_bytes(listing._packed(good._replace(listing=Listing(*changed))))
        return listing._load(path)

    assert load(names, sizes, folders, owners) is not None
    outside = ["../x.png", "/etc/passwd", ".git/x.png", "a/../../x.png", "a//x", "a/", "", "a/.b"]
    for name in outside:
        joined = "\0".join([name, *list(names)[1:]]).encode()
        assert load(Names(joined), sizes, folders, owners) is None, name
        assert load(names, sizes, [*folders[:-1], name], owners) is None, name
    assert load(names, sizes, ["x", *folders[1:]], owners) is None
    for owner in (-1, len(folders)):
        assert load(names, sizes, folders, np.full(len(sizes), owner)) is None
    assert load(names, sizes[:-1], folders, owners[:-1]) is None
    assert load(names, sizes, folders[:-1], owners) is None
    for counts in (
        [0] * 4,
        [-1, 7, 5, 2],
        [1, -1, 5, 2],
        [1, 1, -8, 2],
        [1, 1, 8, -2],
        [2**62, 1, 1, 2],
    ):
        path.write_bytes(signed(np.array(counts, "<i8").tobytes() + bytes(400)))
        assert listing._load(path) is None, counts
    path.write_bytes(signed(b"short"))
    assert listing._load(path) is None


# ---- digest


def test_a_list_of_strings_and_names_have_the_same_digest(root: Path) -> None:
    source = open_source(str(root), "train", DataOptions())
    plain = Folder(str(root), list(source.ids), source.labels, source.classes)
    assert plain.digest() == source.digest()
    rows = np.array([4, 1, 2])
    assert plain.subset(rows).digest() == source.subset(rows).digest() != source.digest()
    assert source.subset(rows).ids == [plain.ids[i] for i in rows]
