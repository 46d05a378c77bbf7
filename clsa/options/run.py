"""Every option of a run and its default, in one place that needs no torch.

`clsa pretrain --help`, `config.yaml` and `clsa.pretrain(...)` all read these classes. Defaults are
those of the official CLSA code on ImageNet; a recipe (`recipes/`) is a set of departures.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tyro

from clsa.options.config import Config, Count, Fraction, NotNegative, Positive, Share
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
    """Which pictures, and how they are read."""

    data: str = ""
    """Pictures: a folder, what `clsa pack` made of one, a list file, an .npz, `clipart`, or
    NAME[:PATH] with fashion-mnist, cifar10, cifar100, stl10."""
    val: str | None = None
    """Labelled pictures for evaluation, in the same forms (default: the set's own test split)."""
    class_list: Path | None = None
    """Text file with one class folder a line: use only these (ImageNet subsets)."""
    num_images: Count | None = None
    """Use only the first N pictures."""
    resident_limit: Positive = 1.0
    """Sets of one picture size are kept on the device as uint8 up to this many GiB."""
    resident_size: Annotated[int, pydantic.Field(ge=8)] | None = None
    """Resize every picture once (short side, centre square, in pixels); keep the set resident."""
    workers: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Processes that decode pictures when the set is streamed (default: one fewer than the
    process's share of the cores, at most 8)."""


PerView = tuple[Fraction, ...]


class WeakViews(Config):
    """Weak views, by default MoCo v2's recipe (crop, jitter, grayscale, blur, flip).

    `blur` and `solarize` take one number a view, in the order of views.png; the last holds for all
    views after it, the strong ones among them.
    """

    sizes: Sizes = (224,)
    """Sides of the weak crops after the first in pixels: the queries of MoCo, the other view of
    SimCLR; none for methods of one view."""
    jitter: tuple[
        NotNegative, NotNegative, NotNegative, Annotated[float, pydantic.Field(ge=0, le=0.5)]
    ] = (0.4, 0.4, 0.4, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter."""
    jitter_probability: Fraction = 0.8
    """Probability of jitter."""
    grayscale: Fraction = 0.2
    """Probability of dropping the colour."""
    blur: PerView = (0.5,)
    """Probability of Gaussian blur, sigma 0.1 to 2 pixels."""
    solarize: PerView = (0.0,)
    """Probability of inverting what is brighter than half."""
    flip: Fraction = 0.5
    """Probability of mirroring left and right."""
    ops: Operations = Operations(pool="randaugment", rounds=0)

    @pydantic.field_validator("blur", "solarize", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (int, float)) else value


class LocalViews(Config):
    """Small weak crops that take little of the picture (SwAV, DINO)."""

    sizes: Sizes = ()
    """Their sides in pixels."""
    scale: tuple[Share, Share] = (0.05, 0.14)
    """Share of the picture's area that one takes."""


class ViewOptions(Config):
    """Crops and pixel operations."""

    size: Annotated[int, pydantic.Field(ge=8)] = 224
    """Side in pixels of the first view (MoCo's key) and of pictures at evaluation."""
    scale: tuple[Share, Share] = (0.2, 1.0)
    """Share of the picture's area that a crop of `size` takes; smaller crops take
    proportionally less (times side / size), as in the official code."""
    eval_crop: Share = 0.875
    """Side of the centre square seen at evaluation, as a share of the short side."""
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
    """Linear layers of the projector (0: the features themselves are compared)."""
    projector_hidden: Count = 2048
    """Width of the projector's hidden layers."""
    projector_dim: Count = 128
    """Length of the projections that are compared."""
    projector_norm: Literal["none", "hidden", "all", "all-scaled"] = "none"
    """Batch norm in the projector: none, after its hidden layers, or after the last too, there
    without scale and shift (all) or without shift (all-scaled)."""
    projector_activation: Literal["relu", "gelu"] = "relu"
    """Between the projector's layers."""
    norm_groups: Count = 8
    """Batch norm takes its statistics over this many groups of the global batch (MoCo's 8 GPUs), at
    least one a process; 1: over the whole batch, across all processes."""


class OptimOptions(Config):
    """Optimiser and schedule."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """lars: layer-wise rates, for large batches; adamw: for transformers."""
    lr: Positive = 0.03
    """Learning rate per 256 pictures: it is scaled by batch size / 256."""
    momentum: Fraction = 0.9
    """Share of the last update in the next."""
    weight_decay: NotNegative = 1e-4
    """Share of each weight added to its gradient (adamw: taken off it at each step)."""
    final_weight_decay: NotNegative | None = None
    """Weight decay at the end of the run, reached along a cosine (default: constant)."""
    decay_vectors: bool = True
    """Weight decay, and the layer-wise rate of lars, for biases and norms too."""
    trust: Positive = 0.001
    """lars: a step is at most about this share of a weight's norm, times the rate."""
    clip_trust: bool = False
    """lars: only ever shorten a step of plain SGD."""
    clip_norm: Positive | None = None
    """Shorten the gradient of each parameter to this norm."""
    schedule: Literal["cosine", "cosine-epoch", "step", "constant"] = "cosine-epoch"
    """cosine moves at every step, cosine-epoch (official code) at every epoch, step at
    milestones."""
    milestones: tuple[Fraction, ...] = (0.6, 0.8)
    """step: shares of the run after which the rate drops to a tenth."""
    warmup_epochs: NotNegative = 0.0
    """Epochs over which the rate rises from zero."""
    final_lr: NotNegative = 0.0
    """cosine: learning rate per 256 pictures at the end."""


class RunOptions(Config):
    """Everything that decides a pretraining run."""

    recipe: str = "clsa-small"
    """Named starting point (`clsa recipes` lists them); options win over it. The recipes that end
    in -small suit a CPU and small pictures, the others a GPU."""
    config: Path | None = None
    """YAML file of options (a run's config.yaml is one); flags win over it."""
    out: Path = Path("runs/clsa")
    """Folder of the run. The same command again resumes it."""
    data: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    seed: Seed = 0
    """Of the first weights, the order of the pictures and every draw of the views."""
    epochs: Count = 200
    """Passes over the pictures."""
    batch_size: Annotated[int, pydantic.Field(ge=2)] = 256
    """Global: over all processes."""
    max_steps: Count | None = None
    """Stop after this step; the schedule still follows `epochs`, and the run can be resumed."""
    max_minutes: Positive | None = None
    """Stop after this long; the run can be resumed."""
    wait_minutes: Positive = 10.0
    """With several processes: how long one that does not answer is waited for."""
    save_minutes: Positive = 15.0
    """A checkpoint at least this often, besides one an epoch."""
    keep_every: Annotated[int, pydantic.Field(ge=0)] = 0
    """Keep a checkpoint of every Nth epoch (0: only the last two and the best)."""
    probe_every: Annotated[int, pydantic.Field(ge=0)] = 1
    """Epochs between online 20-NN probes, when there are labels (0: none)."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    accept_data_change: bool = False
    """Go on although pictures have been added, taken away or changed: from the run's newest
    weights, at the beginning of the epoch that they stand in."""
    stop_on_collapse: bool = False
    """End the run (exit code 76) at an alarm that the projections have collapsed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast where the hardware computes in it."""
    compile: bool = False
    """torch.compile the encoders and the colour jitter (GPUs; the first steps take minutes)."""
    views: ViewOptions = ViewOptions()
    model: ModelOptions = ModelOptions()
    method: MethodOptions = MoCoOptions()
    optim: OptimOptions = OptimOptions()
    stronger: bool = False
    """Learn from stronger augmentations too: any method becomes its CLSA form."""
    strong: StrongOptions = StrongOptions()
    clim: bool = False
    """Mix each picture with a neighbour (CLIM); for methods with keys: moco, adco, pcl."""
    mixture: MixtureOptions = MixtureOptions()
    labels: str | None = None
    """Learn from few labels too (SuNCEt, any method): a share of them such as 10%, or a text file
    with a labelled picture a line."""
    suncet: SuNCEtOptions = SuNCEtOptions()
    stages: tuple[str, ...] = ()
    """Learn from several sets, one after the other, and forget little: sets as --data takes them,
    or classes:N to part the classes of --data into N."""
    continual: ContinualOptions = ContinualOptions()

    @classmethod
    def example(cls, values: dict[str, Any]) -> "RunOptions":
        """Defaults with the options of the method that `values` name."""
        given = values.get("method")
        name = given.get("name") if isinstance(given, dict) else None
        return cls.model_construct(method=KINDS.get(str(name), MoCoOptions)())

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "RunOptions":
        if self.stronger and not self.strong.sizes:
            raise ValueError("--stronger needs strong views: set strong.sizes")
        if self.clim + (self.labels is not None) + bool(self.stages) > 1:
            raise ValueError("--clim, --labels and --stages do not go together: choose one")
        if self.batch_size < 2 * self.model.norm_groups:
            groups = f"{self.batch_size} pictures in {self.model.norm_groups} groups"
            raise ValueError(
                f"batch norm needs two pictures a group, not {groups}: "
                "raise batch_size or lower model.norm_groups"
            )
        if self.views.scale[0] > self.views.scale[1]:
            raise ValueError("views.scale: the smaller share comes first")
        return self
