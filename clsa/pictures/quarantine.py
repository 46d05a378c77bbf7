"""Notes which pictures could not be read and why, and stops a run that has too many of them."""

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

    Attributes:
        reasons: reason for each unreadable picture, by its number in the source.

    Raises:
        ClsaError: 65 if the known ones alone are too many.
    """

    def __init__(self, source: Source, known: Collection[str] = ()):
        self.source = source
        self.reasons: dict[int, str] = {}
        self.budget = max(10, len(source) // 1000)
        if known:
            tried = {i: _reason(source, i) for i, name in enumerate(source.ids) if name in known}
            self.add({i: reason for i, reason in tried.items() if reason})

    def add(self, reasons: dict[int, str]) -> None:
        """Note unreadable pictures.

        Raises:
            ClsaError: 65 if more than max(10, 0.1 %) of the pictures are unreadable, or all.
        """
        self.reasons |= reasons
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
        return ClsaError(what, f"first: {named}", "repair or remove them", Exit.BAD_DATA)
