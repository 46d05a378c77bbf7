"""Projections of a whole set: in memory or, if too large, on disk, where they can be resumed."""

import json
import os
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clsa.evaluate.features.extract import centre_views, encode, frozen, projections
from clsa.learning.models import Network
from clsa.loading.loader import EVAL_CHUNK
from clsa.options.run import ViewOptions
from clsa.pictures.sources import Source
from clsa.runs import digests
from clsa.system import dist, files
from clsa.system.errors import ClsaError, Exit

LIMIT = 256 << 20  # bytes of float32 rows that may be kept in memory
NOTED = 1 << 14  # rows between two notes of a process's progress


class Projections:
    """`extract.projections` for a run: in memory, or as float16 on disk if they are large.

    On disk, all processes write their shares to one file, named by a digest of the network. Each
    process notes in a second file how many rows are done. If the run stops meanwhile and is started
    again, it has the same network, finds the file and continues, with the same result to the bit.

    Args:
        source: the pictures.
        options: side and centre crop.
        device: where the network is.
        folder: for the files; created if needed. All processes must see it.
    """

    def __init__(self, source: Source, options: ViewOptions, device: torch.device, folder: Path):
        self.source, self.options, self.device, self.folder = source, options, device, folder

    def __call__(self, network: Network) -> Float[Tensor, "n D"]:
        """Unit rows in the order of the set, on the CPU; zeros if a picture cannot be read.

        Raises:
            ClsaError: 74 if writing fails, 66 if the processes do not see the same folder.
        """
        count, dim = len(self.source), network.dim
        if 4 * count * dim <= LIMIT:
            return projections(self.source, self.options, self.device, network)
        path = self.folder / f"{digests.digest(network.state_dict())[:16]}.f16"
        notes = [path.with_suffix(f".{rank}-of-{dist.world_size()}.json")
                 for rank in range(dist.world_size())]  # fmt: skip
        with files.output_errors(path):
            if dist.rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(path, "ab") as file:
                    file.truncate(2 * count * dim)
            self._wait()
            self._write(network, path, notes[dist.rank()])
            self._wait()
        if not all(note.exists() for note in notes):
            why = "not all processes write to it"
            raise ClsaError(
                str(self.folder), why, "give all machines the same --out", Exit.NO_INPUT
            )
        return torch.from_numpy(np.memmap(path, np.float16, "c", shape=(count, dim)))

    def _write(self, network: Network, path: Path, note: Path) -> None:
        """Write this process's share, starting after the rows that its note counts as done."""
        share = -(-len(self.source) // dist.world_size())
        first = min(share * dist.rank(), len(self.source))
        end = min(first + share, len(self.source))
        done = noted = first + _read(note)
        with frozen(network), open(path, "r+b") as file:
            rows = np.arange(done, end)
            for numbers, images in centre_views(self.source, rows, self.options, self.device):
                block = np.zeros((int(numbers[-1]) + 1 - done, network.dim), np.float16)
                block[numbers - done] = encode(network, images, EVAL_CHUNK).half().cpu().numpy()
                file.seek(2 * done * network.dim)
                file.write(block.tobytes())
                done += len(block)
                if done - noted >= NOTED:
                    _note(note, done - first, file)
                    noted = done
            _note(note, end - first, file)

    def clear(self) -> None:
        """Delete the files; every process calls this when the projections are no longer used."""
        self._wait()
        if dist.rank() == 0 and self.folder.exists():
            for path in [*self.folder.glob("*.f16"), *self.folder.glob("*.json")]:
                path.unlink()
            self.folder.rmdir()

    def _wait(self) -> None:
        dist.all_max(torch.zeros(1, device=self.device))


def _note(path: Path, rows: int, file: IO[bytes]) -> None:
    """Make sure that the rows are on disk, then write down their number."""
    file.flush()
    os.fsync(file.fileno())
    files.write_text(path, json.dumps({"rows": rows}) + "\n")


def _read(path: Path) -> int:
    """The number that `_note` wrote; 0 if there is none."""
    try:
        return int(json.loads(path.read_text("utf-8"))["rows"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0
