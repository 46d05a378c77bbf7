"""Errors that a user can fix: what happened, why, what to do; each kind has its exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the command line (README lists them)."""

    OK = 0
    BUG = 1
    USAGE = 2
    BAD_DATA = 65
    NO_INPUT = 66
    CANNOT_WRITE = 73
    IO = 74
    PREEMPTED = 75
    UNHEALTHY = 76
    UNTRUSTED = 77


RESUMABLE = (Exit.PREEMPTED, Exit.IO, Exit.CANNOT_WRITE)
"""After these codes the same command resumes the run."""


class ClsaError(Exception):
    """An expected failure, printed as one line `error: WHAT - WHY - WHAT TO DO`, no traceback.

    Args:
        what: what went wrong, with the path or the option.
        why: the cause, in a few words.
        next_step: what the user can do about it.
        code: the exit code of the process.
    """

    def __init__(self, what: str, why: str, next_step: str, code: Exit = Exit.USAGE):
        super().__init__(f"{what} - {why} - {next_step}")
        self.code = code


_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory",
              "failed to map segment", "can't start new thread")  # fmt: skip


@contextmanager
def memory_errors() -> Iterator[None]:
    """Report in one line that the system refuses memory.

    Raises:
        ClsaError: 74 when it does.
    """
    try:
        yield
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        why = first_line(error)
        if not isinstance(error, MemoryError) and not any(
            text in str(error).lower() for text in _NO_MEMORY
        ):
            raise
        step = "free some memory, raise ulimit -v, or lower --batch-size and --workers"
        raise ClsaError("not enough memory", why, step, Exit.IO) from error


def code_of(error: BaseException) -> int:
    """The exit code of a process that ends with this error."""
    if isinstance(error, ClsaError):
        return error.code
    return Exit.PREEMPTED if isinstance(error, KeyboardInterrupt) else Exit.BUG


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
