"""VOC07 as multi-label classification: a linear layer on a frozen encoder, judged by mean AP."""

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from clsa.evaluate.classify.average_precision import Points, average_precision
from clsa.evaluate.classify.linear import fitting, normalised, sgd
from clsa.evaluate.features.extract import encode
from clsa.evaluate.progress import watched
from clsa.evaluate.results.heads import new_layer
from clsa.evaluate.results.records import Found, last_and_best, require_finite
from clsa.loading.loader import batches
from clsa.loading.order import Order
from clsa.options.cards import Voc07Card
from clsa.options.run import DataOptions
from clsa.pictures.annotations import Annotated, read_voc
from clsa.pictures.sources import Folder
from clsa.runs import digests
from clsa.system import dist
from clsa.system.errors import ClsaError, Exit
from clsa.views.specs import ViewSpec

VIEW = 1007
YEAR = "2007"
THERE, ABSENT, DIFFICULT = 1, 0, -1
NEEDS = "the voc07 protocols need VOC's folders (JPEGImages, Annotations, ImageSets)"


class Marked(NamedTuple):
    """Pictures and the classes that each of them shows.

    Attributes:
        targets: one row per picture, one column per class: 1 if the picture shows the class, 0 if
            not, -1 if it shows only difficult objects of it.
    """

    source: Folder
    targets: Int64[np.ndarray, "n C"]


class Lists(NamedTuple):
    """Pictures of VOC07 to learn from, to select an epoch on, and to judge on."""

    train: Marked
    select: Marked | None
    test: Marked
    classes: list[str]
    name: str = "test"
    several: bool = True
    """A picture may be of several classes."""

    @property
    def bank(self) -> Folder:
        """The pictures to learn from."""
        return self.train.source

    @property
    def queries(self) -> Folder:
        """The pictures to judge on."""
        return self.test.source

    def digest(self) -> str:
        """A sha256 of the names, sizes and targets of all lists."""
        parts = [part for part in (self.train, self.select, self.test) if part]
        sources = [part.source.digest() for part in parts]
        return digests.digest([*sources, *(part.targets.tolist() for part in parts)])


def read_lists(data: DataOptions, train: str, select: str | None) -> Lists:
    """Read lists of a VOC2007 folder, or of the VOCdevkit around it; judging uses list `test`.

    Args:
        data: where the folder is.
        train: name of the list to learn from.
        select: name of the list to select an epoch on, if any.

    Raises:
        ClsaError: if `--data` is missing, or as `annotations.read_voc` does.
    """
    if not data.data:
        raise ClsaError("no --data", NEEDS, "give VOCdevkit, or its VOC2007")
    root = Path(data.data)
    if not root.is_dir():
        raise ClsaError(data.data, f"no such folder; {NEEDS}", "give VOCdevkit, or its VOC2007")
    first = read_voc(root, [(YEAR, train)])
    marked = {train: _marked(first)}
    for name in filter(None, (select, "test")):
        marked[name] = _marked(read_voc(root, [(YEAR, name)], first.classes))
    for name, part in marked.items():
        if not (part.targets == THERE).any():
            why = "none of its pictures shows an object that counts"
            raise ClsaError(f"{root}: list {name}", why, "check its annotations", Exit.BAD_DATA)
    chosen = marked[select] if select else None
    return Lists(marked[train], chosen, marked["test"], first.classes)


def _marked(read: Annotated) -> Marked:
    targets = np.full((len(read.things), len(read.classes)), ABSENT, np.int64)
    for row, things in zip(targets, read.things, strict=True):
        row[[thing.label for thing in things if thing.difficult]] = DIFFICULT
        row[[thing.label for thing in things if not thing.difficult]] = THERE
    return Marked(read.source, targets)


def mean_ap(
    scores: Float[np.ndarray, "n C"],
    targets: Int64[np.ndarray, "n C"],
    points: Points,
    dropped: bool,
) -> float:
    """Mean over the classes of the average precision over the pictures, in percent.

    A class that no picture shows is left out. Among equal scores the earlier picture comes first.

    Args:
        points: "all" or "11" (see `average_precision`).
        dropped: for each class, leave out the pictures that show only difficult objects of it, as
            VOC does; otherwise these pictures count as not showing the class.
    """
    require_finite(torch.from_numpy(scores))
    found = []
    for column in range(targets.shape[1]):
        kept = targets[:, column] != DIFFICULT if dropped else np.full(len(targets), True)
        there = targets[kept, column] == THERE
        order = np.argsort(-scores[kept, column], kind="stable")
        if there.any():
            found.append(average_precision(there[order], int(there.sum()), points))
    return 100 * float(np.mean(found))


def per_picture_ap(scores: Float[np.ndarray, "n C"], there: Bool[np.ndarray, "n C"]) -> float:
    """Mean over the pictures of the average precision over the classes, in percent.

    This is what CLSA's released code computes. For each class that a picture shows, take the
    classes that score at least as high and the share of them that the picture shows; average over
    the shown classes. A picture that shows no class is left out. The result is not an mAP: it ranks
    classes against each other instead of pictures, and is far higher.
    """
    require_finite(torch.from_numpy(scores))
    shown = there.any(1)
    scores, there = scores[shown], there[shown]
    above = scores[:, None, :] >= scores[:, :, None]
    precision = (above & there[:, None, :]).sum(2) / above.sum(2)
    return 100 * float(((precision * there).sum(1) / there.sum(1)).mean())


def voc07(
    encoder: nn.Module,
    lists: Lists,
    queries: tuple[Float[Tensor, "n F"], Int64[np.ndarray, "n"]],
    size: int,
    card: Voc07Card,
    seed: int,
    data: DataOptions,
) -> tuple[list[Found], nn.Linear]:
    """Mean AP after the last and the best epoch, and the layer after the last epoch.

    CLSA's paper trains a layer on `trainval` and tests it on `test`: 100 epochs of SGD, rate 0.05,
    momentum 0.9, no weight decay, batches of 256. The paper leaves the rest open, so it is as in
    the linear probe: random crops and flips, batch norm in evaluation mode, centre crops at the
    test, the last partial batch left out. The loss is the cross-entropy of one sigmoid per class,
    summed over the classes and averaged over the batch. If a picture shows only difficult objects
    of a class, that class counts neither in the loss nor in the test of this picture.

    Args:
        encoder: frozen by `extract.frozen`.
        lists: pictures to learn from and to judge on.
        queries: features of the test pictures' centre crops, and their rows in the list.
        size: side of the crops in pixels.
        card: schedule, crops and metric.
        seed: of the layer, the order and the crops.
        data: how the pictures are read.
    """
    features, rows = queries
    device = features.device
    layer = new_layer(features.shape[1], len(lists.classes), seed).to(device)
    optimizer = sgd([{"params": list(layer.parameters()), "lr": card.lr}], card)
    bank = copy.copy(lists.train.source)
    bank.labels = np.arange(len(bank))  # so that the labels of a batch are row numbers
    targets = torch.from_numpy(lists.train.targets).to(device)
    order = Order(len(bank), fitting(card.batch_size, len(bank)), seed)
    spec = ViewSpec("voc07", size, card.scale, VIEW)
    last_step = card.epochs * order.steps_per_epoch
    dropped = card.test_difficult == "dropped"
    epochs: list[dict[str, float]] = []
    stream = batches(bank, [spec], order, 0, last_step, device, data)
    for step, batch in enumerate(watched(stream, last_step, "linear layer"), start=1):
        wanted = targets[dist.all_gather(batch.labels.to(device))]
        seen = dist.all_gather(encode(encoder, normalised(batch), order.batch_size))
        with torch.enable_grad():
            loss = loss_of(layer(seen), wanted, card.train_difficult == "dropped")
            (loss / order.batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % order.steps_per_epoch == 0:
            scores = layer(features).double().cpu().numpy()
            found = mean_ap(scores, lists.test.targets[rows], card.metric, dropped)
            epochs.append({"map": found})
    return last_and_best(epochs, card.headline), layer


def loss_of(
    logits: Float[Tensor, "b C"], targets: Int64[Tensor, "b C"], dropped: bool
) -> Float[Tensor, ""]:
    """Cross-entropy of one sigmoid per class, summed over classes and batch.

    Args:
        dropped: leave out the classes of which a picture shows only difficult objects.
    """
    wanted, kept = (targets == THERE).to(logits.dtype), torch.ones_like(logits)
    if dropped:
        kept = (targets != DIFFICULT).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, wanted, kept, reduction="sum")
