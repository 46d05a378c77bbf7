"""Runs our side of a step, or parts of it, as `fit` does: batches, `train_step`, journal."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor

from clsa.learning.models import autocast
from clsa.learning.optim import build_optimizer
from clsa.loading import loader
from clsa.loading.crops import Crops
from clsa.loading.order import Order
from clsa.methods import build_method
from clsa.methods.method import Batch, Extent
from clsa.options.config import merge
from clsa.options.run import RunOptions
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Source
from clsa.recipes import resolve
from clsa.runs.computing import begin
from clsa.runs.folder import RunFolder
from clsa.runs.journal import Journal
from clsa.runs.state import State
from clsa.system.machine import keep_freed_memory
from clsa.system.signals import Stop
from clsa.training.step import Run, make_views, parallel, train_step

CPU = torch.device("cpu")
LAST_STEP = 1_000_000  # the batches never end


class Drive:
    """A run that only steps, without resuming, probing or saving; inside `with` it has a journal.

    Args:
        recipe: name of the recipe.
        source: pictures (default: those that the options name).
        chosen: which views `views` makes; `step` needs all.
        device: where the run computes.
        values: options that override the recipe's.
    """

    def __init__(
        self,
        recipe: str,
        source: Source | None = None,
        chosen: slice = slice(None),
        device: torch.device = CPU,
        **values: Any,
    ):
        keep_freed_memory()
        given = {"recipe": recipe, "data": {"data": "clipart"}}
        self.options: RunOptions = resolve(merge(given, values))
        options = self.options
        self.device, self.batch_size = device, options.batch_size
        self.source = source or open_source(options.data.data, "train", options.data)
        self.order = Order(len(self.source), options.batch_size, options.seed)
        steps = self.order.steps_per_epoch
        extent = Extent(len(self.source), len(self.source.classes), steps, steps * options.epochs)
        self.method = build_method(options, extent).to(device)
        optimizer = build_optimizer(self.method, options.optim, self.method.fixed_rate)
        self.state = State(self.method, optimizer, "", RunFolder(options.out))
        self.run = Run(options, device, steps, Stop(), begin(options, device))
        self.model = parallel(self.method, options)
        self.specs = self.method.view_specs[chosen]
        self.batches = loader.batches(
            self.source, self.specs, self.order, 0, LAST_STEP, device, options.data
        )
        self.journal: Journal | None = None
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        self.state.folder = RunFolder(Path(self.stack.enter_context(TemporaryDirectory())))
        marks, steps = self.method.landmarks, self.run.steps_per_epoch
        journal = Journal(self.state.folder, 0, LAST_STEP, steps, marks, speaks=True)
        journal.console.quiet = True
        self.journal = self.stack.enter_context(journal)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def next_crops(self) -> Crops:
        """Crops of the next batch, on the device."""
        return next(self.batches)

    def step(self) -> None:
        """One whole step: wait for the data, train, write the line of the log if it is due."""
        stats = train_step(self.model, self.state, self.next_crops(), self.run)
        if self.journal is not None:
            self.journal.count(self.batch_size, 0.0)
            if self.state.step % self.options.log_every == 0:
                self.journal.log(self.state.step, stats.numbers())

    def views(self) -> Batch:
        """Only the crops and pixel work of one batch."""
        return make_views(self.next_crops(), self.specs, self.state.step, self.run)

    def encoder_alone(self) -> Callable[[], None]:
        """The part that every method needs: the networks' forward and backward on the same shapes.

        The key network sees the key view without gradient, the trained network sees every query
        with gradient. Both use the recipe's groups in batch norm.
        """
        method = self.method
        generator = torch.Generator().manual_seed(0)
        key, *queries = (self._view(spec.size, generator) for spec in method.view_specs)
        modules = method.named_modules()
        key_network = next(module for name, module in modules if name.endswith("key_network"))

        def once() -> None:
            with autocast(self.device, self.options.precision):
                with torch.no_grad():
                    key_network(key)
                loss = torch.stack([method.network(query).sum() for query in queries]).sum()
            loss.backward()
            self.state.optimizer.zero_grad(set_to_none=True)

        return once

    def _view(self, size: int, generator: torch.Generator) -> Tensor:
        view = torch.randn(self.batch_size, 3, size, size, generator=generator)
        return view.to(self.device).contiguous(memory_format=torch.channels_last)
