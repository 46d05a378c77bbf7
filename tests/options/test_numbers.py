"""Numbers as numeric Python code has them are taken as options; other kinds are still refused."""

from typing import Any

import numpy as np
import pytest
import torch

from clsa.options.run import RunOptions
from clsa.system.errors import ClsaError


def parsed(**values: Any) -> RunOptions:
    return RunOptions.parse({"data": {"data": "x"}, **values}, "here")


def test_numpy_numbers_and_devices_are_taken() -> None:
    options = parsed(
        epochs=np.int64(3),
        seed=np.uint32(7),
        optim={"lr": np.float32(0.5), "clip_trust": np.bool_(True)},
        views={"weak": {"sizes": np.array([32, 32]), "blur": [np.float64(0.25)]}},
        device=torch.device("cpu"),
    )
    assert (options.epochs, options.seed, options.device) == (3, 7, "cpu")
    assert type(options.epochs) is int and type(options.optim.lr) is float
    assert options.optim.lr == 0.5 and options.views.weak.sizes == (32, 32)
    assert options.views.weak.blur == (0.25,) and options.optim.clip_trust is True


@pytest.mark.parametrize("value", [np.float32(1.5), np.bool_(True), "3", np.str_("3"), True])
def test_other_kinds_are_refused_for_whole_numbers(value: object) -> None:
    with pytest.raises(ClsaError, match="expected int"):
        parsed(epochs=value)
