"""Fine-tuning on few labels: all layers of a copy of the encoder, and a new linear layer."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clsa import color, views
from clsa.command_options import EvaluateOptions
from clsa.data import batches
from clsa.evaluate.features import extract, frozen
from clsa.evaluate.linear import MOMENTUM, SCALE, new_classifier
from clsa.evaluate.results import accuracies
from clsa.evaluate.split import Split
from clsa.options import DataOptions, ViewOptions
from clsa.order import Order

VIEW = 1002
DROPS, DROP = (0.6, 0.8), 0.2
LEAST_STEPS = 8


def finetune(
    encoder: nn.Module,
    parts: Split,
    shown: ViewOptions,
    options: EvaluateOptions,
    data: DataOptions,
) -> dict[str, float]:
    """`top1`, `balanced` and, from five classes on, `top5` in percent after the last epoch.

    The semi-supervised protocol of SwAV's code for 10 % of ImageNet: random crops (0.08 to 1 of
    the area) and flips, SGD with momentum 0.9, no weight decay, 20 epochs, rates of 0.01 for the
    encoder and 0.2 for the new layer, both to a fifth at epochs 12 and 16; batch norm learns too.
    For 1 % it has 0.02 and 5.

    Departures: a batch is 256 pictures only where an epoch then has eight steps, else an eighth of
    the labelled ones; no batch norm across processes; no best epoch, as it would be chosen on
    the pictures it is judged on.

    Args:
        encoder: left as it is; on the device.
        parts: bank to learn from, queries to be judged on.
        shown: side and centre crop of the pictures.
        options: epochs, rates, seed, batch size.
        data: how the pictures are read.
    """
    device = next(encoder.parameters()).device
    tuned = copy.deepcopy(encoder).train().requires_grad_(True)
    bank, queries, _ = parts
    width = int(encoder.head_hidden_size)  # pyright: ignore[reportArgumentType]
    classifier = new_classifier(width, len(bank.classes), options.seed).to(device)
    groups = [
        {"params": list(tuned.parameters()), "lr": options.finetune_lr},
        {"params": list(classifier.parameters()), "lr": options.finetune_head_lr},
    ]
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM)
    first = [group["lr"] for group in optimizer.param_groups]
    batch_size = min(options.batch_size, max(2, len(bank) // LEAST_STEPS), len(bank))
    order = Order(len(bank), batch_size, options.seed)
    spec = views.ViewSpec("finetune", shown.size, SCALE, VIEW)
    last_step = options.finetune_epochs * order.steps_per_epoch
    with torch.enable_grad():
        for step, batch in enumerate(batches(bank, [spec], order, 0, last_step, device, data)):
            share = step // order.steps_per_epoch / options.finetune_epochs
            for group, lr in zip(optimizer.param_groups, first, strict=True):
                group["lr"] = lr * DROP ** sum(share >= drop for drop in DROPS)
            images = color.normalize(batch.crops[0].float() / 255, views.MEAN, views.STD)
            images = images.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(classifier(tuned(images).float()), batch.labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with frozen(tuned):
        rows, features = extract(
            tuned, queries, np.arange(len(queries)), shown, device, options.batch_size
        )
        scores = classifier(features)
    labels = torch.from_numpy(queries.labels[rows]).to(device)
    found = accuracies(scores.argmax(1), labels)
    if scores.shape[1] >= 5:
        right = (scores.topk(5, dim=1).indices == labels[:, None]).any(1)
        found["top5"] = 100 * right.double().mean().item()
    return found
