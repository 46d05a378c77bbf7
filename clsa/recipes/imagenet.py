"""Recipes at 224 pixels, as published for ImageNet. None was trained here at that scale."""

from clsa.options.config import merge
from clsa.recipes.recipe import Overrides, Recipe

FIVE = (224, 192, 160, 128, 96)

MOCO_V1 = {
    "views": {
        "weak": {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_probability": 1.0, "blur": 0.0},
    },
    "model": {"projector_layers": 1},
    "method": {"name": "moco", "bank": "queue", "temperature": 0.07},
    "optim": {"schedule": "step"},
}
MOCO_V2 = {"method": {"name": "moco", "bank": "queue"}}
CLSA_OFFICIAL = {
    "method": {"name": "moco", "bank": "batch+queue"},
    "stronger": True,
    "strong": {"sizes": (96,), "pool": "official"},
}
CLSA_PAPER = merge(MOCO_V2, {"stronger": True, "strong": {"sizes": (96,), "pool": "paper"}})

# Batch statistics over the whole batch, and no weight decay for biases and norms.
LARGE_BATCH: Overrides = {
    "model": {"norm_groups": 1},
    "optim": {"name": "lars", "decay_vectors": False, "schedule": "cosine", "warmup_epochs": 10.0},
}
BYOL_VIEWS = {
    "scale": (0.08, 1.0),
    "weak": {"jitter": (0.4, 0.4, 0.2, 0.1), "blur": (1.0, 0.1), "solarize": (0.0, 0.2)},
}
SHARP = {"temperature": 0.1, "target_temperature": 0.1}
SIMCLR = merge(
    LARGE_BATCH,
    {
        "epochs": 1000,
        "batch_size": 4096,
        "views": {"scale": (0.08, 1.0), "weak": {"jitter": (0.8, 0.8, 0.8, 0.2)}},
        "model": {"projector_norm": "all-scaled"},
        "method": {"name": "simclr"},
        "optim": {"lr": 0.3, "weight_decay": 1e-6},
    },
)
BYOL = merge(
    LARGE_BATCH,
    {
        "epochs": 1000,
        "batch_size": 4096,
        "views": BYOL_VIEWS,
        "model": {"projector_norm": "hidden", "projector_hidden": 4096, "projector_dim": 256},
        "method": {"name": "byol"},
        "optim": {"lr": 0.2, "weight_decay": 1.5e-6},
    },
)
SIMSIAM = {
    "epochs": 100,
    "batch_size": 512,
    "model": {
        "zero_init_last": True,
        "projector_layers": 3,
        "projector_dim": 2048,
        "projector_norm": "all",
        "norm_groups": 1,
    },
    "method": {"name": "simsiam"},
    "optim": {"lr": 0.05},
}
SWAV = merge(
    LARGE_BATCH,
    {
        "views": {
            "scale": (0.14, 1.0),
            "weak": {"jitter": (0.8, 0.8, 0.8, 0.2)},
            "local": {"sizes": (96,) * 6},
        },
        "model": {"projector_norm": "hidden"},
        "method": {"name": "swav"},
        "strong": SHARP,
        "optim": {
            "lr": 0.6, "final_lr": 0.0006, "weight_decay": 1e-6, "warmup_epochs": 0.0,
            "decay_vectors": True,
        },
    },
)  # fmt: skip
ADCO = {
    "method": {"name": "adco"},
    "optim": {"schedule": "cosine-epoch", "final_lr": 0.0006},
}
INSTDISC = {
    "views": {"weak": {**MOCO_V1["views"]["weak"], "sizes": ()}},
    "model": {"projector_layers": 1},
    "method": {"name": "instdisc"},
    "strong": SHARP,
    "optim": {"schedule": "step"},
}
PIRL = {
    "epochs": 800,
    "batch_size": 1024,
    "views": {"scale": (0.08, 1.0), "weak": {**MOCO_V1["views"]["weak"], "sizes": ()}},
    "model": {"projector_layers": 1},
    "method": {"name": "pirl"},
    "strong": SHARP,
    "optim": {"schedule": "cosine-epoch", "final_lr": 0.00003, "decay_vectors": False},
}
PCL = {"method": {"name": "pcl"}}
CLIM = merge(
    MOCO_V2,
    {"epochs": 1200, "batch_size": 512, "clim": True, "optim": {"schedule": "cosine"}},
)
INFOMIN = {
    "views": {
        "weak": {"jitter": (0.8, 0.8, 0.8, 0.2), "ops": {"pool": "randaugment", "rounds": 2}},
    },
    "method": {"name": "moco", "bank": "queue", "temperature": 0.15},
}
MOCO_V3 = merge(
    LARGE_BATCH,
    {
        "epochs": 300,
        "batch_size": 4096,
        "views": merge(BYOL_VIEWS, {"scale": (0.2, 1.0)}),
        "model": {
            "zero_init_last": True,
            "projector_hidden": 4096,
            "projector_dim": 256,
            "projector_norm": "all",
        },
        "method": {"name": "moco-v3", "key_momentum": 0.99},
        "optim": {"lr": 0.3, "weight_decay": 1e-6},
    },
)
MOCO_V3_VIT = merge(
    MOCO_V3,
    {
        "views": {"scale": (0.08, 1.0)},
        "model": {"encoder": "vit_small_patch16_224", "projector_layers": 3},
        "method": {"temperature": 0.2, "predictor_norm": "all"},
        "optim": {
            "name": "adamw", "lr": 1.5e-4, "weight_decay": 0.1, "warmup_epochs": 40.0,
            "decay_vectors": True,
        },
    },
)  # fmt: skip
DINO = {
    "epochs": 300,
    "batch_size": 1024,
    "views": {
        "scale": (0.4, 1.0),
        "weak": {
            "jitter": (0.4, 0.4, 0.2, 0.1),
            "blur": (1.0, 0.1, 0.5),
            "solarize": (0.0, 0.2, 0.0),
        },
        "local": {"sizes": (96,) * 8, "scale": (0.05, 0.4)},
    },
    "model": {
        "encoder": "vit_small_patch16_224",
        "projector_layers": 3,
        "projector_dim": 256,
        "projector_activation": "gelu",
        "norm_groups": 1,
    },
    "method": {"name": "dino"},
    "strong": SHARP,
    "optim": {
        "name": "adamw",
        "lr": 5e-4,
        "final_lr": 2.5e-7,
        "weight_decay": 0.04,
        "final_weight_decay": 0.4,
        "decay_vectors": False,
        "clip_norm": 3.0,
        "schedule": "cosine",
        "warmup_epochs": 10.0,
    },
}
DINO_RESNET = merge(
    DINO,
    {
        "epochs": 100,
        "batch_size": 512,
        "views": {"scale": (0.14, 1.0), "local": {"scale": (0.05, 0.14)}},
        "model": {"encoder": "resnet50"},
        "method": {"teacher_temperature": 0.04},
        "optim": {
            "name": "sgd",
            "lr": 0.03,
            "final_lr": 5e-7,
            "weight_decay": 1e-4,
            "final_weight_decay": 1e-4,
        },
    },
)
SUPERVISED = {
    "views": {
        "scale": (0.08, 1.0),
        "weak": {"sizes": (), "jitter_probability": 0.0, "grayscale": 0.0, "blur": 0.0},
    },
    "method": {"name": "supervised"},
    "optim": {"lr": 0.1, "schedule": "cosine"},
}

IMAGENET: dict[str, Recipe] = {
    "moco-v1": Recipe(
        "MoCo v1: linear projector, temperature 0.07, jitter always on, no blur, rate in steps.",
        "MoCo, paper and code",
        "60.8 at 200 epochs",
        MOCO_V1,
    ),
    "moco-v2": Recipe(
        "MoCo v2: one weak query, keys in a queue. The baseline of every table.",
        "MoCo v2, paper and code",
        "67.5 at 200 epochs, 53 h on 8 V100; 71.1 at 800",
        MOCO_V2,
    ),
    "moco-multi": Recipe(
        "MoCo v2 with 5 weak queries (224 to 96) and batch keys: CLSA* without its divergence.",
        "CLSA's code",
        "no figure (AdCo with the same crops: 73.2)",
        {"views": {"weak": {"sizes": FIVE}}, "method": {"name": "moco", "bank": "batch+queue"}},
    ),
    "clsa-paper": Recipe(
        "CLSA as in the paper's equations: one strong view of 96, Invert in the pool, queue only.",
        "CLSA, paper",
        "no figure (the paper's figures are of the code's variant)",
        CLSA_PAPER,
    ),
    "clsa-official": Recipe(
        "CLSA as in its code: one strong view of 96, Identity in the pool, batch keys.",
        "CLSA, code",
        "69.4 at 200 epochs, 70 h on 8 V100; 72.2 at 800",
        CLSA_OFFICIAL,
    ),
    "clsa": Recipe(
        "CLSA: the same as clsa-official until docs/evidence.md says otherwise.",
        "CLSA, code",
        "as clsa-official",
        CLSA_OFFICIAL,
    ),
    "clsa-multi-paper": Recipe(
        "CLSA* as in the paper: one weak query, five strong ones (224 to 96), queue only.",
        "CLSA, paper",
        "",
        merge(CLSA_PAPER, {"strong": {"sizes": FIVE}}),
    ),
    "clsa-multi": Recipe(
        "CLSA* as in its code: five weak and five strong queries, 5 + 25 terms.",
        "CLSA, code",
        "73.3 at 200 epochs, 166 h on 8 V100; 76.2 at 800",
        merge(CLSA_OFFICIAL, {"views": {"weak": {"sizes": FIVE}}, "strong": {"sizes": FIVE}}),
    ),
    "moco-strong-query": Recipe(
        "CLSA's Table 5, row 2: MoCo v2 whose queries are strong views of 224.",
        "CLSA, paper",
        "67.7 at 200 epochs",
        merge(MOCO_V2, {"method": {"strong_query": True}}),
    ),
    "moco-strong-query-key": Recipe(
        "CLSA's Table 5, row 3: queries and keys are strong views of 224.",
        "CLSA, paper",
        "67.0 at 200 epochs",
        merge(MOCO_V2, {"method": {"strong_query": True, "strong_key": True}}),
    ),
    "clsa-contrastive": Recipe(
        "CLSA's Table 5, row 4: contrastive loss on the strong view (one-hot target).",
        "CLSA, paper",
        "68.0 at 200 epochs",
        merge(CLSA_OFFICIAL, {"strong": {"target": "one-hot"}}),
    ),
    "simclr": Recipe(
        "SimCLR: the other pictures of a large batch are the negatives.",
        "SimCLR, paper (v1 head; weight decay of the paper, not of the code)",
        "61.9 at 200 epochs and 70.0 at 800, by CLSA's tables",
        # the last norm of a block starts at zero: simclr resnet.py:395, 480
        merge(SIMCLR, {"model": {"zero_init_last": True}}),
    ),
    "byol": Recipe(
        "BYOL: predict the momentum network's projection of the other view; no negatives.",
        "BYOL, paper",
        "74.3 at 1000 epochs",
        BYOL,
    ),
    "simsiam": Recipe(
        "SimSiam: predict the same network's projection of the other view, without its gradient.",
        "SimSiam, paper",
        "68.1 at 100 epochs",
        SIMSIAM,
    ),
    "swav": Recipe(
        "SwAV: predict a view's assignment to 3,000 prototypes; two crops of 224, six of 96.",
        "SwAV, code, batch 256",
        "72.7 at 200 epochs; 75.3 at 800 with batch 4096",
        SWAV,
    ),
    "adco": Recipe(
        "AdCo: MoCo with 65,536 negatives that are learned as the network's adversaries.",
        "AdCo, paper and code",
        "68.6 at 200 epochs; 72.8 at 800",
        ADCO,
    ),
    "adco-multi": Recipe(
        "AdCo with five weak queries (224 to 96), the crops of CLSA*.",
        "AdCo, code",
        "73.2 at 200 epochs; 75.7 at 800",
        merge(ADCO, {"views": {"weak": {"sizes": FIVE}}}),
    ),
    "instdisc": Recipe(
        "Instance discrimination: one memory row per picture, noise-contrastive estimation.",
        "InstDisc, code",
        "54.0 at 200 epochs",
        INSTDISC,
    ),
    "pirl": Recipe(
        "PIRL: a picture and its nine shuffled patches against the picture's memory row.",
        "PIRL, paper, with a softmax instead of its noise-contrastive estimate",
        "63.6 at 800 epochs",
        PIRL,
    ),
    "pcl": Recipe(
        "PCL v2: MoCo v2, plus a contrast with cluster centres. Needs clsa[clustering].",
        "PCL, code",
        "67.6 at 200 epochs (its code); 65.9 in CLSA's table; k-means with so many clusters takes "
        "hours per epoch on CPUs: lower --method.num-clusters",
        PCL,
    ),
    "clim": Recipe(
        "CLIM: queries are mixed with a neighbour nearer to their cluster's centre. Needs "
        "clsa[clustering].",
        "CLIM, paper; temperature and key network of MoCo v2",
        "70.1 at 200 epochs",
        CLIM,
    ),
    "clim-multi-res": Recipe(
        "CLIM with every crop at 224 and at 160 pixels. Needs clsa[clustering].",
        "CLIM, paper, except that pairs of resolutions are averaged, not summed",
        "72.3 at 200 epochs; 75.5 at 1200",
        merge(CLIM, {"mixture": {"resolutions": (160,)}}),
    ),
    "clim-multi-crop": Recipe(
        "CLIM with two crops of 224 and two small ones of 96: the paper's other baseline. Needs "
        "clsa[clustering].",
        "CLIM, paper",
        "69.7 at 200 epochs",
        merge(CLIM, {"views": {"local": {"sizes": (96,) * 2}}}),
    ),
    "infomin": Recipe(
        "MoCo with InfoMin's views: strong jitter and two rounds of RandAugment, no jigsaw.",
        "InfoMin, code, except that grayscale comes last there",
        "70.1 at 200 epochs, 73.0 at 800, both with the jigsaw branch",
        INFOMIN,
    ),
    "moco-v3": Recipe(
        "MoCo v3 on a ResNet-50: keys of the other view, batch 4096, no queue.",
        "MoCo v3, code",
        "72.8 at 300 epochs (74.6 at 1000, key momentum 0.996, decay 1.5e-6)",
        MOCO_V3,
    ),
    "moco-v3-vit": Recipe(
        "MoCo v3 on a ViT-S/16 with a patch embedding that stays random.",
        "MoCo v3, code; timm's ViT-S has 6 heads, MoCo v3's has 12",
        "73.2 at 300 epochs",
        MOCO_V3_VIT,
    ),
    "dino": Recipe(
        "DINO on a ViT-S/16: follow the momentum network's sharpened assignments.",
        "DINO, code",
        "76.0 at 300 epochs (20-NN 73.3), 2.6 days on 16 V100, without the last layer's fixed "
        "length; its linear layer sees the class tokens of the last four blocks, ours of one",
        DINO,
    ),
    "dino-resnet": Recipe(
        "DINO on a ResNet-50: larger crops, plain SGD, a colder teacher.",
        "DINO, code",
        "no figure at 100 epochs (75.3 at 800, with other values)",
        DINO_RESNET,
    ),
    "supervised": Recipe(
        "Cross-entropy with labels: the reference row of every table.",
        "usual values",
        "76.5 in CLSA's tables",
        SUPERVISED,
    ),
}
