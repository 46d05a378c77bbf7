"""Inputs and outputs of diagnostics: a run's networks and pictures, and the numbers found."""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from clsa.evaluate.features.extract import drawn_views, encode
from clsa.evaluate.features.split import Split, split
from clsa.options.commands import DiagnoseOptions
from clsa.pictures.opening import open_source, open_val
from clsa.runs.saved_encoder import data_of
from clsa.runs.snapshots import Snapshot, open_run
from clsa.system import dist
from clsa.system.errors import ClsaError, Exit
from clsa.views.specs import ViewSpec, strong_eval_spec, strong_specs, weak_specs

KEY_VIEW, WEAK_VIEW, STRONG_VIEW = 1004, 1005, 1006
LEAST = 4


class Finding(NamedTuple):
    """One number and everything it depends on."""

    part: str
    name: str
    value: float
    unit: str
    encoder: str
    """random, trained, or the step of a checkpoint."""
    n: int
    """Number of pictures."""
    seed: int
    settings: str
    encoder_digest: str
    data_digest: str


class Part(NamedTuple):
    """The findings of one part, and functions that draw its figures."""

    findings: list[Finding]
    figures: dict[str, Callable[[], bytes]]


class Inputs:
    """The networks and pictures of a run, shared by all parts."""

    def __init__(self, options: DiagnoseOptions):
        self.options, self.opened = options, open_run(options.run)
        self.device = dist.pick_device(options.device)
        self.snapshots = self.opened.snapshots
        for snapshot in self.snapshots:
            for module in (snapshot.encoder, snapshot.query, snapshot.key):
                if module is not None:
                    module.to(self.device)
        self.views, self.data = self.opened.facts.views, data_of(options.data, self.opened.facts)
        self.source = open_source(self.data.data, "train", self.data)
        self.data_digest = self.source.digest()

    @cached_property
    def parts(self) -> Split:
        """Labelled pictures: the same bank and queries that `clsa evaluate` uses."""
        return split(self.source, open_val(self.data, self.source.classes), self.options.seed)

    def finding(
        self, part: str, name: str, value: float, unit: str, snapshot: Snapshot, n: int,
        settings: str = "", data_digest: str = "",
    ) -> Finding:  # fmt: skip
        """A number of one snapshot, with the seed and the digests it depends on."""
        digest = data_digest or self.data_digest
        seed = self.options.seed
        return Finding(
            part, name, value, unit, snapshot.name, n, seed, settings, snapshot.digest, digest
        )

    def note(self, n: int, more: str = "") -> str:
        """The small print of a figure."""
        recipe = f"{self.opened.facts.recipe}, step {self.opened.facts.step}"
        return f"{recipe} · n = {n:,} pictures{more} · seed {self.options.seed}"

    def specs(self) -> dict[str, ViewSpec]:
        """Key, weak and strong view with the run's own options, but with separate random draws.

        A run without strong views gets the default strong operations, at the size of a weak view.
        """
        run = self.opened.options
        weak = weak_specs(self.views, keyed=True)[: 1 + len(self.views.weak.sizes)]
        key, query = weak[0], weak[min(1, len(weak) - 1)]
        found = {"key": key._replace(view=KEY_VIEW), "weak": query._replace(view=WEAK_VIEW)}
        if run is None or not run.stronger:  # the run has no strong views
            ops = strong_eval_spec(self.views).ops if run is None else run.strong
            strong = query._replace(name="strong0", ops=ops)
        else:
            strong = strong_specs(self.views, run.strong, len(weak))[0]
        return {**found, "strong": strong._replace(view=STRONG_VIEW)}

    def encoded(
        self, spec: ViewSpec, rows: Int64[np.ndarray, " n"], networks: Iterable[nn.Module]
    ) -> tuple[Int64[np.ndarray, " m"], list[Float32[Tensor, "m F"]]]:
        """Numbers of the readable pictures and, for each network, its rows for one drawn view."""
        images = drawn_views(self.source, rows, spec, self.options.seed, self.device)
        return self.through(images, networks)

    def through(
        self, images: Iterable[tuple[np.ndarray, Tensor]], networks: Iterable[nn.Module]
    ) -> tuple[Int64[np.ndarray, " m"], list[Float32[Tensor, "m F"]]]:
        """Numbers of the pictures of a stream, and the rows of each network for them."""
        chosen = list(networks)
        numbers: list[np.ndarray] = []
        found: list[list[Tensor]] = [[] for _ in chosen]
        for kept, batch in images:
            numbers.append(kept)
            for each, network in zip(found, chosen, strict=True):
                each.append(encode(network, batch, self.options.batch_size))
        if sum(map(len, numbers)) < LEAST:
            why = f"only {sum(map(len, numbers))} of its pictures can be read"
            raise ClsaError(self.data.data, why, f"give {LEAST} or more", Exit.BAD_DATA)
        return np.concatenate(numbers), [torch.cat(each) for each in found]


def spread_over(count: int, limit: int) -> Int64[np.ndarray, " n"]:
    """At most `limit` evenly spaced numbers from 0 to `count` - 1, both ends included."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)
