"""Export of an encoder to detectron2: its weights, and configurations of the papers' protocols."""

import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from clsa.options.commands import ExportOptions
from clsa.options.config import merge, to_yaml
from clsa.runs import digests, saved_encoder
from clsa.system import files
from clsa.system.errors import ClsaError
from clsa.views import transform

DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
WEIGHTS = "encoder.pth"
SCRIPT = files.ASSETS / "detectron2_train_net.txt"


def export(options: ExportOptions) -> Path:
    """Write a run's encoder in the layout of the library `options.to`; return the folder.

    For detectron2 it writes `encoder.pth`, one configuration for each protocol of the papers, and
    `train_net.py`, which adds the batch norm after res5 that the papers' C4 heads have.

    Raises:
        ClsaError: for an encoder that the library cannot build, or a folder that is a file.
    """
    encoder, facts = saved_encoder.load_encoder_facts(options.run)
    weights = detectron2_weights(encoder, facts.model.encoder)
    depth = _depth(encoder, facts.model.encoder)
    out = options.out
    with files.output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    origin = {"recipe": facts.recipe, "step": facts.step, "seed": facts.seed,
              "digest": digests.digest(encoder.state_dict())}  # fmt: skip
    content = {"model": weights, "matching_heuristics": True, "__author__": json.dumps(origin)}
    files.write_atomic(out / WEIGHTS, lambda file: torch.save(content, file))
    for name, values in detectron2_configs(depth).items():
        files.write_text(out / f"{name}.yaml", to_yaml(values))
    files.write_text(out / "train_net.py", SCRIPT.read_text("utf-8"))
    return out


def detectron2_weights(encoder: nn.Module, name: str) -> dict[str, Tensor]:
    """The encoder's weights and statistics under the names that detectron2's ResNets use.

    conv1, bn1 -> stem.conv1, stem.conv1.norm; layerL.I.convK, bnK -> res(L+1).I.convK, .norm;
    layerL.I.downsample.0, .1 -> shortcut, shortcut.norm. detectron2 matches the ends of the
    names, so it finds the weights in `backbone` and in `roi_heads`.

    Args:
        encoder: a ResNet with bottleneck blocks and a 7x7 stem, as timm builds it.
        name: of the encoder, for error messages.
    """
    _depth(encoder, name)
    found = {}
    for key, value in encoder.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        renamed = re.sub(r"^(conv|bn)1\.", r"stem.\g<1>1.", key)
        renamed = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", renamed)
        renamed = re.sub(r"bn(\d)\.", r"conv\1.norm.", renamed)
        renamed = renamed.replace("downsample.0.", "shortcut.")
        found[renamed.replace("downsample.1.", "shortcut.norm.")] = value.detach().cpu().clone()
    return found


def _depth(encoder: nn.Module, name: str) -> int:
    """The encoder's number of layers: 50, 101 or 152.

    Raises:
        ClsaError: if the encoder is not a plain ResNet of that size.
    """
    layers = [getattr(encoder, f"layer{k}", ()) for k in range(1, 5)]
    depth = DEPTHS.get(tuple(len(layer) for layer in layers))  # pyright: ignore
    plain = isinstance(encoder, ResNet) and depth is not None
    if plain:
        with torch.device("meta"):
            usual = timm.create_model(f"resnet{depth}", num_classes=0)
        plain = repr(usual) == repr(encoder)  # kinds, sizes, strides and groups of all layers
    if not plain or depth is None:
        why = "detectron2 only builds ResNets of 50, 101 or 152 layers with a 7x7 stem"
        raise ClsaError(f"encoder {name}", why, "export a resnet50, or use --protocol detect-*")
    return depth


def detectron2_configs(depth: int) -> dict[str, dict[str, Any]]:
    """The papers' protocols as configurations of detectron2; none of them includes another file.

    VOC07+12 and COCO use a C4 head and the batch norm after res5 (MoCo, CLSA). COCO and LVIS v0.5
    use FPN (CLIM, which says that it follows MoCo: batch norm in FPN and mask head too). Batch norm
    takes statistics over all GPUs, nothing is frozen, and the statistics are measured again before
    the test. We never ran these configurations, because no package index has detectron2: the tests
    cover only names and shapes.
    """
    coco = {"TRAIN": ["coco_2017_train"], "TEST": ["coco_2017_val"]}
    lvis = {"TRAIN": ["lvis_v0.5_train"], "TEST": ["lvis_v0.5_val"]}
    voc = {"TRAIN": ["voc_2007_trainval", "voc_2012_trainval"], "TEST": ["voc_2007_test"]}
    once, twice = ([60_000, 80_000], 90_000), ([120_000, 160_000], 180_000)
    rare = {
        "MODEL": {"ROI_HEADS": {"NUM_CLASSES": 1230, "SCORE_THRESH_TEST": 0.0001}},
        "TEST": {"DETECTIONS_PER_IMAGE": 300},
        "DATALOADER": {"SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "REPEAT_THRESHOLD": 0.001},
    }
    return {
        "voc-c4-24k": _config(depth, voc, range(480, 801, 32), ([18_000, 22_000], 24_000), {
            "MODEL": {"MASK_ON": False, "ROI_HEADS": {"NUM_CLASSES": 20}},
            "SOLVER": {"WARMUP_ITERS": 100},
        }),
        "coco-c4-2x": _config(depth, coco, range(640, 801, 32), twice, {
            "MODEL": {"MASK_ON": True},
        }),
        "coco-fpn-1x": _config(depth, coco, range(640, 801, 32), once, _FPN),
        "coco-fpn-2x": _config(depth, coco, range(640, 801, 32), twice, _FPN),
        "lvis-fpn-2x": _config(depth, lvis, range(640, 801, 32), twice, merge(_FPN, rare)),
    }  # fmt: skip


_FPN: dict[str, Any] = {
    "MODEL": {
        "MASK_ON": True,
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
        "RESNETS": {"OUT_FEATURES": ["res2", "res3", "res4", "res5"]},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "NORM": "SyncBN"},
        "ANCHOR_GENERATOR": {"SIZES": [[32], [64], [128], [256], [512]]},
        "RPN": {
            "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "PRE_NMS_TOPK_TRAIN": 2000, "PRE_NMS_TOPK_TEST": 1000,
            "POST_NMS_TOPK_TRAIN": 1000, "POST_NMS_TOPK_TEST": 1000,
        },
        "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"]},
        "ROI_BOX_HEAD": {
            "NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7,
        },
        "ROI_MASK_HEAD": {
            "NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 4, "NORM": "SyncBN",
            "POOLER_RESOLUTION": 14,
        },
    }
}  # fmt: skip


def _config(
    depth: int,
    datasets: dict[str, list[str]],
    sides: range,
    schedule: tuple[list[int], int],
    more: dict[str, Any],
) -> dict[str, Any]:
    """The settings that all protocols share, overridden by `more`."""
    steps, last = schedule
    shared = {
        "VERSION": 2,
        "MODEL": {
            "META_ARCHITECTURE": "GeneralizedRCNN",
            "WEIGHTS": WEIGHTS,
            "PIXEL_MEAN": [round(255 * value, 3) for value in transform.MEAN],
            "PIXEL_STD": [round(255 * value, 3) for value in transform.STD],
            "BACKBONE": {"FREEZE_AT": 0},
            "RESNETS": {"DEPTH": depth, "NORM": "SyncBN", "STRIDE_IN_1X1": False},
            "RPN": {"PRE_NMS_TOPK_TEST": 6000, "POST_NMS_TOPK_TEST": 1000},
            "ROI_HEADS": {"NAME": "Res5ROIHeadsExtraNorm"},
        },
        "INPUT": {"FORMAT": "RGB", "MIN_SIZE_TRAIN": list(sides), "MIN_SIZE_TEST": 800},
        "DATASETS": datasets,
        "SOLVER": {"IMS_PER_BATCH": 16, "BASE_LR": 0.02, "STEPS": steps, "MAX_ITER": last},
        "TEST": {"PRECISE_BN": {"ENABLED": True}},
    }
    return merge(shared, more)
