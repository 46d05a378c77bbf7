"""Named runs. A recipe is what departs from the defaults of `options.py`.

Published figures are ImageNet top-1 of a linear classifier after 200 epochs of a ResNet-50.
"""

from collections.abc import Callable
from typing import Any

from clsa.config import merge, nearest
from clsa.errors import ClsaError
from clsa.options import RunOptions

Overrides = dict[str, Any]
FIVE = (224, 192, 160, 128, 96)
FIVE_SMALL = {224: 32, 192: 28, 160: 24, 128: 20, 96: 16}


def moco_v1() -> Overrides:
    """MoCo v1: linear projector, T 0.07, always jitter, no blur, rate to a tenth at 60 and 80 %.

    `clsa pretrain --recipe moco-v1 --data IMAGENET`: 60.8 published; not measured here.
    """
    return {
        "views": {
            "weak": {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_probability": 1.0, "blur": 0.0},
        },
        "model": {"projector_layers": 1},
        "method": {"name": "moco", "bank": "queue", "temperature": 0.07},
        "optim": {"schedule": "step"},
    }


def moco_v2() -> Overrides:
    """MoCo v2: one weak query, keys in a queue, no strong views. The baseline of every table.

    `clsa pretrain --recipe moco-v2 --data IMAGENET`: 67.5 linear top-1 published, 53 h on 8 V100;
    not measured here. `moco-v2-small` on clipart, 14 epochs: 20-NN +4.4 points (docs/evidence.md).
    """
    return {"method": {"name": "moco", "bank": "queue"}}


def moco_multi() -> Overrides:
    """MoCo v2 with 5 weak queries (224 to 96) and batch keys: CLSA* without its divergence.

    `clsa pretrain --recipe moco-multi --data IMAGENET`: nothing published; AdCo with
    the same crops has 73.2. Not measured here.
    """
    return {"views": {"weak": {"sizes": FIVE}}, "method": {"name": "moco", "bank": "batch+queue"}}


def clsa_official() -> Overrides:
    """CLSA as its released code computes it: one strong view of 96, Identity pool, batch keys.

    `clsa pretrain --recipe clsa-official --data IMAGENET`: 69.4 linear top-1 published, 70 h on 8
    V100; not measured here. `clsa-small` on clipart, 14 epochs, about 3 minutes on 2 cores: 20-NN
    +6.1 points, +5.9 on strong queries (docs/evidence.md).
    """
    return {
        "method": {"name": "moco", "bank": "batch+queue"},
        "stronger": True,
        "strong": {"sizes": (96,), "pool": "official"},
    }


def clsa_paper() -> Overrides:
    """CLSA as its equations read: one strong view of 96, Invert in the pool, queue only.

    `clsa pretrain --recipe clsa-paper --data IMAGENET`: the released numbers came from the code's
    variant; not measured here.
    """
    return {
        "method": {"name": "moco", "bank": "queue"},
        "stronger": True,
        "strong": {"sizes": (96,), "pool": "paper"},
    }


def clsa() -> Overrides:
    """CLSA: equal to clsa-official until docs/evidence.md says otherwise."""
    return clsa_official()


def clsa_multi_paper() -> Overrides:
    """CLSA* as the paper reads: one weak query, five strong ones (224 to 96), queue only.

    `clsa pretrain --recipe clsa-multi-paper --data IMAGENET`: not measured here.
    """
    return merge(clsa_paper(), {"strong": {"sizes": FIVE}})


def clsa_multi() -> Overrides:
    """CLSA* as its released code computes it: five weak and five strong queries, 5 + 25 terms.

    `clsa pretrain --recipe clsa-multi --data IMAGENET`: 73.3 published, 166 h on 8 V100;
    not measured here.
    """
    return merge(clsa_official(), {"views": {"weak": {"sizes": FIVE}}, "strong": {"sizes": FIVE}})


def moco_strong_query() -> Overrides:
    """The paper's Table 5, row 2 (67.7): MoCo v2 whose queries are strong views of 224."""
    return merge(moco_v2(), {"method": {"strong_query": True}})


def moco_strong_query_key() -> Overrides:
    """The paper's Table 5, row 3 (67.0): queries and keys are strong views of 224."""
    return merge(moco_v2(), {"method": {"strong_query": True, "strong_key": True}})


def clsa_contrastive() -> Overrides:
    """The paper's Table 5, row 4 (68.0): the strong view is contrasted, the target is one-hot."""
    return merge(clsa_official(), {"strong": {"target": "one-hot"}})


def small(overrides: Overrides) -> Overrides:
    """A recipe at 32 pixels for a CPU: resnet10-w32, queue of 4,096, key momentum 0.99, no blur.

    A single strong view keeps the full 32 pixels, since 96/224 of 32 would leave 14; five views
    take 32 to 16.
    """
    weak = overrides.get("views", {}).get("weak", {}).get("sizes", (224,))
    strong = overrides.get("strong", {}).get("sizes", (96,))
    shrunk = {
        "epochs": 20,
        "views": {
            "size": 32,
            "eval_crop": 1.0,
            "weak": {"sizes": tuple(FIVE_SMALL[size] for size in weak), "blur": 0.0},
        },
        "strong": {
            "sizes": tuple(FIVE_SMALL[size] for size in strong) if len(strong) > 1 else (32,)
        },
        "model": {"encoder": "resnet10-w32", "projector_hidden": 256},
        "method": {"queue_size": 4096, "key_momentum": 0.99},
        "optim": {"lr": 0.06, "weight_decay": 5e-4},
    }
    if overrides.get("optim", {}).get("schedule") is None:
        shrunk["optim"]["schedule"] = "cosine"
    return merge(overrides, shrunk)


FULL: dict[str, Callable[[], Overrides]] = {
    "moco-v1": moco_v1,
    "moco-v2": moco_v2,
    "moco-multi": moco_multi,
    "clsa-paper": clsa_paper,
    "clsa-official": clsa_official,
    "clsa": clsa,
    "clsa-multi-paper": clsa_multi_paper,
    "clsa-multi": clsa_multi,
    "moco-strong-query": moco_strong_query,
    "moco-strong-query-key": moco_strong_query_key,
    "clsa-contrastive": clsa_contrastive,
}
NAMES = [*FULL, *(f"{name}-small" for name in FULL)]


def overrides_of(name: str) -> Overrides:
    """What recipe `name` sets.

    Raises:
        ClsaError: for an unknown name, with the nearest one.
    """
    base = name.removesuffix("-small")
    if base not in FULL:
        close = nearest(name, NAMES)
        hint = f"did you mean {close}?" if close else "`clsa recipes` lists them"
        raise ClsaError(f"recipe {name}", "no such recipe", hint)
    overrides = FULL[base]()
    return {**(small(overrides) if name != base else overrides), "recipe": name}


def resolve(values: Overrides, source: str = "options") -> RunOptions:
    """Options from `values`, which win over the recipe that they name, which wins over defaults.

    Raises:
        ClsaError: for an unknown recipe, name or value; `source` says where they come from.
    """
    name = values.get("recipe", RunOptions.model_fields["recipe"].default)
    return RunOptions.parse(merge(overrides_of(str(name)), values), source)
