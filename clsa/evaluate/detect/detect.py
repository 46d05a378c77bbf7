"""Object detection and instance segmentation: train a detector on an encoder, then judge it."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from clsa.evaluate.detect.box_ap import Detections, coco_ap, pack_mask, packed, voc_ap
from clsa.evaluate.detect.detector import Resize, build_detector
from clsa.evaluate.progress import watched
from clsa.learning.models import autocast
from clsa.options.detection_cards import DetectCard
from clsa.options.run import DataOptions
from clsa.pictures.annotations import Annotated, Thing, read_coco, read_voc
from clsa.pictures.decode import DecodeError
from clsa.pictures.sources import Source
from clsa.system import dist
from clsa.system.errors import ClsaError, Exit
from clsa.system.extras import require
from clsa.system.machine import upload
from clsa.views import rng

VIEW, SAMPLING = 1_009, 1_000_040
MOMENTUM, WARMUP_FROM, DROP = 0.9, 1e-3, 0.1
READERS, AHEAD = 2, 2

Item = TypeVar("Item")
Read = TypeVar("Read")


class Drawn(NamedTuple):
    """How one train picture is shown: its number, whether it is mirrored, its short side."""

    row: int
    flip: bool
    side: int


class Shown(NamedTuple):
    """A picture for the detector, RGB in [0, 1], and its objects."""

    image: Float[Tensor, "3 H W"]
    target: dict[str, Tensor]


Batch = tuple[list[Drawn], list[Shown]]


def detect(
    encoder: nn.Module,
    train: Annotated,
    test: Annotated,
    settings: DetectCard,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Train a detector around a copy of `encoder`; return its average precision in percent.

    Training is SGD with momentum 0.9 and a linear warm-up; at each step in `settings.drops` the
    rate falls to a tenth. Batches hold only pictures with objects, mirrored half of the time. The
    detector learns from difficult objects, but not from crowds. With several processes, each takes
    its share of every batch and of the test pictures; all return the same numbers.

    Args:
        encoder: is not changed.
        train, test: pictures of the same classes.
        settings: the card.
        seed: of new layers, order, mirroring, sides, and the sampling of regions.

    Returns:
        The numbers of `box_ap.voc_ap` or `box_ap.coco_ap`, by the same names.

    Raises:
        ClsaError: 2 if the encoder or the settings do not fit, 65 if there are no usable pictures,
            76 if the loss is not finite.
    """
    if train.classes != test.classes:
        hint = "read both with the classes of the first"
        raise ClsaError("train and test pictures", "have different classes", hint)
    detector = build_detector(encoder, len(train.classes), settings, seed).to(device)
    fit(detector, train, settings, seed, device)
    found, sizes = find(detector, test, settings, device)
    if settings.measure == "voc":
        return voc_ap(found, test.things, len(test.classes))
    return coco_ap(found, test.things, len(test.classes), sizes, settings.masks)


class Boxes(NamedTuple):
    """Pictures with objects: a part to learn from and a part to judge on."""

    train: Annotated
    test: Annotated
    name: str
    """Name of the test part: test (VOC) or val (COCO)."""
    several: bool = True

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.train.classes

    @property
    def bank(self) -> Source:
        """The pictures to learn from."""
        return self.train.source

    @property
    def queries(self) -> Source:
        """The pictures to judge on."""
        return self.test.source

    def digest(self) -> str:
        """A sha256 of the names, sizes and objects of both parts."""
        total = hashlib.sha256()
        for part in (self.train, self.test):
            total.update(part.source.digest().encode())
            for things in part.things:
                total.update(repr(things).encode())
        return total.hexdigest()


def read_boxes(data: DataOptions, card: DetectCard) -> Boxes:
    """Read the parts that a card names from VOC's or COCO's folders.

    Raises:
        ClsaError: if `--data` is missing, if the card is one that detectron2 judges, or as
            `read_voc` and `read_coco` do.
    """
    if card.library != "clsa":
        hint = "clsa export RUN --to detectron2, and train lvis-fpn-2x.yaml there"
        raise ClsaError("LVIS", "is trained and judged by detectron2", hint)
    layout = "VOCdevkit" if card.measure == "voc" else "COCO's folder, or one of `clsa scenes`"
    if not data.data or not Path(data.data).is_dir():
        why = "no such folder" if data.data else "it is missing"
        raise ClsaError(f"--data {data.data}".strip(), why, f"give {layout}", Exit.NO_INPUT)
    root = Path(data.data)
    if card.measure == "coco":  # fail now, not after the training
        require("pycocotools.coco", "evaluation", "COCO average precision")
    if card.measure == "voc":
        train = read_voc(root, [(year, "trainval") for year in card.years])
        boxes = Boxes(train, read_voc(root, [("2007", "test")], train.classes), "test")
    else:
        train = read_coco(root, "train")
        boxes = Boxes(train, read_coco(root, "val", train.classes), "val")
    dropped = boxes.train.dropped + boxes.test.dropped
    if dropped:
        log = logging.getLogger("clsa")
        log.warning("note: %d objects whose box has no area are left out", dropped)
    return boxes


@torch.enable_grad()
def fit(
    detector: GeneralizedRCNN,
    train: Annotated,
    settings: DetectCard,
    seed: int,
    device: torch.device,
) -> None:
    """Train in place, then average the statistics of batch norm (precise BN)."""
    if settings.batch % dist.world_size():
        why = f"{dist.world_size()} processes cannot share it equally"
        raise ClsaError(f"batch {settings.batch}", why, "choose a multiple of that number")
    usable = [row for row, things in enumerate(train.things) if _learnable(things)]
    if not usable:
        raise ClsaError("train pictures", "none shows an object", "check them", Exit.BAD_DATA)
    params = [param for param in detector.parameters() if param.requires_grad]
    in_norms = {
        id(param)
        for module in detector.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for param in module.parameters()
    }
    groups = [
        {"params": [p for p in params if id(p) not in in_norms]},
        {"params": [p for p in params if id(p) in in_norms], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        groups, settings.lr, momentum=MOMENTUM, weight_decay=settings.weight_decay
    )
    detector.train()

    def read(step: int) -> Batch:
        chosen = drawn(usable, settings, seed, step)
        return chosen, [shown(train, what, settings.masks) for what in chosen]

    batches = ahead(range(settings.iters + settings.precise_bn), read)
    for step in watched(range(settings.iters), settings.iters, "detector"):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, settings)
        losses = _losses(detector, next(batches), seed, step, device)
        loss = torch.stack(list(losses.values())).sum()
        (loss / dist.world_size()).backward()
        dist.sum_gradients(params)
        if step % 20 == 0 or step + 1 == settings.iters:
            worst = dist.all_max((~torch.isfinite(loss.detach())).float())
            if worst.item():
                why = f"not finite at step {step + 1}"
                raise ClsaError("the detector's loss", why, "lower lr by --change", Exit.UNHEALTHY)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if settings.precise_bn:
        norms = [
            module
            for module in detector.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        ]
        kept = [norm.momentum for norm in norms]
        for number in range(settings.precise_bn):
            for norm in norms:
                norm.momentum = 1 / (number + 1)  # averages over all batches
            step = settings.iters + number
            with torch.no_grad():
                _losses(detector, next(batches), seed, step, device)
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum


def lr_at(step: int, settings: DetectCard) -> float:
    """Learning rate of a step counted from 0: warm-up times drops, as in detectron2."""
    share = min(1.0, step / settings.warmup) if settings.warmup else 1.0
    warm = WARMUP_FROM + (1 - WARMUP_FROM) * share
    return settings.lr * warm * DROP ** sum(step >= drop for drop in settings.drops)


def drawn(usable: Sequence[int], settings: DetectCard, seed: int, step: int) -> list[Drawn]:
    """This process's share of batch `step`; each pass over the set has a new order."""
    places = np.arange(step * settings.batch, (step + 1) * settings.batch, dtype=np.int64)
    uniforms = rng.uniforms(seed, 0, places, VIEW, np.arange(2, dtype=np.int64))
    share = settings.batch // dist.world_size()
    first = share * dist.rank()
    batch = []
    for place, (mirror, side) in zip(places[first : first + share], uniforms[first:], strict=False):
        epoch, at = divmod(int(place), len(usable))
        sides, row = settings.short_sides, usable[int(_order(seed, epoch, len(usable))[at])]
        batch.append(Drawn(row, bool(mirror < 0.5), sides[int(side * len(sides))]))
    return batch


@functools.lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return rng.permutation(seed, epoch, count)


def ahead(items: Sequence[Item], read: Callable[[Item], Read]) -> Iterator[Read]:
    """Yield `read` of each item in order, while other threads read the next items."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting = [pool.submit(read, item) for item in items[:AHEAD]]
        for place in range(len(items)):
            result = waiting.pop(0).result()
            if place + AHEAD < len(items):
                waiting.append(pool.submit(read, items[place + AHEAD]))
            yield result


def shown(annotated: Annotated, what: Drawn, masks: bool) -> Shown:
    """One train picture and its objects, mirrored if `what.flip` is set; labels count from 1.

    Raises:
        ClsaError: 65 if the picture cannot be read.
    """
    image = _image(annotated, what.row)
    things = _learnable(annotated.things[what.row])
    high, wide = image.shape[1:]
    boxes = torch.tensor([thing.box for thing in things], dtype=torch.float32)
    labels = torch.tensor([thing.label + 1 for thing in things])
    target = {"boxes": boxes, "labels": labels}
    if masks:
        pixels = require("pycocotools.mask", "evaluation", "masks")
        decoded = [pixels.decode(packed(thing, (high, wide))) for thing in things]
        target["masks"] = torch.from_numpy(np.stack(decoded))
    if what.flip:
        image = image.flip(2)
        target["boxes"] = torch.stack(
            [wide - boxes[:, 2], boxes[:, 1], wide - boxes[:, 0], boxes[:, 3]], 1
        )
        if masks:
            target["masks"] = target["masks"].flip(2)
    return Shown(image, target)


def _image(annotated: Annotated, row: int) -> Float[Tensor, "3 H W"]:
    try:
        pixels = annotated.source.read(row)
    except DecodeError as error:
        what, hint = annotated.source.ids[row], "replace it, or remove it from the lists"
        raise ClsaError(what, str(error), hint, Exit.BAD_DATA) from None
    annotated.require_size(row, *pixels.shape[:2])
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _learnable(things: list[Thing]) -> list[Thing]:
    return [thing for thing in things if not thing.crowd]


def _losses(
    detector: GeneralizedRCNN,
    batch: Batch,
    seed: int,
    step: int,
    device: torch.device,
) -> dict[str, Tensor]:
    chosen, pictures = batch
    images = [picture.image.to(device) for picture in pictures]
    targets = [
        {name: value.to(device) for name, value in picture.target.items()} for picture in pictures
    ]
    cast(Resize, detector.transform).sides = iter([what.side for what in chosen])
    with sampling(seed, step, device), autocast(device, "auto"):
        return detector(images, targets)


@contextmanager
def sampling(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed the global generator, from which torchvision samples regions; restore it afterwards."""
    at = np.array([step * dist.world_size() + dist.rank()], np.int64)
    number = int(rng.hash_bits(seed, 0, at, SAMPLING, np.zeros(1, np.int64))[0, 0]) & (2**62 - 1)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield


@torch.no_grad()
def find(
    detector: GeneralizedRCNN, test: Annotated, settings: DetectCard, device: torch.device
) -> tuple[list[Detections], list[tuple[int, int]]]:
    """Detections in each test picture, and the sizes (height, width) of the pictures.

    Of n processes, each runs the detector on every n-th picture; all return the whole.
    """
    detector.eval()
    rows = list(range(dist.rank(), len(test.source), dist.world_size()))
    mine: list[dict[str, Any]] = []
    for row, image in zip(rows, ahead(rows, lambda row: _image(test, row)), strict=True):
        with autocast(device, "auto"):
            found = detector([image.to(device)])[0]
        item = {name: found[name].float().cpu().tolist() for name in ("boxes", "scores")}
        item |= {"row": row, "size": list(image.shape[1:]), "labels": found["labels"].tolist()}
        if settings.masks:
            item["masks"] = [pack_mask(mask.cpu().numpy()) for mask in found["masks"][:, 0] > 0.5]
        mine.append(item)
    every = sorted(gathered(mine, device), key=lambda item: item["row"])
    detections = [
        Detections(
            np.array(item["boxes"], float).reshape(-1, 4),
            np.array(item["scores"], float),
            np.array(item["labels"], int) - 1,
            item.get("masks"),
        )
        for item in every
    ]
    return detections, [(item["size"][0], item["size"][1]) for item in every]


def gathered(items: list[Any], device: torch.device) -> list[Any]:
    """Items of all processes in rank order; they are sent as JSON, which keeps floats exact."""
    if dist.world_size() == 1:
        return items
    data = np.frombuffer(json.dumps(items).encode(), np.uint8)
    length = upload([np.array([len(data)])], device)[0]
    lengths = dist.all_gather(length).tolist()
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(data)] = data
    lines = dist.all_gather(upload([padded], device)[0][None]).cpu().numpy()
    texts = [line[:count].tobytes() for line, count in zip(lines, lengths, strict=True)]
    return [item for text in texts for item in json.loads(text)]
