"""InstDisc (Wu et al. 2018): every picture is a class of its own, represented by a memory row."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clsa.learning.bank import Memory
from clsa.learning.losses import Stream, contrast, lowest_info_nce, noise_contrastive, streams
from clsa.learning.models import Network
from clsa.methods.method import Batch, Comparison, Extent, Landmarks, Method, Output, sum_of
from clsa.options.methods import InstDiscOptions
from clsa.options.run import RunOptions
from clsa.system import dist
from clsa.views.specs import weak_specs


class InstDisc(Method):
    """Find each picture's own memory row v_i among all others: L = noise_contrastive(f, v_i, V').

    V' are m rows drawn for this step. Z is estimated once, from the first batch, as n times the
    mean of exp(f . v / T) over all rows that its queries are compared with (the paper, 3.2). With
    `num_negatives=0`: L = info_nce over all n rows, as the code does for CIFAR. After the step
    v_i <- norm(r v_i + (1 - r) f_i). With several weak views the loss is averaged, and the row
    moves to the mean of their projections; the paper has one view.

    For small sets use `num_negatives=0`: with 512 pictures, the Z of the random initial memory is
    far too small. The noise-contrastive loss stayed above chance for 320 steps, in which the
    softmax learned.

    Deviation from the official code: the drawn rows are shared by the batch (`Memory.compare`).
    Like that code, it has no proximal term (Eq. 10 of the paper).
    """

    holds_pictures = True
    log_normalizer: Float[Tensor, ""]

    def __init__(self, options: RunOptions, extent: Extent):
        super().__init__(options, extent)
        assert isinstance(options.method, InstDiscOptions)
        self.options, self.seed = options.method, options.seed
        self.view_specs = weak_specs(options.views)
        self.network = Network(options.model, options.seed, [spec.size for spec in self.view_specs])
        self.num_pictures, dim = extent.num_pictures, self.network.dim
        self.memory = Memory(self.num_pictures, dim, options.seed)
        self.register_buffer("log_normalizer", torch.tensor(math.log(self.num_pictures)))
        count, temperature = self.options.num_negatives, self.options.temperature
        chance = math.log(self.num_pictures)
        floor = lowest_info_nce(self.num_pictures, dim, temperature)
        if count:  # the floor: own row at 1, Z of rows spread over the sphere
            noise = count * math.log1p(1 / count)
            chance = math.log1p(count) + noise
            surest = 1 / temperature - 1 / (2 * dim * temperature**2) - math.log(count)
            floor = noise - F.logsigmoid(torch.tensor(surest)).item()
        self.landmarks = Landmarks("contrast", chance, floor)

    def forward(self, batch: Batch) -> Output:
        """The loss of finding each picture's own row among the drawn rows, or among all rows."""
        queries = [self.network(view) for view in batch.views]
        count, temperature = self.options.num_negatives, self.options.temperature
        bank, own, candidates = self.memory.compare(batch.index, count, self.seed, batch.step)
        compared = streams(queries, bank, temperature, candidates)
        log_normalizer = self.log_normalizer
        if batch.step == 0:
            log_normalizer = self._estimate(compared)
        if count:
            rows, drawn = bank.split([len(own), count])
            total = sum_of(
                noise_contrastive(q, rows, drawn, log_normalizer, self.num_pictures, temperature)
                for q in queries
            )
        else:
            total = contrast(compared, bank, own)
        state = batch.index, torch.stack(queries).detach().mean(0), log_normalizer
        comparisons = [Comparison([each], bank, own, candidates) for each in compared]
        return Output({"contrast": total / len(queries)}, state, comparisons, {})

    def _estimate(self, compared: list[Stream]) -> Float[Tensor, ""]:
        """ln Z = ln n + ln mean exp(f . v / T), over the global batch; used if rows are drawn."""
        lse = dist.all_gather(torch.cat([stream.lse for stream in compared]))
        num_seen = len(lse) * (1 + self.options.num_negatives)
        return lse.logsumexp(0) + math.log(self.num_pictures / num_seen)

    def after_step(
        self, state: tuple[Int[Tensor, " b"], Float[Tensor, "b D"], Float[Tensor, ""]], step: int
    ) -> None:
        """Move the rows of the pictures just seen; keep the first batch's normaliser."""
        index, features, log_normalizer = state
        self.memory.update(index, features, self.options.row_momentum)
        if step == 0:
            self.log_normalizer.copy_(log_normalizer)
