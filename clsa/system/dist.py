"""torch.distributed as plain functions; with one process each is the identity.

Every function works with or without a process group, so no caller has to ask how many processes
there are.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as td
from jaxtyping import Float, Int64
from torch import Tensor, nn

from clsa.system import ranks
from clsa.system.errors import ClsaError
from clsa.system.machine import upload


def rank() -> int:
    """Global rank of this process (0 with one process)."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """Number of processes (1 without a group)."""
    return td.get_world_size() if td.is_initialized() else 1


def local_rank() -> int:
    """Rank on this machine, as torchrun sets it; only for choosing a device, never for labels."""
    return int(os.environ.get("LOCAL_RANK", 0))


def pick_device(name: str) -> torch.device:
    """The device that `name` asks for; "auto" is this process's GPU if there is one, else the CPU.

    Raises:
        ClsaError: for a name that torch does not know, or a GPU that does not exist.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    if name == "cpu":
        return torch.device(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ClsaError(f"device {name}", "no such device", "use auto, cpu or cuda:N") from None
    index = local_rank() if device.index is None else device.index
    if device.type != "cuda" or not has_gpu or index >= torch.cuda.device_count():
        found = torch.cuda.device_count() if has_gpu else 0
        why = f"this machine has {found} GPUs, and this is process {local_rank()} on it"
        raise ClsaError(f"device {name}", why, "use auto, cpu or cuda:N")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device, timeout_s: float = 3600.0) -> Iterator[None]:
    """Join the group that torchrun announces (nccl on CUDA, gloo elsewhere); leave it at the end.

    Without torchrun's environment (`WORLD_SIZE`) nothing is set up.

    Args:
        timeout_s: how long a process waits for another before it counts that one as lost. While
            rank 0 works in `ranks.first_alone`: how long it may give no sign of life.

    Raises:
        ClsaError: when another process is lost; 74, or the exit code of that process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or td.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    gpu = device if device.type == "cuda" else None
    with ranks.joined(backend, timeout_s, gpu):
        yield


def all_gather(rows: Float[Tensor, "b ..."]) -> Float[Tensor, "B ..."]:
    """Concatenate equal-sized `rows` of all ranks in rank order; carries no gradient."""
    if world_size() == 1:
        return rows.detach()
    rows = rows.detach().contiguous()
    gathered = [torch.empty_like(rows) for _ in range(world_size())]
    td.all_gather(gathered, rows)
    return torch.cat(gathered)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        total = value.clone(memory_format=torch.contiguous_format)
        td.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        td.all_reduce(total)
        return total


def all_sum(value: Tensor) -> Tensor:
    """Sum of `value` over the ranks, with gradient: each rank's loss reaches every rank's value."""
    return value if world_size() == 1 else _Sum.apply(value)  # pyright: ignore


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the ranks; a missing gradient counts as zeros."""
    if world_size() == 1:
        return
    kept = list(parameters)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in kept]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    td.all_reduce(flat)
    for parameter, part in zip(kept, flat.split([grad.numel() for grad in grads]), strict=True):
        parameter.grad = part.view_as(parameter)


def all_gather_with_grad(rows: Float[Tensor, "b ..."]) -> Float[Tensor, "B ..."]:
    """`all_gather` with gradient: a rank's rows receive the gradients of every rank's loss."""
    if world_size() == 1:
        return rows
    # Each rank pads its rows with zeros; the sum then concatenates the rows of all ranks.
    before = rows.new_zeros((rank() * len(rows), *rows.shape[1:]))
    after = rows.new_zeros(((world_size() - 1 - rank()) * len(rows), *rows.shape[1:]))
    return all_sum(torch.cat([before, rows, after]))


def from_first(value: Tensor) -> Tensor:
    """Overwrite `value` on every other rank with that of rank 0, and return it."""
    if world_size() > 1:
        td.broadcast(value, 0)
    return value


def permuted(rows: Float[Tensor, "b ..."], order: Int64[np.ndarray, "B"]) -> Float[Tensor, "b ..."]:
    """This rank's share of `all_gather(rows)[order]`; only the rows of that share are sent.

    Args:
        rows: the same number on every rank; the result carries no gradient.
        order: a permutation of all ranks' rows, the same on every rank.
    """
    rows, count = rows.detach(), len(rows)
    wanted = order.reshape(world_size(), count)  # one line per rank
    owners = wanted // count
    sent = [
        line[owner == rank()] - rank() * count for line, owner in zip(wanted, owners, strict=True)
    ]
    outgoing = rows[upload([np.concatenate(sent)], rows.device)[0]].contiguous()
    if world_size() == 1:
        return outgoing
    received = torch.empty_like(outgoing)
    from_each = np.bincount(owners[rank()], minlength=world_size()).tolist()
    td.all_to_all_single(received, outgoing, from_each, [len(line) for line in sent])
    places = upload([np.argsort(owners[rank()], kind="stable")], rows.device)[0]
    return torch.empty_like(received).index_copy_(0, places, received)


def all_max(value: Tensor) -> Tensor:
    """Largest `value` over the ranks; lets all ranks agree on a flag."""
    if world_size() > 1:
        td.all_reduce(value, op=td.ReduceOp.MAX)
    return value
