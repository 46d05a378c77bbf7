"""Recipes of CLIM, SuNCEt and continual pretraining, which wrap a method, at all three sizes."""

from clsa.options.config import merge
from clsa.recipes.cifar import CIFAR
from clsa.recipes.imagenet import IMAGENET
from clsa.recipes.recipe import Overrides, Recipe
from clsa.recipes.small import SMALL

_SIMCLR, _SIMCLR_SMALL = IMAGENET["simclr"].values, SMALL["simclr"].values
_OURS = "ours, after the published recipe"
_TEN: Overrides = {"stages": ("classes:10",)}
_MEASURED = "3 seeds on clipart (docs/evidence.md)"

AROUND: dict[str, Recipe] = {
    "suncet": Recipe(
        "SuNCEt: SimCLR, and a tenth of the labels to pull pictures of one class together.",
        "SuNCEt, rates and schedule of its code; batch sizes for 64 processes, our guess",
        "no figure in our sources",
        merge(
            merge(_SIMCLR, {"labels": "10%"}),
            {
                "epochs": 100,
                "batch_size": 2816,
                # 2 pictures a class on each of 64 GPUs, one view: suncet imgnt_train.yaml:2,4,5,16
                "suncet": {"classes": 20, "per_class": 128, "views": 1},
                "model": {
                    "zero_init_last": False,
                    "projector_layers": 3,
                    "projector_dim": 2048,
                    "projector_norm": "hidden",
                },
                # 4.8 and 0.048 at the batch of 2,816
                "optim": {"lr": 4.8 * 256 / 2816, "final_lr": 0.048 * 256 / 2816},
            },
        ),
    ),
    "suncet-cifar": Recipe(
        "SuNCEt at 32 pixels with 8 % of the labels (4,000 of CIFAR-10).",
        "SuNCEt's sibling PAWS, its configuration for CIFAR-10; ResNet-18 here",
        "",
        merge(
            CIFAR["simclr"].values,
            {
                "epochs": 600,
                "batch_size": 256,
                "labels": "8%",
                "suncet": {"classes": 10, "per_class": 64},
                "views": {
                    "scale": (0.5, 1.0),
                    "weak": {"grayscale": 0.0, "solarize": 0.2},
                },
                "method": {"temperature": 0.1},
                "optim": {"lr": 3.2, "weight_decay": 1e-6},
            },
        ),
    ),
    "suncet-small": Recipe(
        "SuNCEt at 32 pixels with a tenth of the labels, for a CPU.",
        _OURS,
        "",
        # At temperature 0.1 the loss stayed above chance for two epochs and undid SimCLR's gain.
        merge(
            _SIMCLR_SMALL,
            {"labels": "10%", "suncet": {"classes": 16, "per_class": 4, "temperature": 0.2}},
        ),
        _MEASURED,
    ),
    "continual": Recipe(
        "Continual pretraining: MoCo v2 on ten parts of the classes, one after another.",
        "CCSSL, code; the settings of its terms are the defaults of --continual",
        "55.5 on 100 classes of ImageNet after 10 parts (fine-tuning 52.6, replay 54.3)",
        merge(IMAGENET["moco-v2"].values, {**_TEN, "optim": {"schedule": "cosine-epoch"}}),
    ),
    "continual-cifar": Recipe(
        "Continual pretraining at 32 pixels, ten parts of the classes.",
        _OURS,
        "",
        merge(
            CIFAR["clsa"].values,
            {**_TEN, "stronger": False, "batch_size": 256, "method": {"bank": "queue"}},
        ),
    ),
    "continual-small": Recipe(
        "Continual pretraining at 32 pixels, four parts of the classes, for a CPU.",
        _OURS,
        "",
        merge(
            SMALL["moco-v2"].values,
            {
                "stages": ("classes:4",),
                "epochs": 25,
                "batch_size": 64,
                "method": {"queue_size": 1024},
                "probe_every": 0,
            },
        ),
        _MEASURED,
    ),
}
