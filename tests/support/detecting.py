"""One rank of a two-process detection, started by test_detect.py; saves what it found as JSON."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from clsa.evaluate.detect.detect import find, fit, gathered
from clsa.evaluate.detect.detector import build_detector
from clsa.learning.models import build_encoder, group_norms
from clsa.options.detection_cards import DetectCard
from clsa.options.run import ModelOptions
from clsa.pictures.annotations import read_coco
from clsa.runs import digests
from clsa.system import dist


def normalised() -> dict[str, list]:
    """Batch norm of 8 rows, of which this rank has the first 3 or the other 5."""
    norm, rows = shared_norm(), uneven_rows()
    mine = (rows[:3] if dist.rank() == 0 else rows[3:]).clone().requires_grad_(True)
    out = norm(mine)
    out.pow(3).sum().backward()
    assert mine.grad is not None and norm.running_var is not None and norm.running_mean is not None
    return {
        "out": out.tolist(),
        "grad": mine.grad.tolist(),
        "statistics": [norm.running_mean.tolist(), norm.running_var.tolist()],
    }


def uneven_rows() -> torch.Tensor:
    return torch.rand(8, 4, 3, 5, generator=torch.Generator().manual_seed(0)) * 3


def shared_norm() -> nn.BatchNorm2d:
    norm = nn.Sequential(nn.BatchNorm2d(4))
    group_norms(norm, 1)
    return norm[0]


def main(scenes: str, out: str, settings: str) -> None:
    """Train and detect; save detections, a digest of the weights and the gathered values."""
    torch.set_num_threads(1)
    device, chosen = torch.device("cpu"), DetectCard.parse(json.loads(settings), "test")
    with dist.process_group(device):
        train, test = (read_coco(Path(scenes), split) for split in ("train", "val"))
        encoder = build_encoder(ModelOptions(encoder="resnet10-w32"), 0)
        detector = build_detector(encoder, len(train.classes), chosen, 0)
        fit(detector, train, chosen, 0, device)
        found, sizes = find(detector, test, chosen, device)
        result = {
            "norm": normalised(),
            "digest": digests.digest(detector.state_dict()),
            "boxes": [each.boxes.tolist() for each in found],
            "masks": [each.masks for each in found],
            "sizes": sizes,
            "gathered": gathered([{"rank": dist.rank(), "x": 0.1}] * (dist.rank() + 1), device),
        }
        path = Path(out) / f"rank{dist.rank()}-of-{dist.world_size()}.json"
        path.write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:4])
