"""Packs a source: reads each picture once, reduces large ones, writes tar shards and an index."""

import io
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import Int64, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Dataset

from clsa.options.commands import PackOptions
from clsa.options.run import DataOptions
from clsa.pictures import shards
from clsa.pictures.decode import DecodeError, open_picture
from clsa.pictures.folders import tell
from clsa.pictures.opening import open_source
from clsa.pictures.quarantine import REASONS, Quarantine
from clsa.pictures.shards import (
    INDEX,
    LENGTH,
    UNFINISHED,
    UNREADABLE,
    Shards,
    ShardWriter,
    shard_name,
)
from clsa.pictures.sources import Source
from clsa.system import files, lock, workers
from clsa.system.errors import ClsaError
from clsa.system.machine import num_cores

PREFETCH = 8
MAX_JPEG_SIDE = 65_500
_SUFFIXES = (("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG"), ("webp", b"RIFF"), ("bmp", b"BM"))
_SUFFIXES += (("gif", b"GIF8"), ("jp2", b"\0\0\0\x0cjP  "), ("jp2", b"\xff\x4f\xff\x51"))


class Packed(NamedTuple):
    """What `pack` has made."""

    pictures: int
    shards: int
    num_bytes: int
    """Size of all shards together."""
    left_out: int
    """Unreadable pictures: gaps in the set, listed in quarantine.jsonl."""
    fresh: bool
    """False if the finished set already existed."""


def pack(options: PackOptions) -> Packed:
    """Read every picture of `options.data` once and write the packed set `options.out`.

    A picture whose short side is longer than `options.size` becomes an upright JPEG with that short
    side (Lanczos, from a reduced decoding of at least twice the size). Other pictures keep their
    bytes; those without bytes of their own (arrays) become PNGs. Shards hold KEY.jpg (.png, .webp,
    ...) and, if the class is known, KEY.cls; KEY is the picture's number in the set. The bytes do
    not depend on the number of workers.

    Unreadable pictures are listed in quarantine.jsonl and stay in the set as gaps. So the set keeps
    the order of the source, and training replaces these pictures as it would without packing. Only
    a new pack tries to read them again.

    The index is written last, so `out` counts as packed only when it is complete. After an
    interruption the same call keeps the finished shards and continues after them; if the pictures
    have changed since, it starts over.

    Raises:
        ClsaError: 2 if `out` holds something else, another process packs into it, or `data` is
            already packed; 65 if more pictures than the limit are unreadable (after all were
            tried), or a finished pack is damaged; 66 if there is nothing to read; 73 or 74 if the
            disk refuses or a worker fails.
    """
    source = open_source(options.data, options.split, DataOptions(value_range=options.value_range))
    if isinstance(source, Shards):
        why = "packed already, and resizing twice loses detail"
        raise ClsaError(options.data, why, "give the original pictures")
    tell(source, "pictures")
    job = _Job(source, options)
    with lock.only_writer(options.out):
        fresh = not job.is_done()
        if fresh:
            job.run()
        job.clear()
    made = shards.open_shards(str(options.out))
    assert made is not None
    readable = int((made.places[:, LENGTH] > 0).sum())
    num_bytes = sum(size for size, _ in made.shards)
    return Packed(readable, len(made.shards), num_bytes, len(made) - readable, fresh)


# ---- one picture


class _Encoded(NamedTuple):
    """A picture in the form that goes into a shard."""

    row: int
    """Its number in the source."""
    data: bytes
    suffix: str
    height: int
    """Upright, before resizing; so is `width`."""
    width: int


def _encode(source: Source, row: int, size: int, quality: int) -> _Encoded:
    """Picture number `row`, ready to be packed; raises DecodeError if it cannot be read."""
    data = source.encoded(row)
    picture = source.open(row) if data is None else open_picture(data, source.value_range)
    height, width = picture.height, picture.width
    short = min(height, width)
    if short <= size:
        pixels = picture.pixels()  # decode now: this is what finds a truncated file
        if data is None:
            return _Encoded(row, _png(pixels), "png", height, width)
        return _Encoded(row, data, _ending(data), height, width)
    reduction = next(r for r in (8, 4, 2, 1) if r == 1 or short >= 2 * r * size)
    sides = (round(width * size / short), round(height * size / short))
    image = Image.fromarray(picture.pixels(reduction)).resize(sides, Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    if max(sides) > MAX_JPEG_SIDE:
        return _Encoded(row, _png(pixels), "png", height, width)
    data = simplejpeg.encode_jpeg(pixels, quality, "RGB", "420")
    return _Encoded(row, data, "jpg", height, width)


def _ending(data: bytes) -> str:
    """The ending of a picture that decodes, by its first bytes."""
    if data[4:8] == b"ftyp":
        return "avif"
    return next((name for name, head in _SUFFIXES if data.startswith(head)), "tif")


def _png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class _Encoder(Dataset):
    """`_encode` for workers; returns (number, reason) if a picture cannot be read."""

    def __init__(self, source: Source, size: int, quality: int):
        self.source, self.size, self.quality = source, size, quality

    def __getitem__(self, row: int) -> _Encoded | tuple[int, str]:
        workers.at(row)
        try:
            return _encode(self.source, row, self.size, self.quality)
        except DecodeError as error:
            return row, error.reason


def _encode_all(
    source: Source, options: PackOptions, first: int
) -> Iterator[_Encoded | tuple[int, str]]:
    """Pictures from number `first` on, in order."""
    count = min(num_cores() if options.workers is None else options.workers, len(source) - first)
    name = source.ids.__getitem__
    encoder = _Encoder(source, options.size, options.quality)
    yield from workers.results(encoder, range(first, len(source)), count, PREFETCH, name)


class _Part(NamedTuple):
    """What the index must know about one shard; stored on disk until the index is written."""

    end: int
    """Number in the source at which the next shard starts."""
    size: int
    """Of the shard, in bytes."""
    sha256: str
    places: Int64[np.ndarray, "n 5"]
    """As in `Shards`, for all pictures from the previous shard's `end` to this one's."""
    reasons: Int64[np.ndarray, " m"]
    """Of the unreadable pictures in this range, as positions in `REASONS`."""

    def write(self, path: Path) -> None:
        """Save to disk, so that a later start can continue after this shard."""
        values = self._asdict()
        meta = {name: values.pop(name) for name in ("end", "size", "sha256")}
        files.write_atomic(path, lambda file: shards.write_arrays(file, meta, **values))

    @staticmethod
    def read(path: Path, shard: Path) -> "_Part | None":
        """Read what `write` wrote; None if part or shard is incomplete: rewrite both."""
        try:
            found = shards.read_arrays(path)
            if found is None or shard.stat().st_size != found[0]["size"]:
                return None
            meta, arrays = found
            return _Part(meta["end"], meta["size"], meta["sha256"], **arrays)
        except (ClsaError, OSError, LookupError, TypeError):
            return None


# ---- the set


class _Job:
    """One packing: its folder, what is done already, and what is left to do."""

    def __init__(self, source: Source, options: PackOptions):
        self.source, self.options, self.out = source, options, options.out
        self.unfinished = self.out / UNFINISHED
        self.manifest = self.unfinished / "pack.json"
        self.console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        names = ("size", "quality", "shard_mb")
        self.settings = {name: getattr(options, name) for name in names}
        self.settings["value_range"] = options.value_range and list(options.value_range)
        self.settings["pictures"] = source.digest()

    def is_done(self) -> bool:
        """Whether the folder already holds exactly this pack, finished.

        Raises:
            ClsaError: 2 if it holds something else (the error says what differs); 73 if it cannot
                be a folder.
        """
        with files.output_errors(self.out):
            found = {path.name for path in self.out.iterdir()} if self.out.exists() else set()
        if not found - {UNFINISHED, lock.NAME}:
            return False
        finished = shards.index_meta(self.out)
        if finished is not None:
            self._require_same(finished, list(self.settings), "another pack")
            return True
        before = self._read_manifest()
        if before is None:
            raise ClsaError(str(self.out), "neither empty nor a packed set", "choose another --out")
        if before.get("pictures") != self.settings["pictures"]:
            # The same place, but pictures were repaired, added or removed: no shard can stay.
            self._require_same(before, ["data", "split"], "an unfinished pack")
            self.console.print("The pictures have changed: packing starts over.")
            self._forget_parts()
        else:
            self._require_same(before, list(self.settings), "an unfinished pack")
        return False

    def _require_same(self, before: dict[str, Any], names: list[str], what: str) -> None:
        now = self._asked()
        changes = [
            "other pictures" if name == "pictures" else f"{name}: {before.get(name)} -> {now[name]}"
            for name in names
            if before.get(name) != now[name]
        ]
        if changes:
            why = f"holds {what} ({', '.join(changes)})"
            raise ClsaError(str(self.out), why, "choose another --out, or delete that folder")

    def _asked(self) -> dict[str, Any]:
        return {**self.settings, "data": self.options.data, "split": self.options.split}

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            values = json.loads(self.manifest.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return values if isinstance(values, dict) else None

    def run(self) -> None:
        """Write the shards that are missing, then the index."""
        with files.output_errors(self.out):
            self.unfinished.mkdir(parents=True, exist_ok=True)
            for path in self.out.glob(".*.tmp-*"):  # left by a start that was killed
                path.unlink(missing_ok=True)
        files.write_text(self.manifest, json.dumps(self._asked()) + "\n")
        quarantine = Quarantine(self.source, limit=self.options.max_unreadable)
        try:
            parts = self._write_shards(quarantine)
            quarantine.require_few()  # only now, so that all of them are named
        finally:
            named = quarantine.by_id().items()
            lines = [json.dumps({"path": name, "reason": reason}) for name, reason in named]
            files.write_text(self.out / "quarantine.jsonl", "".join(f"{line}\n" for line in lines))
        with files.output_errors(self.out):  # left by a start with other pictures
            for path in self.out.glob("shard-*.tar"):
                if path.name not in map(shard_name, range(len(parts))):
                    path.unlink()
        self._write_index(parts)

    def _write_shards(self, quarantine: Quarantine) -> list[_Part]:
        parts = self._whole_parts()
        for part in parts:
            lost = part.end - len(part.places) + np.flatnonzero(part.places[:, LENGTH] == 0)
            reasons = [REASONS[code] for code in part.reasons]
            quarantine.reasons |= dict(zip(lost.tolist(), reasons, strict=True))
        first, total = parts[-1].end if parts else 0, len(self.source)
        if parts:
            self.console.print(f"Continuing after {len(parts)} shards ({first}/{total} pictures).")
        progress = Progress(
            TextColumn("packing"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total} · {task.fields[shard]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        task = progress.add_task("", total=total, completed=first, shard="")

        def readable() -> Iterator[_Encoded]:
            for item in _encode_all(self.source, self.options, first):
                progress.advance(task)
                if isinstance(item, _Encoded):
                    yield item
                else:
                    quarantine.reasons |= dict([item])

        pictures = readable() if first < total else iter(())
        with progress:
            for picture in pictures:
                progress.update(task, shard=shard_name(len(parts)))
                ahead = itertools.chain([picture], pictures)
                parts.append(self._write_shard(parts, ahead, quarantine))
                if not self.console.is_terminal:
                    self.console.print(f"{shard_name(len(parts) - 1)} {parts[-1].end}/{total}")
        return parts

    def _write_shard(
        self, parts: list[_Part], pictures: Iterator[_Encoded], quarantine: Quarantine
    ) -> _Part:
        k, start = len(parts), parts[-1].end if parts else 0
        places: list[tuple[int, ...]] = []

        def fill(file: IO[bytes]) -> None:
            writer = ShardWriter(file)
            for row, data, suffix, height, width in pictures:
                begin = writer.add(f"{row:09d}", suffix, data, int(self.source.labels[row]))
                places.extend([UNREADABLE] * (row - start - len(places)))
                places.append((k, begin, len(data), height, width))
                if writer.length >= self.options.shard_mb * 1e6:
                    break
            writer.finish()

        sha256, size = files.write_atomic(self.out / shard_name(k), fill)
        lost = [start + i for i, place in enumerate(places) if place == UNREADABLE]
        codes = [REASONS.index(quarantine.reasons[row]) for row in lost]
        arrays = (np.array(values, np.int64) for values in (places, codes))
        part = _Part(start + len(places), size, sha256, *arrays)
        part.write(self._part(k))
        return part

    def _part(self, k: int) -> Path:
        return self.unfinished / f"{shard_name(k)}.npz"

    def _whole_parts(self) -> list[_Part]:
        """Parts of the shards that an earlier start finished, up to the first unfinished one."""
        parts: list[_Part] = []
        while part := _Part.read(self._part(len(parts)), self.out / shard_name(len(parts))):
            parts.append(part)
        return parts

    def _write_index(self, parts: list[_Part]) -> None:
        last = np.tile(np.array(UNREADABLE, np.int64), (len(self.source) - parts[-1].end, 1))
        meta = {
            **self.settings,
            "classes": self.source.classes,
            "shards": [{"size": part.size, "sha256": part.sha256} for part in parts],
        }
        arrays = {
            "places": np.concatenate([*(part.places for part in parts), last]),
            "labels": self.source.labels.astype(np.int64),
            "ids": np.frombuffer(self.source.ids.joined, np.uint8),
        }
        path = self.out / INDEX
        files.write_atomic(path, lambda file: shards.write_arrays(file, meta, **arrays))

    def clear(self) -> None:
        """Remove what only an unfinished pack needs."""
        with files.output_errors(self.out):
            if self.unfinished.is_dir():
                shutil.rmtree(self.unfinished)

    def _forget_parts(self) -> None:
        with files.output_errors(self.out):
            for path in self.unfinished.glob("*.npz"):
                path.unlink(missing_ok=True)
