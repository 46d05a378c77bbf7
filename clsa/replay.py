"""A bad step taken again, with everything that it computes looked at for what is not finite."""

from typing import NamedTuple

import yaml
from torch import Tensor, nn

from clsa import checkpoint, data, dist
from clsa.bad_steps import bad_gradients
from clsa.command_options import ReplayOptions
from clsa.cutting import Crops
from clsa.errors import ClsaError, Exit
from clsa.intake import open_source
from clsa.methods.method import Method
from clsa.options import RunOptions
from clsa.signals import Stop
from clsa.start import Parts, assemble
from clsa.train import Run, agree, gradients, make_views, parallel


class Replay(NamedTuple):
    """A step that a run skipped, and what its computation shows here."""

    step: int
    reason: str
    """Why it was skipped then."""
    processes: int
    """That the run had."""
    is_bad: bool
    """Whether it is again, on any process."""
    losses: dict[str, float]
    norm: float
    """Of the gradient."""
    weights: list[str]
    """Weights and buffers that were not finite before the step."""
    views: list[tuple[str, str]]
    """View and picture of each that is not."""
    outputs: list[str]
    """Modules whose output is not, in the order of computing."""
    gradients: list[str]
    """Parameters whose gradient is not, as backward reaches them."""


def replay(options: ReplayOptions) -> Replay:
    """Compute the gradient of a bad step again, from the state, the pictures and draws it had.

    The batch, its order and every draw follow from the run's seed and the step; the state is that
    before the step, as the step has moved nothing. Run it on as many processes as the run had to
    see the same sums: batch norm and several losses go over a process's rows.

    Raises:
        ClsaError: 66 when the bundle is not whole; 2 when the pictures are others now.
    """
    saved, facts = checkpoint.load_one(options.bundle)
    if "options" not in facts:
        why = "a checkpoint, not what a run kept of a bad step"
        raise ClsaError(str(options.bundle), why, "give RUN/bad/step-NNNNNN.ckpt", Exit.NO_INPUT)
    asked = RunOptions.parse(yaml.safe_load(facts["options"]), str(options.bundle))
    changes = {
        "data": asked.data.model_copy(update={"data": options.data or asked.data.data}),
        "precision": options.precision or asked.precision,
        "device": options.device or asked.device,
        "compile": False,  # the graphs would hide the modules
    }
    asked = asked.model_copy(update=changes)
    device = dist.pick_device(asked.device)
    with dist.process_group(device):
        parts = assemble(asked, open_source(asked.data.data, "train", asked.data), device)
        if saved["data_digest"] != parts.state.data_digest:
            why = "the pictures are not those of the run"
            raise ClsaError(asked.data.data, why, "give them by --data")
        parts.state.take(saved)
        run = Run(asked, device, parts.order.steps_per_epoch, Stop())
        shown = _computed(parts, run)
    return Replay(facts["step"], facts["reason"], facts["processes"], *shown)


def _computed(parts: Parts, run: Run) -> tuple[bool, dict[str, float], float, *tuple[list, ...]]:
    """The step's computation, as `Replay` tells it; moves nothing but batch norm's statistics."""
    method, step = parts.state.method, parts.state.step
    weights = [name for name, value in method.state_dict().items() if not _is_finite(value)]
    (crops,) = data.batches(
        parts.shown, method.view_specs, parts.order, step, step + 1, run.device, run.options.data,
        parts.quarantine, method.companions(),
    )  # fmt: skip
    batch = make_views(crops, method.view_specs, step, run)
    views, outputs = _bad_views(batch.views, crops, parts), _watch(method)
    output, loss, norm = gradients(parallel(method, run.options), batch, method, run)
    is_bad = agree(loss, norm, run.stop).is_bad
    losses = {name: float(value.detach()) for name, value in output.losses.items()}
    return is_bad, losses, float(norm), weights, views, outputs, bad_gradients(method)


def _bad_views(views: list[Tensor], crops: Crops, parts: Parts) -> list[tuple[str, str]]:
    ids, found = parts.shown.ids.take(crops.index.numpy()), []
    for spec, view in zip(parts.state.method.view_specs, views, strict=True):
        rows = (~view.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
        found += [(spec.name, ids[row]) for row in rows]
    return found


def _watch(method: Method) -> list[str]:
    """Names of modules, filled as their outputs are found not to be finite."""
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


def told(shown: Replay) -> str:
    """What a replay shows, in lines for people."""
    terms = ", ".join(f"{name} {value:.4g}" for name, value in shown.losses.items())
    state = "not finite again" if shown.is_bad else "finite"
    lines = [
        f"step {shown.step} was skipped: {shown.reason}",
        f"here it is {state}: {terms}, norm of the gradient {shown.norm:.4g}",
    ]
    for what, names in (
        ("weights before the step", shown.weights),
        ("views", [f"{view} of {picture}" for view, picture in shown.views]),
        ("outputs, in the order of computing", shown.outputs),
        ("gradients, as backward reaches them", shown.gradients),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  not finite: {what}: {', '.join(names[:3])}{more}")
    lines.append(_verdict(shown))
    if shown.processes != dist.world_size():
        lines.append(f"The run had {shown.processes} processes: torchrun shows their very sums.")
    return "\n".join(lines)


def _verdict(shown: Replay) -> str:
    if not shown.is_bad:
        return "What made it bad then is not in the state, the pictures or the draws."
    if shown.weights:
        return "The weights were broken before: go on from an earlier checkpoint, at a lower rate."
    if shown.views:
        return "A view is broken: look at these pictures, and tell us."
    return "The network overflows: lower --optim.lr, or add --optim.warmup-epochs, in a new --out."
