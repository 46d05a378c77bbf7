"""One sha256 over nested tensors and numbers: equal digests mean equal states, to the bit."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from leaves(value[key], f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from leaves(item, f"{name}/{place}")
    else:
        yield name, value


def digest(state: Any) -> str:
    """One sha256 over every leaf of nested dicts and lists: name, kind, shape and bytes.

    For a training state it covers model, key network, bank, optimiser and step: two runs with equal
    digests are in the same state to the bit.
    """
    total = hashlib.sha256()
    for name, value in leaves(state):
        if isinstance(value, Tensor):
            tensor = value.detach().cpu().contiguous()
            total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            total.update(tensor.view(-1).view(torch.uint8).numpy().data)
        else:
            total.update(f"{name}:{value!r}:".encode())
    return total.hexdigest()
