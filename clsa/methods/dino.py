"""DINO (Caron et al. 2021): follow the momentum network's centred and sharpened assignments."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clsa.learning.assignments import entropy, sharpened, similarity, swapped_prediction
from clsa.learning.bank import Prototypes
from clsa.learning.losses import lowest_info_nce
from clsa.learning.models import Network, momentum_copy, move_towards
from clsa.learning.optim import momentum_at
from clsa.methods.method import Batch, Comparison, Extent, Landmarks, Method, Output
from clsa.options.methods import DINOOptions
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.views.specs import weak_specs


class DINO(Method):
    """Self-distillation: L = swapped_prediction(softmax((g_t - c) / T_t), g_s, T).

    g = z . w_k / |w_k| with z = norm(g(f(view))) the head's normalised bottleneck and w the rows of
    the last layer (its magnitude is 1). The teacher, a momentum copy of network and rows, sees only
    the full-size views; its centre moves by c <- m c + (1 - m) mean g_t, a mean over these views
    and the global batch. The last layer is frozen for `freeze_epochs`. The metric
    `teacher_entropy` shows a collapse: it is then 0 or ln K. With `stronger`, the student's unit
    rows are the bank.

    Deviations from the code: T_t rises at every step, not every epoch; frozen rows have a zero
    gradient instead of none, so adamw decays their length (no effect on g) and counts these steps;
    linear layers keep torch's initialisation; no stochastic depth; each view is encoded on its own.
    """

    has_positives = False
    center: Float[Tensor, " K"]

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, DINOOptions)
        self.options, self.num_steps = options.method, extent.num_steps
        self.freeze_steps = self.options.freeze_epochs * extent.steps_per_epoch
        self.warmup_steps = self.options.teacher_warmup_epochs * extent.steps_per_epoch
        self.view_specs = weak_specs(options.views, least=2)
        self.num_assigning = len(self.view_specs) - len(options.views.local.sizes)
        self.network = Network(options.model, options.seed, [spec.size for spec in self.view_specs])
        count, dim = self.options.num_prototypes, self.network.dim
        self.prototypes = Prototypes(count, dim, options.seed + 2)
        self.teacher = momentum_copy(self.network)
        self.teacher_prototypes = momentum_copy(self.prototypes)
        self.register_buffer("center", torch.zeros(count))
        floor = lowest_info_nce(count, dim, self.options.temperature)
        self.landmarks = Landmarks("distillation", math.log(count), floor)

    def teacher_temperature(self, step: int) -> float:
        """T_t at `step`: it moves linearly from the first value to the last."""
        start, end = self.options.first_teacher_temperature, self.options.teacher_temperature
        return start + (end - start) * min(1.0, step / max(1.0, self.warmup_steps))

    def forward(self, batch: Batch) -> Output:
        """The cross-entropy of every view with the teacher's assignments of the other views."""
        rows = F.normalize(self.prototypes(frozen=batch.step < self.freeze_steps), dim=1)
        queries = [self.network(view) for view in batch.views]
        scores = [similarity(query, rows) for query in queries]
        with torch.no_grad():
            fixed = F.normalize(self.teacher_prototypes(), dim=1)
            views = batch.views[: self.num_assigning]
            taught = [similarity(self.teacher(view), fixed) for view in views]
            mean = dist.all_sum(torch.stack(taught).mean((0, 1))) / dist.world_size()
        cold = self.teacher_temperature(batch.step)
        targets = [sharpened(each, self.center, cold) for each in taught]
        loss = swapped_prediction(targets, scores, self.options.temperature)
        comparisons = [Comparison([query], rows.detach()) for query in queries[: len(views)]]
        metrics = {"teacher_entropy": entropy(torch.cat(targets))}
        return Output({"distillation": loss}, mean, comparisons, metrics)

    def after_step(self, state: Float[Tensor, " K"], step: int) -> None:
        """Move the teacher towards the student, and the centre towards the batch's mean."""
        momentum = momentum_at(self.options, step, self.num_steps)
        move_towards(self.teacher, self.network, momentum)
        move_towards(self.teacher_prototypes, self.prototypes, momentum)
        self.center.lerp_(state, 1 - self.options.center_momentum)
