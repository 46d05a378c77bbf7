"""One rank of a two-process run, started by test_train.py; saves its gradients and weights."""

import sys
from pathlib import Path

import torch

from clsa.learning.optim import build_optimizer
from clsa.loading.loader import batches
from clsa.loading.order import Order
from clsa.methods import build_method
from clsa.methods.method import Extent
from clsa.pictures.opening import open_source
from clsa.recipes import resolve
from clsa.runs.computing import begin
from clsa.runs.folder import RunFolder
from clsa.runs.state import State
from clsa.system import dist
from clsa.system.signals import Stop
from clsa.training.step import Run, parallel, train_step


def main(pictures: str, out: str, recipe: str, steps: int) -> None:
    """Take `steps` steps with frozen batch norm; save gradients of each and the final weights."""
    options = resolve(
        {
            "recipe": recipe,
            "data": {"data": pictures, "workers": 0},
            "batch_size": 8,
            "precision": "fp32",
            "views": {"size": 16, "weak": {"sizes": (16,)}},
            "model": {"projector_hidden": 32, "projector_dim": 16, "norm_groups": 2},
            "method": {"queue_size": 20},
        }
    )
    device = torch.device("cpu")
    with dist.process_group(device):
        source = open_source(pictures, "train", options.data)
        order = Order(len(source), 8, 0)
        extent = Extent(len(source), len(source.classes), order.steps_per_epoch, steps)
        method = build_method(options, extent).eval()
        optimizer = build_optimizer(method, options.optim, method.fixed_rate)
        state = State(method, optimizer, "", RunFolder(Path(out)))
        run = Run(options, device, order.steps_per_epoch, Stop(), begin(options, device))
        model = parallel(method, options)
        seen: list[list[torch.Tensor]] = []
        hook = optimizer.register_step_pre_hook(
            lambda *_: seen.append(
                [p.grad.clone() for p in method.parameters() if p.grad is not None]
            )
        )
        stream = batches(source, method.view_specs, order, 0, steps, device, options.data)
        for crops in stream:
            train_step(model, state, crops, run)
        hook.remove()
        result = {"grads": seen, "state": method.state_dict()}
        torch.save(result, f"{out}/rank{dist.rank()}-of-{dist.world_size()}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
