"""Every method at a small size, for test_methods.py and its two-process runs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor

from clsa.learning.models import Network
from clsa.learning.optim import build_optimizer, set_lr
from clsa.methods import build_method
from clsa.methods.method import Batch, Extent, Method, sum_of
from clsa.options.config import merge
from clsa.options.run import OptimOptions, RunOptions
from clsa.recipes import resolve
from clsa.system import dist

EXTENT = Extent(
    num_pictures=30, num_classes=3, steps_per_epoch=3, num_steps=12,
    labels=np.arange(30) % 3 - 1, num_exemplars=10,
)  # fmt: skip
ROWS = 8
TINY: dict[str, Any] = {
    "batch_size": ROWS,
    "views": {"size": 16, "weak": {"blur": 0.0}},
    "model": {
        "encoder": "resnet10-w32",
        "projector_hidden": 32,
        "projector_dim": 16,
        "norm_groups": 2,
        "zero_init_last": False,  # weights before a scale of zero have no gradient
    },
    "strong": {"sizes": (16,)},
    "mixture": {
        "num_clusters": 3, "neighbours": 5, "num_positives": 3, "start": 0.0, "refresh_epochs": 2,
    },
}  # fmt: skip
QUEUE = {"queue_size": 12, "key_momentum": 0.9}
# Options of the methods themselves that make them small; one line per method.
TINY_METHODS: dict[str, Any] = {
    "moco": QUEUE,
    "simclr": {},
    "byol": {**QUEUE, "predictor_hidden": 32},
    "simsiam": {"queue_size": 12, "predictor_hidden": 32},
    "swav": {"num_prototypes": 10, "queue_size": 12, "queue_epoch": 0, "freeze_steps": 0},
    "adco": {"key_momentum": 0.9, "num_negatives": 12},
    "instdisc": {"num_negatives": 6, "temperature": 0.2},
    "pirl": {"num_negatives": 6, "temperature": 0.2, "grid": 2, "jigsaw_size": 24, "patch_size": 8},
    "pcl": {**QUEUE, "num_clusters": (2, 3), "warmup_epochs": 0, "num_negatives": 2},
    "moco-v3": {**QUEUE, "predictor_hidden": 32},
    "dino": {"num_prototypes": 10, "key_momentum": 0.9, "freeze_epochs": 0.0},
    "supervised": {},
}
# One recipe per method; tests run it with and without the divergence.
BASES = {
    "moco": "moco-v2",
    "simclr": "simclr",
    "byol": "byol",
    "simsiam": "simsiam",
    "swav": "swav",
    "adco": "adco",
    "instdisc": "instdisc",
    "pirl": "pirl",
    "pcl": "pcl",
    "moco-v3": "moco-v3",
    "dino": "dino",
    "supervised": "supervised",
}


def tiny(recipe: str, **over: Any) -> RunOptions:
    """Options of a recipe with views of 16 pixels and a small network."""
    options = resolve({"recipe": recipe})
    weak, local, strong = options.views.weak, options.views.local, options.strong
    values = merge(TINY, {"recipe": recipe, "method": TINY_METHODS[options.method.name]})
    sizes = {
        "views": {
            "weak": {"sizes": (16,) * len(weak.sizes)},
            "local": {"sizes": (16,) * len(local.sizes[:2])},
        },
        "strong": {"sizes": (16,) * len(strong.sizes)},
        "mixture": {"resolutions": (12,) * len(options.mixture.resolutions)},
    }
    return resolve(merge(merge(values, sizes), over))


def build(recipe: str, **over: Any) -> Method:
    """The method, after its `before_epoch` for the first epoch."""
    method = build_method(tiny(recipe, **over), EXTENT)
    method.before_epoch(0, embed)
    return method


def embed(network: Network) -> Tensor:
    """Random projections of 30 pictures, the same for every method and all weights."""
    generator = torch.Generator().manual_seed(99)
    rows = torch.randn(EXTENT.num_pictures, network.dim, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1)


def batch_of(method: Method, step: int = 0, rows: int = ROWS) -> Batch:
    """Random pixels for every declared view; two of three pictures have a label.

    Rows for the method's companions follow, random pixels too.
    """
    companions = method.companions()
    rows += companions.count if companions else 0
    generator = torch.Generator().manual_seed(step)
    views = [
        torch.randn(rows, 3, spec.size, spec.size, generator=generator)
        for spec in method.view_specs
    ]
    index = (torch.arange(rows) + step * rows) % EXTENT.num_pictures
    return Batch(views, index, index % 3 - 1, step)


def share(batch: Batch) -> Batch:
    """This rank's rows: its share of the pictures, then of their companions."""
    parts = np.arange(ROWS), np.arange(ROWS, len(batch.index))
    mine = np.concatenate([np.split(part, dist.world_size())[dist.rank()] for part in parts])
    views = [view[mine] for view in batch.views]
    return Batch(views, batch.index[mine], batch.labels[mine], batch.step)


def total(method: Method, batch: Batch) -> Tensor:
    """What training minimises."""
    return sum_of(method(batch).losses.values())


def train(
    method: Method, steps: int, first: int = 0, optimizer: Any = None
) -> torch.optim.Optimizer:
    """Whole steps of plain SGD on batches of `batch_of`; a new epoch begins every three steps."""
    optimizer = optimizer or build_optimizer(method, OptimOptions())
    set_lr(optimizer, 0.05)
    for step in range(first, first + steps):
        if step and step % EXTENT.steps_per_epoch == 0:
            method.before_epoch(step // EXTENT.steps_per_epoch, embed)
        output = method(batch_of(method, step))
        sum_of(output.losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(output.state, step)
    return optimizer


def shared_run(recipe: str, stronger: bool, steps: int = 4) -> dict[str, Any]:
    """Gradients of each step and the last state, over all processes, batch norm frozen."""
    method = build(recipe, stronger=stronger).eval()
    optimizer = build_optimizer(method, OptimOptions(), method.fixed_rate)
    set_lr(optimizer, 0.005)  # small, so that the effect of a ReLU flipped by rounding stays small
    gradients = []
    for step in range(steps):
        output = method(share(batch_of(method, step)))
        sum_of(output.losses.values()).backward()
        for parameter in method.parameters():
            if parameter.grad is not None:  # what DistributedDataParallel does
                parameter.grad = dist.all_sum(parameter.grad) / dist.world_size()
        gradients.append([p.grad.clone() for p in method.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(output.state, step)
    return {"gradients": gradients, "state": method.state_dict()}


def rank_main(rank: int, world: int, store: str, out: str, cases: list[tuple[str, bool]]) -> None:
    """One of `world` processes: every case in turn, each saved."""
    torch.set_num_threads(1)
    td.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    for recipe, stronger in cases:
        torch.save(shared_run(recipe, stronger), Path(out) / f"{recipe}-{stronger}-{rank}.pt")
    td.destroy_process_group()


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Norm of the difference divided by the norm of `theirs`, over all tensors together."""
    a, b = (torch.cat([x.double().ravel() for x in each]) for each in (ours, theirs))
    return float((a - b).norm() / b.norm())
