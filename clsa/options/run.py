"""Every option of a run and its default, in one place. Needs no torch.

`clsa pretrain --help`, `config.yaml` and `clsa.pretrain(...)` all read these classes. Defaults are
those of the official CLSA code on ImageNet; a recipe (`recipes/`) changes some of them.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tyro

from clsa.options.config import Config, Count, Fraction, Limit, NotNegative, Positive, Range, Share
from clsa.options.methods import KINDS, MethodOptions, MoCoOptions
from clsa.options.wrappers import (
    ContinualOptions,
    MixtureOptions,
    Operations,
    Sizes,
    StrongOptions,
    SuNCEtOptions,
)

Seed = Annotated[int, pydantic.Field(ge=0, lt=1 << 62)]


class DataOptions(Config):
    """Which pictures are used, and how they are read."""

    data: str = ""
    """Pictures: a folder, a folder written by `clsa pack`, a list (.txt, .csv), an .npz or
    .npy, `clipart`, or NAME[:PATH], where NAME is fashion-mnist, cifar10, cifar100 or
    stl10."""
    val: str | None = None
    """Labelled pictures for evaluation, in the same forms (default: the data set's own test
    split)."""
    class_list: Path | None = None
    """Text file with one class folder per line: use only these (ImageNet subsets)."""
    num_images: Count | None = None
    """Use only the first N pictures."""
    value_range: Range | None = None
    """Values that become black and white, for gray pictures of 16 or 32 bits, such as 0 4095 for
    12-bit scans: one scale for all of them (default: 16 bits from 0 65535, 32 bits each from its
    own range). Others stay as they are."""
    max_unreadable: Limit | None = None
    """End the run when more pictures than this cannot be read: a number, or a share such as 1%
    (default: 0.1 %, but at least 10)."""
    resident_limit: Positive = 1.0
    """Keep the whole set on the device, as uint8, if its pictures all have one size and take at
    most this many GiB."""
    resident_size: Annotated[int, pydantic.Field(ge=8)] | None = None
    """Resize every picture once, to a centre square of this side in pixels, and keep the set on
    the device."""
    workers: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Processes that decode pictures when the set is not kept on the device (default: one fewer
    than this process's share of the cores, at most 8)."""


PerView = tuple[Fraction, ...]


class WeakViews(Config):
    """Weak views, by default MoCo v2's recipe (crop, jitter, grayscale, blur, flip).

    `blur` and `solarize` take one number per view, in the order of views.png. The last number also
    applies to all later views, including the strong ones.
    """

    sizes: Sizes = (224,)
    """Sides in pixels of the weak crops after the first: the queries of MoCo, the second view of
    SimCLR; none for methods with one view."""
    jitter: tuple[
        NotNegative, NotNegative, NotNegative, Annotated[float, pydantic.Field(ge=0, le=0.5)]
    ] = (0.4, 0.4, 0.4, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter."""
    jitter_probability: Fraction = 0.8
    """Probability of jitter."""
    grayscale: Fraction = 0.2
    """Probability of turning a crop gray."""
    blur: PerView = (0.5,)
    """Probability of Gaussian blur (sigma 0.1 to 2 pixels)."""
    solarize: PerView = (0.0,)
    """Probability of inverting all values above half brightness."""
    flip: Fraction = 0.5
    """Probability of mirroring the crop left to right."""
    ops: Operations = Operations(pool="randaugment", rounds=0)

    @pydantic.field_validator("blur", "solarize", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (int, float)) else value


class LocalViews(Config):
    """Small weak crops that cover a small part of the picture (SwAV, DINO)."""

    sizes: Sizes = ()
    """Sides of the small crops in pixels, one crop each."""
    scale: tuple[Share, Share] = (0.05, 0.14)
    """Smallest and largest share of the picture's area that a small crop covers."""


class ViewOptions(Config):
    """Crops and pixel operations."""

    size: Annotated[int, pydantic.Field(ge=8)] = 224
    """Side in pixels of the first view (MoCo's key) and of pictures at evaluation. The other views
    move with it: each keeps its share of this side (rounded to a multiple of 4), unless its own
    size is given."""
    scale: tuple[Share, Share] = (0.2, 1.0)
    """Smallest and largest share of the picture's area that a crop of `size` covers. Smaller crops
    cover proportionally less (times side / size), as in the official code."""
    eval_crop: Share = 0.875
    """Side of the centre square used at evaluation, as a share of the picture's short side."""
    weak: WeakViews = WeakViews()
    local: LocalViews = LocalViews()


class ModelOptions(Config):
    """Encoder and projector."""

    encoder: str = "resnet50"
    """Any timm model, or resnet10-w32 (small, for CPUs and pictures of 32 to 64 pixels)."""
    small_stem: bool = False
    """For ResNets: a 3x3 stride-1 first convolution and no max-pool (pictures under 100 pixels)."""
    zero_init_last: bool = False
    """For ResNets: the last norm of each block starts at zero."""
    projector_layers: Annotated[int, pydantic.Field(ge=0, le=4)] = 2
    """Number of linear layers in the projector (0: the features themselves are compared)."""
    projector_hidden: Count = 2048
    """Width of the projector's hidden layers."""
    projector_dim: Count = 128
    """Length of the projections that are compared."""
    projector_norm: Literal["none", "hidden", "all", "all-scaled"] = "none"
    """Batch norm in the projector. none: no batch norm; hidden: after the hidden layers; all: after
    the last layer too, there without scale and shift; all-scaled: like all, but the last norm has
    a scale."""
    projector_activation: Literal["relu", "gelu"] = "relu"
    """Activation between the projector's layers."""
    norm_groups: Count = 8
    """Batch norm computes its statistics separately in this many groups of the global batch (8
    stands for MoCo's 8 GPUs), at least one group per process. 1: over the whole batch, across all
    processes."""


class OptimOptions(Config):
    """Optimiser and schedule."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """lars: SGD with layer-wise rates, for large batches; adamw: for transformers."""
    lr: Positive = 0.03
    """Learning rate for a batch of 256 pictures; it is scaled by batch size / 256."""
    momentum: Fraction = 0.9
    """Momentum of SGD and LARS: the share of the last update that is kept in the next."""
    weight_decay: NotNegative = 1e-4
    """Share of each weight that is added to its gradient (adamw: subtracted from the weight at each
    step, times the rate)."""
    final_weight_decay: NotNegative | None = None
    """Weight decay at the end of the run, reached along a cosine (default: constant)."""
    decay_vectors: bool = True
    """Apply weight decay, and the layer-wise rate of lars, to biases and norms too."""
    trust: Positive = 0.001
    """lars: scale each gradient to this share of its weight's norm."""
    clip_trust: bool = False
    """lars: only shorten the updates of plain SGD, never lengthen them."""
    clip_norm: Positive | None = None
    """Shorten the gradient of each parameter to at most this norm."""
    schedule: Literal["cosine", "cosine-epoch", "step", "constant"] = "cosine-epoch"
    """When the learning rate changes. cosine: at every step; cosine-epoch (official code): at every
    epoch; step: at the milestones."""
    milestones: tuple[Fraction, ...] = (0.6, 0.8)
    """step: shares of the run after which the learning rate drops to a tenth."""
    warmup_epochs: NotNegative = 0.0
    """Epochs over which the learning rate rises from zero."""
    final_lr: NotNegative = 0.0
    """cosine: learning rate at the end, for a batch of 256 pictures."""


Tensorboard = Literal["auto", "on", "off"]


class RunOptions(Config):
    """All options of a pretraining run."""

    recipe: str = "clsa-small"
    """Named starting point (`clsa recipes` lists them). Options that you set replace its values.
    Recipes that end in -small suit a CPU and small pictures, the others a GPU."""
    config: Path | None = None
    """YAML file of options, such as a run's config.yaml; flags replace its values."""
    out: Path = Path("runs/clsa")
    """Folder of the run. To resume the run, give the same command again."""
    data: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    seed: Seed = 0
    """Seed of the initial weights, the order of the pictures and all randomness of the views."""
    epochs: Count = 200
    """Number of passes over the pictures."""
    batch_size: Annotated[int, pydantic.Field(ge=2)] = 256
    """Pictures per step, over all processes together."""
    max_steps: Count | None = None
    """Stop after this step; the schedule still follows `epochs`, and the run can be resumed."""
    max_minutes: Positive | None = None
    """Stop after this many minutes; the run can be resumed."""
    wait_minutes: Positive = 10.0
    """With several processes: how many minutes to wait for one that does not answer."""
    save_minutes: Positive = 15.0
    """Save a checkpoint at least once in this many minutes, besides the one at every epoch."""
    keep_every: Annotated[int, pydantic.Field(ge=0)] = 0
    """Keep a checkpoint of every Nth epoch (0: only the last two and the best)."""
    probe_every: Annotated[int, pydantic.Field(ge=0)] = 1
    """Epochs between online 20-NN probes, if there are labels (0: no probes)."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    accept_data_change: bool = False
    """Continue although pictures were added, removed or changed: with the run's newest weights,
    from the start of the epoch that they had reached."""
    stop_on_collapse: bool = False
    """Stop the run (exit code 76) when an alarm says that the projections have collapsed."""
    tensorboard: Tensorboard = "auto"
    """Write tensorboard/ too: auto does if the library is installed (pip install
    "clsa[tensorboard]")."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast if the hardware supports it when the run begins."""
    threads: Count | None = None
    """Threads of each process, besides --data.workers (default: this process's share of the cores
    when the run begins, as far as affinity, a container's quota and SLURM allow). A resumed run
    keeps their number; another number, given then, changes the last bits."""
    compile: bool = False
    """Use torch.compile for the encoders and the colour jitter (for GPUs; the first steps take
    minutes)."""
    views: ViewOptions = ViewOptions()
    model: ModelOptions = ModelOptions()
    method: MethodOptions = MoCoOptions()
    optim: OptimOptions = OptimOptions()
    stronger: bool = False
    """Also learn from stronger augmentations. This turns any method into its CLSA form."""
    strong: StrongOptions = StrongOptions()
    clim: bool = False
    """Mix each picture with a neighbour (CLIM). For methods with keys: moco, adco, pcl."""
    mixture: MixtureOptions = MixtureOptions()
    labels: str | None = None
    """Also learn from a few labels (SuNCEt, with any method): a share of them such as 10%, or a
    text file with one labelled picture per line."""
    suncet: SuNCEtOptions = SuNCEtOptions()
    stages: tuple[str, ...] = ()
    """Learn from several sets one after the other without forgetting much: sets in any form that
    --data takes, or classes:N to split the classes of --data into N sets."""
    continual: ContinualOptions = ContinualOptions()

    @classmethod
    def example(cls, values: dict[str, Any]) -> "RunOptions":
        """Default options, with those of the method that `values` names."""
        given = values.get("method")
        name = given.get("name") if isinstance(given, dict) else None
        return cls.model_construct(method=KINDS.get(str(name), MoCoOptions)())

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "RunOptions":
        if self.stronger and not self.strong.sizes:
            raise ValueError("--stronger needs strong views: set strong.sizes")
        if self.clim + (self.labels is not None) + bool(self.stages) > 1:
            raise ValueError("--clim, --labels and --stages cannot be combined: choose one")
        if self.batch_size < 2 * self.model.norm_groups:
            groups = f"{self.batch_size} pictures in {self.model.norm_groups} groups"
            raise ValueError(
                f"batch norm needs two pictures per group, not {groups}: "
                "raise batch_size or lower model.norm_groups"
            )
        if self.views.scale[0] > self.views.scale[1]:
            raise ValueError("views.scale: the smaller share comes first")
        return self
