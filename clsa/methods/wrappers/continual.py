"""Continual pretraining around a method (CCSSL; Lin, Wang, Lin 2021): learn, but forget little."""

from typing import Any, cast

import torch
from torch import Tensor

from clsa.learning.assignments import soft_bank_cross_entropy
from clsa.learning.bank import KeyQueue
from clsa.learning.losses import info_nce
from clsa.learning.models import momentum_copy, move_towards
from clsa.methods.method import Batch, Comparison, Embed, Extent, Method, Output
from clsa.methods.wrappers.wrapper import Wrapper
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.system.errors import ClsaError
from clsa.views.specs import centre_spec


class Continual(Wrapper):
    """A method on the pictures of a stage and on exemplars from the stages before it.

    From the second stage on, L = L_base + extra_weight L_extra + distill_weight L_kd.
    L_extra: every query is contrasted with its own key and an extra queue X of exemplar keys,
    CE([q . k; q . X] / T, 0), at the base's temperature. L_kd: over the exemplars O of the global
    batch, mean_i KL(softmax(f_T(q_i) . f_T(a_j) / T_t) || softmax(f(q_i) . f(a_j) / T)), where a_j
    is the centre crop of j; the student's anchors receive gradient too. At the start of a stage
    the teacher f_T is a copy of the network; after each epoch it moves towards the network by
    1 - teacher_momentum. With `Stronger` the rows of X join each bank.

    Two defects of the published code are fixed: the teacher takes over the running statistics of
    batch norm (copied at the start of the stage, then moved by the same momentum), and it stays in
    evaluation mode. Anchors come from all processes, not from one; with a single exemplar in the
    batch L_kd is 0.
    """

    def __init__(self, base: Method, options: RunOptions, extent: Extent):
        super().__init__(base, options, extent)
        if not base.has_positives:
            why = f"{options.method.name} has no positives to contrast with the extra queue"
            hint = "choose another recipe, or --continual.keep replay"
            raise ClsaError("continual.keep distill", why, hint)
        self.options, self.stronger = options.continual, options.stronger
        self.temperature: float = getattr(options.method, "temperature", 0.2)
        self.teacher = momentum_copy(base.network).eval()
        self.extra = KeyQueue(self.options.extra_keys, base.network.dim, options.seed)
        self.num_exemplars = extent.num_exemplars
        self.num_current = extent.num_pictures - extent.num_exemplars
        names = [spec.name for spec in base.view_specs]
        self.place = max(i for i, name in enumerate(names[:2]) if name.startswith(("key", "weak")))
        if self.num_exemplars:
            self.view_specs = [*base.view_specs, centre_spec(options.views, len(base.view_specs))]

    def train(self, mode: bool = True) -> "Continual":
        """As for any module, but the teacher stays in evaluation mode."""
        super().train(mode).teacher.eval()
        return self

    @torch.no_grad()
    def begin(self, keys: Tensor) -> None:
        """Start a stage: copy the network, with its statistics, to the teacher.

        Args:
            keys: first rows of the extra queue, repeated if there are too few.
        """
        self.teacher.load_state_dict(self.network.state_dict())
        self.extra.start(keys)

    @torch.no_grad()
    def before_epoch(self, epoch: int, embed: Embed) -> dict[str, float]:
        """Move the teacher after each epoch of a stage; then as the base."""
        if epoch and self.num_exemplars:
            momentum = self.options.teacher_momentum
            move_towards(self.teacher, self.network, momentum, statistics=True)
        return self.base.before_epoch(epoch, embed)

    def forward(self, batch: Batch) -> Output:
        """The base's terms; if there are exemplars, L_extra and L_kd too."""
        *views, anchors = batch.views if self.num_exemplars else [*batch.views, None]
        output = self.base(batch._replace(views=views))
        if anchors is None:
            return output._replace(state=(output.state, None, None))
        mine = batch.index >= self.num_current
        old, comparisons = dist.all_gather(mine), output.comparisons
        keys = [c.bank[cast(Tensor, c.positive)] for c in comparisons]
        query, view = comparisons[0].rows()[0], views[self.place]
        query = query if self.has_keys else self.network(view)
        kl = (self._distilled(query, view, anchors, old) * mine).sum()
        extra = self._extra(comparisons, keys)
        share = self.options.distill_weight * dist.world_size() / old.sum().clamp(min=1)
        added = {"extra": self.options.extra_weight * extra, "distill": share * kl}
        if self.stronger:
            comparisons = [c.with_bank(torch.cat([c.bank, self.extra.rows])) for c in comparisons]
        state = output.state, dist.all_gather(keys[0]), old
        return Output({**output.losses, **added}, state, comparisons, output.metrics)

    def _extra(self, comparisons: list[Comparison], keys: list[Tensor]) -> Tensor:
        """L_extra, mean over the comparisons and their queries."""
        own, terms = torch.arange(len(keys[0]), device=keys[0].device), []
        for comparison, key in zip(comparisons, keys, strict=True):
            bank, itself = torch.cat([key, self.extra.rows]), own[:, None] == own
            for query in comparison.rows():
                terms.append(info_nce(query, bank, own, self.temperature, itself))
        return torch.stack(terms).mean()

    def _distilled(self, query: Tensor, view: Tensor, anchors: Tensor, old: Tensor) -> Tensor:
        """KL(t || s) of each row over the anchors of the exemplars of all processes."""
        bank = dist.all_gather_with_grad(self.network(anchors))
        with torch.no_grad():
            target, target_bank = self.teacher(view), dist.all_gather(self.teacher(anchors))
        warm, cold = self.options.temperature, self.options.teacher_temperature
        cross, entropy = soft_bank_cross_entropy(target, target_bank, cold, query, bank, warm, old)
        return cross - entropy

    def after_step(self, state: Any, step: int) -> None:
        """As the base; then enqueue the keys of exemplars in the extra queue."""
        inner, keys, old = state
        self.base.after_step(inner, step)
        if keys is not None:
            self.extra.enqueue_chosen(keys, old)
