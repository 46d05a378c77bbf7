"""The paper's linear evaluation: a classifier trained by SGD on crops seen by a frozen encoder."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from clsa import color, views
from clsa.command_options import EvaluateOptions
from clsa.data import batches
from clsa.evaluate.features import encode
from clsa.evaluate.results import accuracies
from clsa.options import DataOptions
from clsa.order import Order
from clsa.sources import Source

SCALE = (0.08, 1.0)
MOMENTUM = 0.9
FINAL_LR = 0.01
INIT_STD = 0.01
VIEW = 1001


def linear(
    encoder: nn.Module,
    bank: Source,
    queries: tuple[Float[Tensor, "n F"], Int64[Tensor, "n"]],
    size: int,
    options: EvaluateOptions,
    data: DataOptions,
) -> dict[str, float]:
    """`top1` and `balanced` in percent after the last epoch; with `-best` those of the best one.

    CLSA and its code: random crops (0.08 to 1 of the area) and flips, drawn anew each epoch; SGD
    with momentum 0.9, no weight decay, batches of 256, rate from 10 to 0.01 along a cosine that
    moves at every epoch, 100 epochs; weights from N(0, 0.01^2), biases 0. The best epoch is chosen
    on the very pictures it is judged on, as published numbers often are; trust the last one.

    Departures: the last, partial batch of an epoch is left out; the centre crops of `queries` are
    encoded once, as a frozen encoder never sees them differently.

    Args:
        encoder: inside `features.frozen`.
        bank: labelled pictures to learn from.
        queries: features of centre crops, and labels.
        size: side of the crops in pixels.
        options: epochs, rate, seed, batch size.
        data: how the pictures are read.
    """
    features, labels = queries
    device = features.device
    classifier = new_classifier(features.shape[1], len(bank.classes), options.seed).to(device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=options.linear_lr, momentum=MOMENTUM)
    order = Order(len(bank), min(options.batch_size, len(bank)), options.seed)
    spec = views.ViewSpec("linear", size, SCALE, VIEW)  # mirrored half of the time
    last_step = options.linear_epochs * order.steps_per_epoch
    measured: list[dict[str, float]] = []
    stream = batches(bank, [spec], order, 0, last_step, device, data)
    for step, batch in enumerate(stream, start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr_at((step - 1) // order.steps_per_epoch, options)
        images = color.normalize(batch.crops[0].float() / 255, views.MEAN, views.STD)
        seen = encode(encoder, images, options.batch_size)
        with torch.enable_grad():
            F.cross_entropy(classifier(seen), batch.labels.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % order.steps_per_epoch == 0:
            measured.append(accuracies(classifier(features).argmax(1), labels))
    best = max(measured, key=lambda epoch: epoch["top1"])
    return measured[-1] | {f"{name}-best": value for name, value in best.items()}


def lr_at(epoch: int, options: EvaluateOptions) -> float:
    """0.01 + (lr - 0.01) (1 + cos(pi epoch / epochs)) / 2, epochs counted from 0."""
    share = (1 + math.cos(math.pi * epoch / options.linear_epochs)) / 2
    return FINAL_LR + (options.linear_lr - FINAL_LR) * share


def new_classifier(features: int, num_classes: int, seed: int) -> nn.Linear:
    """A linear layer with weights from N(0, 0.01^2) and no bias yet."""
    layer = nn.Linear(features, num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_(0, INIT_STD, generator=generator)
        layer.bias.zero_()
    return layer
