"""Hashes of the pictures that a run began with, to say in one line what has changed since.

The file stays small (12 bytes per picture, 16 MB for 1.3 million) and holds no names. So missing
pictures can be counted but not named.
"""

import os
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32, UInt64

from clsa.pictures.shards import read_arrays, write_arrays
from clsa.pictures.sources import Source
from clsa.system import files
from clsa.system.errors import ClsaError

NAMED = 3


class Fingerprints(NamedTuple):
    """One row per picture."""

    names: UInt64[np.ndarray, " N"]
    """Hash of each name."""
    held: UInt32[np.ndarray, " N"]
    """Hash of each picture's mark (`Source.marks`, for its content) and class."""
    digest: str
    """Digest of the whole source; it decides whether anything has changed."""


def fingerprints_of(source: Source, digest: str) -> Fingerprints:
    """The fingerprints of the pictures of a source."""
    hashes = b"".join(blake2b(os.fsencode(name), digest_size=8).digest() for name in source.ids)
    classes = np.array([zlib.crc32(os.fsencode(name)) for name in [*source.classes, ""]], "<u8")
    mixed = source.marks().astype("<u8") * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ classes[source.labels]) * np.uint64(0xD6E8FEB86659FD93)  # label -1: the last
    return Fingerprints(
        np.frombuffer(hashes, "<u8"), (mixed >> np.uint64(32)).astype("<u4"), digest
    )


def keep(path: Path, source: Source, digest: str) -> None:
    """Write the fingerprints of a new run, unless the file already holds those of this digest.

    Raises:
        ClsaError: 73 or 74 if it cannot be written.
    """
    before = _read(path)
    if before is None or before.digest != digest:
        names, held, _ = fingerprints_of(source, digest)
        files.write_atomic(
            path, lambda file: write_arrays(file, {"digest": digest}, names=names, held=held)
        )


def _read(path: Path) -> Fingerprints | None:
    """The saved fingerprints; None if missing or damaged: they only explain a refusal."""
    try:
        found = read_arrays(path)
        if found is None:
            return None
        names, held = found[1]["names"], found[1]["held"]
        if names.dtype != np.uint64 or held.dtype != np.uint32 or names.shape != held.shape:
            return None
        return Fingerprints(names, held, str(found[0]["digest"])) if len(names) else None
    except (ClsaError, LookupError, TypeError):
        return None


def describe_change(path: Path, source: Source, before: str, now: str) -> str:
    """What differs between the pictures that a run began with and those of `source`.

    Args:
        path: of the saved fingerprints.
        before: digest of the pictures that the run began with.
        now: digest of `source`.

    Returns:
        For example `+16 -1 ~2 (digest ab12 -> cd34): + a.png, ...`: how many pictures are new,
        gone, and changed in content or class; then the names of a few new and changed ones.
    """
    digests = f"(digest {before[:4]} -> {now[:4]})"
    kept = _read(path)
    if kept is None or kept.digest != before:
        return f"{digests}, {path.name} does not say which pictures"
    found = fingerprints_of(source, now)
    order = np.argsort(kept.names, kind="stable")
    known, held = kept.names[order], kept.held[order]
    place = np.searchsorted(known, found.names).clip(max=len(known) - 1)
    same = known[place] == found.names
    added, changed = np.flatnonzero(~same), np.flatnonzero(same & (held[place] != found.held))
    gone = len(np.setdiff1d(kept.names, found.names))
    counts = f"+{len(added)} -{gone} ~{len(changed)} {digests}"
    if not (len(added) or gone or len(changed)):
        if np.array_equal(kept.names, found.names):
            return f"{counts}: the same names and sizes, but other bytes or classes"
        return f"{counts}: the same pictures in another order"
    named = [
        f"{sign} {source.ids[i]}"
        for sign, rows in (("+", added), ("~", changed))
        for i in rows[:NAMED].tolist()
    ]
    return f"{counts}: {', '.join(named)}" if named else counts
