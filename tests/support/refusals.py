"""Checks how a user's mistake ends: one line with what, why and what to do, and an exit code."""

from collections.abc import Callable

import pytest

from clsa.system.errors import ClsaError, Exit


def refusal(action: Callable[[], object]) -> tuple[str, Exit]:
    """Text and exit code of the `ClsaError` that `action` raises."""
    with pytest.raises(ClsaError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and text.count(" - ") >= 2
    return text, caught.value.code
