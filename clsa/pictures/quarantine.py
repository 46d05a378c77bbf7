"""Notes which pictures could not be read and why, and stops a run that has too many of them."""

import math
from collections.abc import Collection

import torch

from clsa.pictures.decode import DecodeError
from clsa.pictures.sources import Source
from clsa.system import dist
from clsa.system.errors import ClsaError, Exit

# Of `decode.DecodeError`. Processes exchange positions in it, so add new reasons at the end.
REASONS = (
    *("empty", "not-an-image", "truncated", "too-large"),
    *("unsupported", "broken", "unreadable"),
)


def _budget(limit: str | None, count: int) -> int:
    """How many of `count` pictures may be unreadable."""
    if limit is None:
        return max(10, count // 1000)
    return math.floor(count * float(limit[:-1]) / 100) if limit.endswith("%") else int(limit)


def _reason(source: Source, i: int) -> str:
    """Why a picture cannot be read, or an empty string."""
    try:
        source.read(i)
    except DecodeError as error:
        return error.reason
    return ""


class Quarantine:
    """Pictures that could not be read, with their reasons; too many end the run.

    Args:
        known: paths or names that an earlier start of the run could not read. They are tried
            again, so that repaired pictures no longer count.
        limit: how many may be unreadable: a number, or a share such as 1%; if not given, 0.1 %,
            but at least 10.

    Attributes:
        reasons: reason for each unreadable picture, by its number in the source.

    Raises:
        ClsaError: 65 if the known ones alone are too many.
    """

    def __init__(self, source: Source, known: Collection[str] = (), limit: str | None = None):
        self.source = source
        self.reasons: dict[int, str] = {}
        self.budget = _budget(limit, len(source))
        if known:
            tried = {i: _reason(source, i) for i, name in enumerate(source.ids) if name in known}
            self.add({i: reason for i, reason in tried.items() if reason})

    def add(self, reasons: dict[int, str]) -> None:
        """Note unreadable pictures.

        Raises:
            ClsaError: 65 if more pictures than the limit are unreadable, or all.
        """
        self.reasons |= reasons
        self.require_few()

    def require_few(self) -> None:
        """Raise what `add` raises if too many pictures are noted."""
        if len(self.reasons) > self.budget or len(self.reasons) == len(self.source):
            raise self.error()

    def share(self, device: torch.device | None = None) -> None:
        """Merge the unreadable pictures of all processes; all of them must call this together.

        Afterwards every process knows the same pictures. So one budget holds for the whole run, and
        if it is exceeded, the run ends with the same error on every rank.

        Args:
            device: where processes exchange tensors, the CPU if not given (nccl needs a GPU).

        Raises:
            ClsaError: as `add`.
        """
        codes = torch.zeros(len(self.source), dtype=torch.uint8)
        for i, reason in self.reasons.items():
            codes[i] = 1 + REASONS.index(reason)
        codes = dist.all_max(codes.to(device)).cpu()
        self.add({i: REASONS[codes[i] - 1] for i in codes.nonzero().flatten().tolist()})

    def by_id(self) -> dict[str, str]:
        """Reasons by path or name, in the order of the source."""
        return {self.source.ids[i]: self.reasons[i] for i in sorted(self.reasons)}

    def error(self) -> ClsaError:
        """The error for too many unreadable pictures; it names the first ten."""
        first = sorted(self.reasons)[:10]
        named = ", ".join(f"{self.source.ids[i]} ({self.reasons[i]})" for i in first)
        what = f"{len(self.reasons)} unreadable pictures among {len(self.source)}"
        hint = "repair or remove them, or raise --max-unreadable"
        return ClsaError(what, f"first: {named}", hint, Exit.BAD_DATA)
