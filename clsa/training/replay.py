"""Compute a bad step again, and report which of its values are not finite."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clsa.loading import loader
from clsa.loading.crops import Crops
from clsa.methods.method import Method
from clsa.options.commands import ReplayOptions
from clsa.options.config import read_value
from clsa.options.run import RunOptions
from clsa.pictures.opening import open_source
from clsa.runs import checkpoint, computing
from clsa.runs.computing import Computing
from clsa.system import dist
from clsa.system.errors import ClsaError, Exit
from clsa.system.signals import Stop
from clsa.training.bad_steps import bad_gradients
from clsa.training.setup import Parts, assemble
from clsa.training.step import Run, agree, gradients, make_views, parallel


class Replay(NamedTuple):
    """A step that a run skipped, and what this process found when computing it again."""

    step: int
    reason: str
    """Why the run skipped it."""
    worlds: tuple[int, int]
    """Number of processes in the run, and in this replay."""
    others: list[str]
    """Settings that differ between the run and this replay."""
    rank: int
    """Rank of this process."""
    losses: dict[str, float]
    norm: float
    """Norm of the gradient."""
    weights: list[str]
    """Weights and buffers that were not finite before the step."""
    views: list[tuple[str, str]]
    """View and picture of each view that is not finite."""
    outputs: list[str]
    """Modules whose output is not finite, in the order of computation."""
    gradients: list[str]
    """Parameters whose gradient is not finite, in the order of the backward pass."""
    anywhere: tuple[bool, ...]
    """Whether any process found bad values: in loss or gradient, weights, views, outputs."""

    @property
    def is_bad(self) -> bool:
        """Whether the step is bad again."""
        return self.anywhere[0]


def replay(options: ReplayOptions) -> Replay:
    """Compute the gradient of a bad step again, from the same state, pictures and draws.

    The batch, its order and every draw follow from the run's seed and the step. The saved state is
    the one before the step, since the step changed nothing. Use as many processes as the run had,
    to compute the same sums: batch norm and several losses work on the rows of one process.

    Raises:
        ClsaError: 66 when the bundle is incomplete; 2 when the pictures have changed.
    """
    saved, _ = checkpoint.load_one(options.bundle)
    if "bad" not in saved:
        why = "a checkpoint, not the saved state of a bad step"
        raise ClsaError(str(options.bundle), why, "give RUN/bad/step-NNNNNN.ckpt", Exit.NO_INPUT)
    bad = saved["bad"]
    before = RunOptions.parse(read_value(bad["options"]), str(options.bundle))
    changes = {
        "data": before.data.model_copy(update={"data": options.data or before.data.data}),
        "out": options.bundle.resolve().parent.parent,  # the present folder of the run
        "precision": options.precision or before.precision,
        "device": options.device or before.device,
        "compile": False,  # the graphs would hide the modules
    }
    asked = before.model_copy(update=changes)
    device = dist.pick_device(asked.device)
    with dist.process_group(device):
        how = replayed(asked, options.precision, device)
        how.apply()
        parts = assemble(asked, open_source(asked.data.data, "train", asked.data), device, how)
        if saved["data_digest"] != parts.state.data_digest:
            why = "the pictures are not those of the run"
            raise ClsaError(asked.data.data, why, "give their path with --data")
        parts.state.take(saved)
        run = Run(asked, device, parts.order.steps_per_epoch, Stop(), how)
        worlds = (bad["world"], dist.world_size())
        kept = ("precision", "device", "compile")
        others = [name for name in kept if getattr(before, name) != getattr(asked, name)]
        others += ["number of processes"] if worlds[0] != worlds[1] else []
        return Replay(
            saved["step"], bad["reason"], worlds, others, dist.rank(), **_computed(parts, run)
        )


def replayed(asked: RunOptions, precision: str | None, device: torch.device) -> Computing:
    """How the run in `asked.out` computes, in another precision if one is asked for."""
    kept = computing.read(asked.out) or computing.as_before(asked, device)
    other = computing.begin(asked, device).precision if precision else kept.precision
    return kept.model_copy(update={"precision": other})


def _computed(parts: Parts, run: Run) -> dict[str, Any]:
    """The fields of `Replay` that need the computation; changes only batch norm statistics."""
    method, step = parts.state.method, parts.state.step
    weights = [name for name, value in method.state_dict().items() if not _is_finite(value)]
    (crops,) = loader.batches(
        parts.shown, method.view_specs, parts.order, step, step + 1, run.device, run.options.data,
        parts.quarantine, method.companions(),
    )  # fmt: skip
    batch = make_views(crops, method.view_specs, step, run)
    views, outputs = _bad_views(batch.views, crops, parts), _watch(method)
    output, loss, norm = gradients(parallel(method, run.options), batch, method, run)
    losses = {name: float(value.detach()) for name, value in output.losses.items()}
    found = [agree(loss, norm, run.stop).is_bad, bool(weights), bool(views), bool(outputs)]
    anywhere = dist.all_max(torch.tensor(found, dtype=torch.float32, device=run.device))
    return {
        "losses": losses,
        "norm": float(norm),
        "weights": weights,
        "views": views,
        "outputs": outputs,
        "gradients": bad_gradients(method),
        "anywhere": tuple(map(bool, anywhere.tolist())),
    }


def _bad_views(views: list[Tensor], crops: Crops, parts: Parts) -> list[tuple[str, str]]:
    ids, found = parts.shown.ids.take(crops.index.numpy()), []
    for spec, view in zip(parts.state.method.view_specs, views, strict=True):
        rows = (~view.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
        found += [(spec.name, ids[row]) for row in rows]
    return found


def _watch(method: Method) -> list[str]:
    """A list that hooks fill with the names of modules whose output is not finite."""
    found: list[str] = []
    names = {module: name for name, module in method.named_modules() if name}

    def see(module: nn.Module, _: object, output: object) -> None:
        if not _is_finite(output) and names[module] not in found:
            found.append(names[module])

    for module in names:
        module.register_forward_hook(see)
    return found


def _is_finite(value: object) -> bool:
    return not isinstance(value, Tensor) or bool(value.isfinite().all())


def describe(shown: Replay) -> str:
    """A replay as text for people; ranks above 0 give only what they found themselves."""
    terms = ", ".join(f"{name} {value:.4g}" for name, value in shown.losses.items())
    state = "not finite again" if shown.is_bad else "finite"
    own = f"process {shown.rank}: " if shown.worlds[1] > 1 else ""
    lines = [f"{own}the replay is {state}: {terms}, norm of the gradient {shown.norm:.4g}"]
    for what, names in (
        ("weights before the step", shown.weights),
        ("views", [f"{view} of {picture}" for view, picture in shown.views]),
        ("outputs, in the order of computation", shown.outputs),
        ("gradients, in the order of the backward pass", shown.gradients),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{own}  not finite: {what}: {', '.join(names[:3])}{more}")
    if shown.rank:
        return "\n".join(lines)
    lines.insert(0, f"step {shown.step} was skipped: {shown.reason}")
    lines.append(_verdict(shown.others, *shown.anywhere))
    if shown.worlds[0] != shown.worlds[1]:
        count = shown.worlds[0]
        lines.append(f"The run had {count} processes: torchrun with as many repeats its sums.")
    return "\n".join(lines)


def _verdict(others: list[str], is_bad: bool, weights: bool, views: bool, outputs: bool) -> str:
    if not is_bad and others:
        return f"The cause may be what differs here: {', '.join(others)}."
    if not is_bad:
        return "The cause is not in the state, the pictures or the draws."
    if weights:
        return "The weights were bad before the step: use an earlier checkpoint, with a lower rate."
    if views:
        return "A view is not finite: look at these pictures, and report it."
    if outputs:
        return "The network overflows: lower --optim.lr or add --optim.warmup-epochs, in a new run."
    return "All outputs are finite: the loss or its gradient overflows. Please report it."
