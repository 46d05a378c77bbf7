"""What CLSA's released code computes on VOC07: neither a frozen probe nor a mean AP over classes.

It is here so that its numbers can be compared with others; for a probe use `voc07-map`.
"""

import copy
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torchvision.transforms.v2.functional as pixels
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor, nn

from clsa.evaluate.classify.voc07 import THERE, Lists, Marked, loss_of, mean_ap, per_picture_ap
from clsa.evaluate.features.extract import encode
from clsa.evaluate.progress import watched
from clsa.evaluate.results.heads import new_layer
from clsa.evaluate.results.records import Found, findings
from clsa.loading.crops import Cut, Cuts, whole
from clsa.loading.loader import eval_crops
from clsa.loading.order import Order
from clsa.options.cards import ReleasedCard
from clsa.pictures.sources import Source
from clsa.system.errors import ClsaError, Exit
from clsa.views import color, rng

MEAN = (0.457342265910642, 0.4387686270106377, 0.4073427106250871)
STD = (0.26753769276329037, 0.2638145880487105, 0.2776826934044154)
VIEW, SLOTS = 1008, np.arange(5)
LARGER = 330 / 300
BRIGHTNESS, GRAY, FLIP, DEGREES = 0.2, 0.25, 0.25, 25.0
Network = tuple[nn.Module, nn.Linear]
PLACES = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))


def voc07_released(
    encoder: nn.Module, lists: Lists, card: ReleasedCard, seed: int
) -> tuple[list[Found], int, nn.Module]:
    """Numbers after the last epoch and the best epoch on `val`, picture count, and last encoder.

    This follows the released code and contradicts the paper's text. Whole pictures are squeezed to
    a square. Half of them change in brightness by up to a fifth; of the other half, a quarter
    becomes gray. A quarter of all is mirrored, and all are rotated by up to 25 degrees. Batches
    have 16 pictures and the loss is summed, so the rate is effectively 16 times larger. The rate
    follows a cosine of period 24 down and up. Mean and deviation of pixels differ from pretraining.
    Batch norm is in training mode, so the encoder's statistics change. The test takes the mean
    logits of five crops. Every process computes all of this.

    Args:
        encoder: is copied, because the statistics of the copy change.
    """
    selecting = lists.select
    assert selecting is not None
    device = next(encoder.parameters()).device
    moved = copy.deepcopy(encoder)
    width = int(encoder.head_hidden_size)  # pyright: ignore[reportArgumentType]
    layer = new_layer(width, len(lists.classes), seed).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=card.lr, momentum=card.momentum)
    rows, pictures = squares(lists.train.source, card.size)
    seen_in_val = [squares(selecting.source, card.size, crop_at(*PLACES[-1]))]  # every epoch
    targets = torch.from_numpy(lists.train.targets[rows]).to(device)
    order = Order(len(rows), min(card.batch_size, len(rows)), seed)
    highest, best = -1.0, (0, (moved, layer))
    for epoch in watched(range(card.epochs), card.epochs, "released protocol"):
        optimizer.param_groups[0]["lr"] = rate_at(epoch, card)
        moved.train(card.moving_statistics)
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            index = order.indices(step)
            seen = distorted(pictures[torch.from_numpy(index)], index, epoch, seed)
            images = color.normalize(seen.to(device) / 255, MEAN, STD)
            features = encode(moved, images, len(images))
            wanted = targets[torch.from_numpy(index)]
            with torch.enable_grad():
                loss_of(layer(features), wanted, dropped=False).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.eval()
        ((values, _),) = judged([(moved, layer)], seen_in_val, selecting, card)
        if values[card.headline] >= highest:  # the later of equals, as the released code
            highest = values[card.headline]
            best = epoch + 1, (copy.deepcopy(moved), copy.deepcopy(layer))
    crops = (squares(lists.test.source, card.size, crop_at(*place)) for place in PLACES)
    (last, count), (then, _) = judged([(moved, layer), best[1]], crops, lists.test, card)
    return findings(last, "last", card.epochs) + findings(then, "best", best[0]), count, moved


def rate_at(epoch: int, card: ReleasedCard) -> float:
    """Learning rate lr (1 + cos(pi (epoch + 1) / period)) / 2, which falls and rises again.

    The scheduler of the released code steps before the epoch (CLSA, VOC_CLF/train.py:42).
    """
    return card.lr * (1 + math.cos(math.pi * (epoch + 1) / card.cosine_period)) / 2


def squares(
    source: Source, side: int, cut: Cut = whole
) -> tuple[Int64[np.ndarray, "m"], UInt8[Tensor, "m 3 side side"]]:
    """Numbers of the readable pictures, and a square cut of each (by default all of it), on CPU."""
    found = list(eval_crops(source, np.arange(len(source)), side, cut, torch.device("cpu")))
    if not found:
        why = f"none of its {len(source)} pictures can be read"
        raise ClsaError("nothing to judge by", why, "check the data", Exit.BAD_DATA)
    numbers = np.concatenate([rows for rows, _ in found])
    return numbers, torch.cat([images.round().byte() for _, images in found])


def distorted(
    images: UInt8[Tensor, "b 3 S S"], index: Int64[np.ndarray, "b"], epoch: int, seed: int
) -> Float32[Tensor, "b 3 S S"]:
    """Random training views of square pictures, in [0, 255]; drawn from (seed, epoch, picture)."""
    drawn = rng.uniforms(seed, epoch, index, VIEW, SLOTS)
    views = []
    for image, (which, amount, gray, flip, turn) in zip(images, drawn.tolist(), strict=True):
        if which < 0.5:
            image = pixels.adjust_brightness(image, 1 + BRIGHTNESS * (2 * amount - 1))
        elif gray < GRAY:
            image = pixels.rgb_to_grayscale(image, num_output_channels=3)
        if flip < FLIP:
            image = pixels.horizontal_flip(image)
        views.append(pixels.rotate(image, DEGREES * (2 * turn - 1)))
    return torch.stack(views).float()


def judged(
    networks: Sequence[Network],
    crops: Iterable[tuple[Int64[np.ndarray, "m"], UInt8[Tensor, "m 3 S S"]]],
    marked: Marked,
    card: ReleasedCard,
) -> list[tuple[dict[str, float], int]]:
    """For each network `per-image-ap`, all-points `map`, and the number of pictures.

    Both are computed from the mean logits over the crops; a crop's side is 1/1.1 of the picture's
    short side.

    Args:
        networks: pairs of encoder and layer.
        crops: for each place, the `squares` of all pictures cut there.
    """
    logits: list[list[Tensor]] = [[] for _ in networks]
    targets = marked.targets
    for numbers, images in crops:
        targets = marked.targets[numbers]
        parts: list[list[Tensor]] = [[] for _ in networks]
        for some in images.split(card.batch_size):
            for part, (encoder, layer) in zip(parts, networks, strict=True):
                shown = color.normalize(some.to(layer.weight.device) / 255, MEAN, STD)
                part.append(layer(encode(encoder, shown, len(shown))))
        for each, part in zip(logits, parts, strict=True):
            each.append(torch.cat(part))
    found = []
    for each in logits:
        scores = torch.stack(each).mean(0).double().cpu().numpy()
        pictures = per_picture_ap(scores, targets == THERE)
        values = {"per-image-ap": pictures, "map": mean_ap(scores, targets, "all", dropped=False)}
        found.append((values, len(targets)))
    return found


def crop_at(down: float, right: float) -> Cut:
    """A function that cuts squares of 1/1.1 of the short side.

    `down` and `right` place the square, from 0 (top, left) to 1 (bottom, right).
    """

    def cut(
        index: Int64[np.ndarray, "b"],
        heights: Int64[np.ndarray, "b"],
        widths: Int64[np.ndarray, "b"],
    ) -> Cuts:
        sides = np.rint(np.minimum(heights, widths) / LARGER).astype(np.int64)
        tops = np.rint(down * (heights - sides)).astype(np.int64)
        lefts = np.rint(right * (widths - sides)).astype(np.int64)
        return np.stack([tops, lefts, sides, sides], axis=1), np.zeros(len(index), bool)

    return cut
