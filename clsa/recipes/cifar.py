"""Recipes at 32 pixels with a ResNet-18, for sets like CIFAR-10. None was trained here in full.

The accuracies are published ones, on CIFAR-10 and CIFAR-100. Pictures are normalised by ImageNet's
mean and deviation, as everywhere in this library.
"""

from clsa.options.config import merge
from clsa.recipes.imagenet import (
    ADCO,
    BYOL,
    CLIM,
    CLSA_OFFICIAL,
    INFOMIN,
    INSTDISC,
    MOCO_V1,
    MOCO_V2,
    PCL,
    PIRL,
    SIMCLR,
    SIMSIAM,
    SWAV,
)
from clsa.recipes.recipe import Overrides, Recipe

_FORM: Overrides = {
    "epochs": 200,
    "views": {"size": 32, "eval_crop": 1.0, "weak": {"sizes": (32,), "blur": 0.0}},
    "strong": {"sizes": (32,)},
    "model": {
        "encoder": "resnet18",
        "small_stem": True,
        "projector_hidden": 512,
        "projector_dim": 128,
    },
    "optim": {"schedule": "cosine", "lr": 0.03, "weight_decay": 5e-4},
}
_ONE_VIEW: Overrides = {"views": {"weak": {"sizes": ()}}}
_QUEUE: Overrides = {"method": {"key_momentum": 0.99, "queue_size": 4096}}
_MIXTURE: Overrides = {"batch_size": 256, "mixture": {"num_clusters": 400, "neighbours": 20}}
_SOLO: Overrides = {
    "epochs": 1000,
    "optim": {"trust": 0.02, "clip_trust": True, "warmup_epochs": 10.0},
}


def _cifar(base: Overrides, *changes: Overrides) -> Overrides:
    values = merge(base, _FORM)
    for change in changes:
        values = merge(values, change)
    return values


CIFAR: dict[str, Recipe] = {
    "moco-v1": Recipe(
        "MoCo with a linear projector, as in its CIFAR-10 demo.",
        "MoCo, CIFAR demo",
        "200-NN 82.6 at 200 epochs on CIFAR-10",
        _cifar(
            MOCO_V1,
            _QUEUE,
            {"batch_size": 512, "method": {"temperature": 0.1}},
            {
                "views": {
                    "scale": (0.08, 1.0),
                    "weak": {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_probability": 0.8},
                }
            },
        ),
    ),
    "moco-v2": Recipe(
        "MoCo v2, symmetric, with a queue of 32,768.",
        "solo-learn",
        "92.94 and 69.89 at 1000 epochs",
        _cifar(
            MOCO_V2,
            _SOLO,
            {
                "views": {"weak": {"blur": 0.5}, "scale": (0.08, 1.0)},
                "model": {"projector_hidden": 2048, "projector_dim": 256},
                "method": {
                    "symmetric": True,
                    "key_momentum": 0.99,
                    "final_key_momentum": 0.999,
                    "queue_size": 32768,
                },
                "optim": {"lr": 0.3, "weight_decay": 1e-4},
            },
        ),
    ),
    "clsa": Recipe(
        "CLSA with one strong view of 32 pixels.",
        "our starting point",
        "",
        _cifar(CLSA_OFFICIAL, _QUEUE, {"batch_size": 512}),
    ),
    "simclr": Recipe(
        "SimCLR, temperature 0.5, without blur.",
        "SimCLR, paper's CIFAR-10 section",
        "",
        _cifar(
            SIMCLR,
            {
                "epochs": 1000,
                "batch_size": 512,
                "views": {"weak": {"jitter": (0.4, 0.4, 0.4, 0.1)}},
                "model": {"projector_layers": 3},
                "method": {"temperature": 0.5},
                "optim": {"lr": 1.0, "weight_decay": 1e-4},
            },
        ),
    ),
    "byol": Recipe(
        "BYOL, no blur, solarized second view.",
        "solo-learn",
        "92.58 and 70.46 at 1000 epochs",
        _cifar(
            BYOL,
            _SOLO,
            {
                "batch_size": 256,
                "model": {"projector_hidden": 4096, "projector_dim": 256},
                "method": {"key_momentum": 0.99, "queue_size": 4096},
                "optim": {"lr": 1.0, "weight_decay": 1e-5},
            },
        ),
    ),
    "simsiam": Recipe(
        "SimSiam with a projector of two layers.",
        "SimSiam, paper's CIFAR-10 section",
        "",
        _cifar(
            SIMSIAM,
            {
                "epochs": 800,
                "model": {
                    "projector_layers": 2,
                    "projector_hidden": 2048,
                    "projector_dim": 2048,
                },
            },
        ),
    ),
    "swav": Recipe(
        "SwAV with 3,000 prototypes, a queue of 3,840 from epoch 50 and no small crops.",
        "solo-learn",
        "89.17 and 64.88 at 1000 epochs",
        _cifar(
            SWAV,
            _SOLO,
            {
                "views": {
                    "scale": (0.08, 1.0),
                    "weak": {"blur": 0.5},
                    "local": {"sizes": ()},
                },
                "model": {"projector_hidden": 2048},
                "method": {"queue_epoch": 50, "freeze_steps": 390},
                "optim": {
                    "lr": 0.6,
                    "final_lr": 0.0,
                    "weight_decay": 1e-6,
                    "decay_vectors": False,
                },
            },
        ),
    ),
    "adco": Recipe(
        "AdCo with 8,192 learned negatives.",
        "our starting point",
        "",
        _cifar(ADCO, {"method": {"key_momentum": 0.99, "num_negatives": 8192}}),
    ),
    "instdisc": Recipe(
        "Instance discrimination, softmax over all rows.",
        "InstDisc, CIFAR code",
        "",
        _cifar(
            INSTDISC,
            _ONE_VIEW,
            {
                "batch_size": 128,
                "views": {"weak": {"flip": 0.0}},
                "method": {"temperature": 0.1, "num_negatives": 0},
                "optim": {"schedule": "step", "lr": 0.06},
            },
        ),
    ),
    "pirl": Recipe(
        "PIRL with four patches of 16 pixels.",
        "our starting point",
        "",
        _cifar(
            PIRL,
            _ONE_VIEW,
            {
                "batch_size": 256,
                "method": {
                    "temperature": 0.1,
                    "num_negatives": 4096,
                    "grid": 2,
                    "jigsaw_size": 40,
                    "patch_size": 16,
                },
            },
        ),
    ),
    "pcl": Recipe(
        "PCL with 250, 500 and 1,000 clusters after 20 epochs. Needs clsa[clustering].",
        "our starting point",
        "",
        _cifar(
            PCL,
            _QUEUE,
            {"method": {"num_clusters": (250, 500, 1000), "num_negatives": 200}},
        ),
    ),
    "clim": Recipe(
        "CLIM with 400 clusters and 20 neighbours. Needs clsa[clustering].",
        "our starting point",
        "",
        _cifar(CLIM, _QUEUE, _MIXTURE),
    ),
    "clim-multi-res": Recipe(
        "CLIM with every crop at 32 and at 24 pixels. Needs clsa[clustering].",
        "our starting point",
        "",
        _cifar(CLIM, _QUEUE, _MIXTURE, {"mixture": {"resolutions": (24,)}}),
    ),
    "infomin": Recipe(
        "MoCo with InfoMin's views.",
        "our starting point",
        "",
        _cifar(INFOMIN, _QUEUE, {"batch_size": 512}),
    ),
}
