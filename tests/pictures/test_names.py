"""Names: a sequence of paths as one block of bytes."""

import os

import numpy as np
import pytest

from clsa.pictures.names import Names


def test_names_are_a_sequence_of_paths() -> None:
    paths = [f"folder {i % 7}/é{i}.png" for i in range(9000)]
    paths[17] = os.fsdecode(b"caf\xe9.png")
    names = Names("\0".join(paths).encode(errors="surrogateescape"))
    assert len(names) == 9000 and list(names) == paths and names == paths
    assert [names[i] for i in (0, 17, 8999, -1)] == [paths[i] for i in (0, 17, 8999, -1)]
    assert names != paths[:-1] and names != "folder"
    with pytest.raises(IndexError):
        names[9000]
    rows = np.array([5, 17, 5, 8999, 0])
    few = names.take(rows)
    assert few == [paths[i] for i in rows] and few.take(rows[:0]) == []
    assert few.joined == "\0".join(paths[i] for i in rows).encode(errors="surrogateescape")
    assert names.take(np.arange(3, 9)).joined.count(b"\0") == 5
    for none in (Names(b""), names.take(rows[:0])):
        assert len(none) == 0 and list(none) == [] and none.joined == b""
    assert list(Names(b"one")) == ["one"]


def test_names_of_strings() -> None:
    paths = ["a/b.png", "", "odd\0name", os.fsdecode(b"caf\xe9.png"), "c"]
    names = Names.of(paths)
    assert names == paths and Names.of(names) is names and names[2] == paths[2]
    assert names.take(np.array([3, 1])) == [paths[3], ""]
    assert names.joined == os.fsencode("\0".join(paths))
    assert Names.of([]) == [] and Names.of([]).joined == b""
