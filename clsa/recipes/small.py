"""Recipes at 32 pixels for a CPU: resnet10-w32, 20 epochs, narrow heads, short queues.

These are our own starting points. Each changes the published recipe of the same name only as far as
the small size requires. A single strong view keeps the full 32 pixels, since 96/224 of 32 would
leave 14; five views have 32 to 16 pixels.
"""

from clsa.options.config import merge
from clsa.recipes.imagenet import IMAGENET
from clsa.recipes.recipe import Overrides, Recipe

_SIZES = {224: 32, 192: 28, 160: 24, 128: 20, 96: 16}
_QUEUE: Overrides = {"method": {"queue_size": 4096, "key_momentum": 0.99}}
_PLAIN_SGD: Overrides = {
    "batch_size": 256,
    "optim": {"name": "sgd", "lr": 0.06, "weight_decay": 5e-4, "warmup_epochs": 0.0,
              "decay_vectors": True, "final_lr": 0.0},
}  # fmt: skip

_MIXTURE: Overrides = merge(
    _QUEUE, {"mixture": {"num_clusters": 46, "neighbours": 20, "refresh_epochs": 2}}
)

# On top of what `_small` changes for all. Recipes that are not listed use MoCo and take `_QUEUE`.
_CHANGES: dict[str, Overrides] = {
    "moco-v1": merge(_QUEUE, {"optim": {"schedule": "step"}}),
    # measured with blocks that do not start at zero (docs/evidence.md)
    "simclr": {"method": {"temperature": 0.2}, "model": {"zero_init_last": False}},
    "byol": {
        "model": {"projector_dim": 128},
        "method": {"predictor_hidden": 256, "queue_size": 4096, "key_momentum": 0.97},
    },
    "simsiam": {
        "model": {"projector_layers": 2, "projector_dim": 256},
        "method": {"predictor_hidden": 64},
    },
    "swav": {
        "views": {"local": {"sizes": (16,) * 2}},
        "method": {
            "num_prototypes": 256,
            "queue_size": 1024,
            "queue_epoch": 1,
            "freeze_steps": 5,
        },
    },
    "adco": {"method": {"key_momentum": 0.99, "num_negatives": 4096}},
    "adco-multi": {"method": {"key_momentum": 0.99, "num_negatives": 4096}},
    "instdisc": {
        "method": {"temperature": 0.1, "num_negatives": 0},
    },
    "pirl": {
        "method": {
            "temperature": 0.1,
            "num_negatives": 1024,
            "grid": 2,
            "jigsaw_size": 40,
            "patch_size": 16,
        },
    },
    "pcl": merge(
        _QUEUE,
        {"method": {"num_clusters": (50, 100, 200), "warmup_epochs": 2, "num_negatives": 64}},
    ),
    "clim": _MIXTURE,
    "clim-multi-res": merge(_MIXTURE, {"mixture": {"resolutions": (24,)}}),
    "clim-multi-crop": merge(_MIXTURE, {"views": {"local": {"sizes": (16,) * 2}}}),
    "moco-v3": {
        "model": {"projector_dim": 128},
        "method": {
            "temperature": 0.2,
            "predictor_hidden": 256,
            "queue_size": 4096,
            "key_momentum": 0.97,
        },
    },
    "moco-v3-vit": {
        "model": {"encoder": "vit6-w192", "projector_dim": 128},
        "method": {"predictor_hidden": 256, "queue_size": 4096, "key_momentum": 0.97},
        "optim": {"name": "adamw", "lr": 5e-4, "weight_decay": 0.1, "warmup_epochs": 1.0},
    },
    "dino": {
        "views": {"local": {"sizes": (16,) * 2}},
        "model": {"encoder": "vit6-w192", "projector_dim": 128},
        "method": {
            "key_momentum": 0.97,
            "num_prototypes": 1024,
            "teacher_warmup_epochs": 3.0,
            "freeze_epochs": 0.5,
        },
        "optim": {
            "name": "adamw",
            "lr": 5e-4,
            "weight_decay": 0.04,
            "warmup_epochs": 1.0,
            "decay_vectors": False,
        },
    },
    "dino-resnet": {
        "views": {"local": {"sizes": (16,) * 2}},
        "model": {"projector_dim": 128},
        "method": {
            "key_momentum": 0.97,
            "num_prototypes": 1024,
            "teacher_warmup_epochs": 3.0,
            "freeze_epochs": 0.5,
        },
        "optim": {"final_weight_decay": None, "decay_vectors": False},
    },
    "supervised": {},
}


def _small(name: str) -> Overrides:
    values = IMAGENET[name].values
    weak = values.get("views", {}).get("weak", {}).get("sizes", (224,))
    strong = values.get("strong", {}).get("sizes", (96,))
    form: Overrides = {
        "epochs": 20,
        "views": {
            "size": 32,
            "eval_crop": 1.0,
            "weak": {"sizes": tuple(_SIZES[size] for size in weak), "blur": 0.0},
        },
        "strong": {"sizes": tuple(_SIZES[size] for size in strong) if len(strong) > 1 else (32,)},
        "model": {"encoder": "resnet10-w32", "projector_hidden": 256},
        "optim": {"schedule": "cosine"},
    }
    own = _QUEUE if values["method"]["name"] == "moco" else {}
    return merge(merge(merge(values, form), _PLAIN_SGD), _CHANGES.get(name, own))


# Gains over the random encoder on clipart; see docs/evidence.md.
_SWEPT = "2 epochs of clipart, one seed, plain and --stronger (docs/evidence.md)"
_MEASURED: dict[str, str] = {
    "clsa": "20-NN +6.1 points, +5.9 on strong queries, in 14 epochs of clipart (docs/evidence.md)",
    "moco-v2": "20-NN +4.4 points, +2.0 on strong queries, in 14 epochs of clipart "
    "(docs/evidence.md)",
    **dict.fromkeys(
        (
            "simclr", "byol", "simsiam", "swav", "adco", "instdisc", "pirl", "pcl", "infomin",
            "moco-v3", "dino-resnet", "supervised",
        ),
        _SWEPT,
    ),
}  # fmt: skip

SMALL: dict[str, Recipe] = {
    name: Recipe(
        f"{name} at 32 pixels, for a CPU.", "ours", "", _small(name), _MEASURED.get(name, "")
    )
    for name in IMAGENET
}
