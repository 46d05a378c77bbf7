import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from clsa.cli.main import main
from clsa.exchange.detectron2 import detectron2_configs, detectron2_weights
from clsa.learning import models
from clsa.options.config import read_yaml
from clsa.options.run import DataOptions, ModelOptions, ViewOptions
from clsa.runs import saved_encoder
from clsa.views import transform
from tests.support.refusals import refusal


def detectron2_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of detectron2's R50 backbone (build_resnet_backbone), written by hand."""
    found: dict[str, tuple[int, ...]] = {"stem.conv1.weight": (64, 3, 7, 7)}

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.norm.{part}"] = (width,)

    norm("stem.conv1", 64)
    before = 64
    for stage, blocks, inner in ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512)):
        for block in range(blocks):
            name, outer = f"res{stage}.{block}", 4 * inner
            shapes = {
                "conv1": (inner, before, 1, 1),
                "conv2": (inner, inner, 3, 3),
                "conv3": (outer, inner, 1, 1),
            }
            if block == 0:
                shapes["shortcut"] = (outer, before, 1, 1)
            for part, shape in shapes.items():
                found[f"{name}.{part}.weight"] = shape
                norm(f"{name}.{part}", shape[0])
            before = outer
    return found


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return models.build_encoder(ModelOptions(encoder="resnet50"), seed=0).eval()


def test_names_and_shapes_are_detectron2s(encoder: nn.Module) -> None:
    weights = detectron2_weights(encoder, "resnet50")
    assert {name: tuple(value.shape) for name, value in weights.items()} == detectron2_names()
    assert torch.equal(
        weights["res4.5.conv2.norm.running_var"], encoder.state_dict()["layer3.5.bn2.running_var"]
    )
    shortcut = encoder.state_dict()["layer2.0.downsample.0.weight"]
    assert torch.equal(weights["res3.0.shortcut.weight"], shortcut)


def test_a_network_built_from_the_weights_computes_the_same(encoder: nn.Module) -> None:
    """torchvision's ResNet-50 has detectron2's arithmetic (stride in the 3x3) and other names."""
    weights, peer = detectron2_weights(encoder, "resnet50"), resnet50()
    renamed = {}
    for name, value in weights.items():
        name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        for k in "123":
            name = name.replace(f"conv{k}.norm", f"bn{k}")
        for k in range(2, 6):
            name = name.replace(f"res{k}.", f"layer{k - 1}.")
        renamed[name.removeprefix("stem.")] = value
    missing, unexpected = peer.load_state_dict(renamed, strict=False)
    assert not unexpected and all("num_batches" in n or n.startswith("fc") for n in missing)
    peer.fc = nn.Identity()
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(peer.eval()(images), encoder(images), rtol=1e-3, atol=1e-3)


def test_configurations_are_the_papers() -> None:
    configs = detectron2_configs(50)
    assert set(configs) == {
        "voc-c4-24k", "coco-c4-2x", "coco-fpn-1x", "coco-fpn-2x", "lvis-fpn-2x",
    }  # fmt: skip
    schedules = {
        name: (*c["SOLVER"]["STEPS"], c["SOLVER"]["MAX_ITER"]) for name, c in configs.items()
    }
    assert schedules["voc-c4-24k"] == (18_000, 22_000, 24_000)
    assert schedules["coco-fpn-1x"] == (60_000, 80_000, 90_000)
    assert {schedules[n] for n in ("coco-c4-2x", "coco-fpn-2x", "lvis-fpn-2x")} == {
        (120_000, 160_000, 180_000)
    }
    for name, config in configs.items():
        model = config["MODEL"]
        assert model["BACKBONE"]["FREEZE_AT"] == 0 and model["RESNETS"]["NORM"] == "SyncBN"
        assert model["RESNETS"]["STRIDE_IN_1X1"] is False and config["INPUT"]["FORMAT"] == "RGB"
        assert model["PIXEL_MEAN"] == pytest.approx([255 * v for v in transform.MEAN], abs=1e-3)
        extra = model["ROI_HEADS"]["NAME"] == "Res5ROIHeadsExtraNorm"
        assert extra == ("c4" in name) and model["MASK_ON"] == ("voc" not in name)
        assert (config["SOLVER"]["IMS_PER_BATCH"], config["SOLVER"]["BASE_LR"]) == (16, 0.02)
    voc = configs["voc-c4-24k"]
    assert voc["INPUT"]["MIN_SIZE_TRAIN"] == [480 + 32 * k for k in range(11)]
    assert voc["SOLVER"]["WARMUP_ITERS"] == 100 and voc["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 20


def save(encoder: nn.Module, name: str, folder: Path) -> Path:
    facts = saved_encoder.EncoderFacts(
        model=ModelOptions(encoder=name), views=ViewOptions(), data=DataOptions(data="x"),
        recipe="clsa", seed=7, step=1, data_digest="",
    )  # fmt: skip
    saved_encoder.save_encoder(folder / "encoder.safetensors", encoder, facts)
    return folder


def test_the_command_writes_what_detectron2_reads(
    encoder: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(encoder, "resnet50", tmp_path)
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert "train_net.py --config-file" in capsys.readouterr().out
    content = torch.load(out / "encoder.pth", weights_only=True)
    assert content["matching_heuristics"] is True and len(content["model"]) == 265
    for name, values in detectron2_configs(50).items():
        assert read_yaml(out / f"{name}.yaml") == values
    script = ast.parse((out / "train_net.py").read_text())
    classes = {node.name for node in script.body if isinstance(node, ast.ClassDef)}
    assert "Res5ROIHeadsExtraNorm" in classes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"encoder": "resnet18"}),
        ("resnet10-w32", {"encoder": "resnet10-w32"}),
        ("resnet50", {"encoder": "resnet50", "small_stem": True}),
        ("seresnet50", {"encoder": "seresnet50"}),
        ("resnext50_32x4d", {"encoder": "resnext50_32x4d"}),
        ("wide_resnet50_2", {"encoder": "wide_resnet50_2"}),
        ("resnetaa50", {"encoder": "resnetaa50"}),
        ("resnetblur50", {"encoder": "resnetblur50"}),
        ("resnet50_gn", {"encoder": "resnet50_gn"}),
        ("vit6-w192", {"encoder": "vit6-w192"}),
    ],
)
def test_other_encoders_are_refused(name: str, options: dict[str, object]) -> None:
    built = models.build_encoder(ModelOptions(**options), seed=0)  # pyright: ignore
    text, code = refusal(lambda: detectron2_weights(built, name))
    assert f"encoder {name}" in text and "50, 101 or 152" in text and code == 2
