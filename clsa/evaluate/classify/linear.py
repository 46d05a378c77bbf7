"""The papers' linear evaluation: a linear layer trained by SGD on a frozen encoder's crops."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from clsa.evaluate.features.extract import encode
from clsa.evaluate.progress import watched
from clsa.evaluate.results.heads import new_layer
from clsa.evaluate.results.records import Found, accuracies_of, last_and_best
from clsa.loading.crops import Crops
from clsa.loading.loader import batches
from clsa.loading.order import Order
from clsa.options.cards import LinearCard, Schedule, SgdCard
from clsa.options.run import DataOptions
from clsa.pictures.sources import Source
from clsa.system import dist
from clsa.system.errors import ClsaError
from clsa.views import color, transform
from clsa.views.specs import ViewSpec

VIEW = 1001
EIGHTH = 8


def linear(
    encoder: nn.Module,
    bank: Source,
    queries: tuple[Float[Tensor, "n F"], Int64[Tensor, "n"]],
    size: int,
    card: LinearCard,
    seed: int,
    data: DataOptions,
) -> tuple[list[Found], nn.Linear]:
    """Accuracies after the last and after the best epoch, and the layer after the last epoch.

    As in the code of MoCo, CLSA and CLIM: new random crops (0.08 to 1 of the area) and flips in
    each epoch; SGD with momentum 0.9, no weight decay, batches of 256, 100 epochs, a rate set for
    each epoch (`rate_at`); weights from N(0, 0.01^2), biases 0. The best epoch is chosen on the
    same pictures it is judged on, as is common in published numbers; trust the last one.

    Departures: the last, partial batch of an epoch is left out; the centre crops of `queries` are
    encoded once, because a frozen encoder gives the same features every time.

    Args:
        encoder: frozen by `extract.frozen`.
        bank: labelled pictures to learn from.
        queries: features of centre crops, and labels.
        size: side of the crops in pixels.
        card: schedule, rates and crops.
        seed: of the layer, the order and the crops.
        data: how the pictures are read.
    """
    features, labels = queries
    device = features.device
    layer = new_layer(features.shape[1], len(bank.classes), seed).to(device)
    optimizer = sgd([{"params": list(layer.parameters()), "lr": card.lr}], card)
    order = Order(len(bank), fitting(card.batch_size, len(bank)), seed)
    spec = ViewSpec("linear", size, card.scale, VIEW)  # the spec mirrors half of the crops
    last_step = card.epochs * order.steps_per_epoch
    measured: list[dict[str, float]] = []
    stream = batches(bank, [spec], order, 0, last_step, device, data)
    for step, batch in enumerate(watched(stream, last_step, "linear probe"), start=1):
        set_rates(optimizer, (step - 1) // order.steps_per_epoch, card)
        with torch.enable_grad():
            loss = F.cross_entropy(
                layer(dist.all_gather(encode(encoder, normalised(batch), order.batch_size))),
                dist.all_gather(batch.labels.to(device)),
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % order.steps_per_epoch == 0:
            measured.append(accuracies_of(layer(features), labels))
    return last_and_best(measured), layer


def normalised(batch: Crops) -> Float[Tensor, "b 3 S S"]:
    """The first crops of a batch, normalised for the encoder."""
    images = color.normalize(batch.crops[0].float() / 255, transform.MEAN, transform.STD)
    return images.contiguous(memory_format=torch.channels_last)


def within(batch_size: int, count: int) -> int:
    """`batch_size`; for a smaller set, the largest multiple of 8 (or power of 2 under 8) in it."""
    if count >= batch_size:
        return batch_size
    return count // EIGHTH * EIGHTH or 1 << (count.bit_length() - 1)


def fitting(batch_size: int, count: int) -> int:
    """The batch size of `within`, if the processes can share it equally.

    It does not depend on the number of processes, so the results do not either.

    Raises:
        ClsaError: if the processes cannot share it.
    """
    batch_size = within(batch_size, count)
    if batch_size % dist.world_size():
        what, why = f"a batch of {batch_size} pictures", f"{dist.world_size()} processes"
        hint = "start a power of 2 of them, or choose a multiple by --change batch_size=..."
        raise ClsaError(what, f"cannot be shared equally by {why}", hint)
    return batch_size


def sgd(groups: list[dict], card: SgdCard) -> torch.optim.SGD:
    """SGD for groups of parameters, each with its own rate."""
    optimizer = torch.optim.SGD(groups, momentum=card.momentum, weight_decay=card.weight_decay)
    for group in optimizer.param_groups:
        group["first_lr"] = group["lr"]
    return optimizer


def set_rates(optimizer: torch.optim.SGD, epoch: int, card: Schedule) -> None:
    """Set the learning rates of an epoch, counted from 0."""
    for group in optimizer.param_groups:
        group["lr"] = rate_at(epoch, group["first_lr"], card)


def rate_at(epoch: int, lr: float, card: Schedule) -> float:
    """The learning rate of an epoch, counted from 0: steps if the card has drops, else a cosine.

    Steps: lr drop^(number of drops so far). Cosine: r + (lr - r) (1 + cos(pi epoch / epochs)) / 2,
    where r is the card's `final_lr`, or 0 if it has none.
    """
    share = epoch / card.epochs
    if card.drops:
        return lr * card.drop ** sum(share >= drop - 1e-9 for drop in card.drops)
    final = card.final_lr if isinstance(card, LinearCard) else 0.0
    return final + (lr - final) * (1 + math.cos(math.pi * share)) / 2
