"""Fine-tuning: train all layers of a copy of the encoder, and a new linear layer."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clsa.evaluate.classify.linear import fitting, normalised, set_rates, sgd
from clsa.evaluate.features.extract import extract, frozen
from clsa.evaluate.features.split import Split
from clsa.evaluate.progress import watched
from clsa.evaluate.results.heads import Head, new_layer
from clsa.evaluate.results.records import Found, accuracies_of, last_and_best
from clsa.learning.models import group_norms
from clsa.loading.loader import batches
from clsa.loading.order import Order
from clsa.options.cards import FinetuneCard
from clsa.options.run import DataOptions, ViewOptions
from clsa.system import dist
from clsa.views.specs import ViewSpec

VIEW = 1002
LEAST_STEPS, LEAST_BATCH = 8, 16


def finetune(
    encoder: nn.Module,
    parts: Split,
    shown: ViewOptions,
    card: FinetuneCard,
    seed: int,
    data: DataOptions,
) -> tuple[list[Found], int, Head]:
    """Accuracies after the last and the best epoch, number of pictures judged, and the last head.

    The semi-supervised protocols of SwAV's code: random crops (0.08 to 1 of the area) and flips,
    SGD with momentum 0.9, no weight decay, 20 epochs. Rates of encoder and new layer are 0.01 and
    0.2 for 10 % of ImageNet, 0.02 and 5 for 1 %, and fall to a fifth after 12 and after 16 epochs.
    Batch norm learns too, over the batches of all processes. CLIM's protocol: rates 1e-4 and 10,
    which fall to a tenth after 20 and after 40 of 60 epochs. The best epoch is chosen on the
    pictures it is judged on.

    Departure: the card's batch size is used only if an epoch then has at least eight steps.
    Otherwise a batch is an eighth of the labelled pictures, but at least 16, rounded down to a
    multiple of 8.

    Args:
        encoder: on the device; it is not changed.
        parts: bank to learn from, queries to judge on.
        shown: side and centre crop of the pictures.
        card: schedule, rates and crops.
        seed: of the layer, the order and the crops.
        data: how the pictures are read.
    """
    device = next(encoder.parameters()).device
    tuned = copy.deepcopy(encoder).train().requires_grad_(True)
    group_norms(tuned, num_groups=1)
    bank, queries, _ = parts
    width = int(encoder.head_hidden_size)  # pyright: ignore[reportArgumentType]
    layer = new_layer(width, len(bank.classes), seed).to(device)
    groups = [
        {"params": list(tuned.parameters()), "lr": card.lr},
        {"params": list(layer.parameters()), "lr": card.head_lr},
    ]
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = sgd(groups, card)
    asked = min(card.batch_size, max(LEAST_BATCH, len(bank) // LEAST_STEPS))
    order = Order(len(bank), fitting(card.batch_size, min(asked, len(bank))), seed)
    spec = ViewSpec("finetune", shown.size, card.scale, VIEW)
    last_step = card.epochs * order.steps_per_epoch
    measured: list[dict[str, float]] = []
    labels = torch.empty(0)
    stream = batches(bank, [spec], order, 0, last_step, device, data)
    for step, batch in enumerate(watched(stream, last_step, "fine-tuning"), start=1):
        set_rates(optimizer, (step - 1) // order.steps_per_epoch, card)
        with torch.enable_grad():
            scores = layer(tuned(normalised(batch)).float())
            loss = F.cross_entropy(scores, batch.labels.to(device), reduction="sum")
            (loss / order.batch_size).backward()
        dist.sum_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad()
        if step % order.steps_per_epoch == 0:
            with frozen(tuned):
                everything = np.arange(len(queries))
                rows, features = extract(tuned, queries, everything, shown, device, shared=True)
                labels = torch.from_numpy(queries.labels[rows]).to(device)
                measured.append(accuracies_of(layer(features), labels))
    return last_and_best(measured), len(labels), Head(layer, tuned.eval())
