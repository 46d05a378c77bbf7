"""A bad step taken again, with everything that it computes looked at for what is not finite."""

from typing import NamedTuple

import yaml
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
from clsa.train import Run, gradients, make_views, parallel


class Replay(NamedTuple):
    """What one computation of the step has shown."""

    precision: str
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
    is_bad: bool
    """On any process."""


class Replays(NamedTuple):
    """A step that a run skipped, and what became of it here."""

    step: int
    reason: str
    """Why it was skipped then."""
    processes: int
    """That the run had."""
    found: list[Replay]
    """In the run's precision, then in others."""


def replay(options: ReplayOptions) -> Replays:
    """Compute the gradient of a bad step again, from the state, the pictures and draws it had.

    The batch, its order and every draw follow from the run's seed and the step; the state is that
    before the step, as the step has moved nothing. Run it on as many processes as the run had to
    see the same sums: batch norm and several losses go over a process's rows.

    Raises:
        ClsaError: 66 when the bundle is not whole; 2 when the pictures are others now.
    """
    state, facts = checkpoint.load_one(options.bundle)
    if "options" not in facts:
        why = "a checkpoint, not what a run kept of a bad step"
        raise ClsaError(str(options.bundle), why, "give RUN/bad/step-NNNNNN.ckpt", Exit.NO_INPUT)
    run = RunOptions.parse(yaml.safe_load(facts["options"]), str(options.bundle))
    moved = {"data": run.data.model_copy(update={"data": options.data or run.data.data})}
    run = run.model_copy(update={**moved, "device": options.device or run.device, "compile": False})
    precisions = [options.precision] if options.precision else [run.precision, "fp32"]
    device = dist.pick_device(run.device)
    with dist.process_group(device):
        parts = assemble(run, open_source(run.data.data, "train", run.data), device)
        if state["data_digest"] != parts.state.data_digest:
            why = "the pictures are not those of the run"
            raise ClsaError(run.data.data, why, "give them by --data")
        found = []
        for precision in dict.fromkeys(precisions):
            parts.state.take(state)
            asked = run.model_copy(update={"precision": precision})
            at = Run(asked, device, parts.order.steps_per_epoch, Stop())
            found.append(_once(parts, at))
            if not found[-1].is_bad:
                break
    return Replays(facts["step"], facts["reason"], facts["processes"], found)


def _once(parts: Parts, run: Run) -> Replay:
    """One computation; nothing moves but batch norm's statistics."""
    method, step = parts.state.method, parts.state.step
    weights = [name for name, value in method.state_dict().items() if not _is_finite(value)]
    (crops,) = data.batches(
        parts.shown, method.view_specs, parts.order, step, step + 1, run.device, run.options.data,
        parts.quarantine, method.companions(),
    )  # fmt: skip
    batch = make_views(crops, method.view_specs, step, run)
    views = _bad_views(batch.views, crops, parts)
    outputs, handles = _watch(method)
    output, loss, norm = gradients(parallel(method, run.options), batch, method, run)
    for handle in handles:
        handle.remove()
    graded = bad_gradients(method)
    is_bad = not (loss.isfinite() and norm.isfinite())
    agreed = bool(dist.all_max(loss.new_tensor(float(is_bad))).item())
    method.zero_grad(set_to_none=True)
    losses = {name: float(value.detach()) for name, value in output.losses.items()}
    return Replay(
        run.options.precision, losses, float(norm), weights, views, outputs, graded, agreed
    )


def _bad_views(views: list[Tensor], crops: Crops, parts: Parts) -> list[tuple[str, str]]:
    ids, found = parts.shown.ids.take(crops.index.numpy()), []
    for spec, view in zip(parts.state.method.view_specs, views, strict=True):
        rows = (~view.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
        found += [(spec.name, ids[row]) for row in rows]
    return found


def _watch(method: Method) -> tuple[list[str], list[RemovableHandle]]:
    """Names of modules, as their outputs are found not to be finite."""
    found: list[str] = []

    def hook(name: str):
        def see(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor) and not _is_finite(output) and name not in found:
                found.append(name)

        return see

    named = [(name, module) for name, module in method.named_modules() if name]
    return found, [module.register_forward_hook(hook(name)) for name, module in named]


def _is_finite(value: object) -> bool:
    return not isinstance(value, Tensor) or bool(value.isfinite().all())


def told(replays: Replays) -> str:
    """What a replay shows, in lines for people."""
    lines = [f"step {replays.step} was skipped: {replays.reason}"]
    for each in replays.found:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in each.losses.items())
        state = "not finite again" if each.is_bad else "finite"
        lines.append(
            f"in {each.precision}: {state} ({terms}, norm of the gradient {each.norm:.4g})"
        )
        for what, names in (
            ("weights before the step that are not finite", each.weights),
            ("views that are not", [f"{view} of {name}" for view, name in each.views]),
            ("the first outputs that are not", each.outputs),
            ("gradients that are not, as backward reaches them", each.gradients),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"  {what}: {', '.join(names[:3])}{more}")
    lines.append(_verdict(replays))
    if replays.processes != dist.world_size():
        lines.append(
            f"The run had {replays.processes} processes: start as many by torchrun to see its sums."
        )
    return "\n".join(lines)


def _verdict(replays: Replays) -> str:
    first, last = replays.found[0], replays.found[-1]
    if not first.is_bad:
        return "It is good here: what made it bad then is not in the state, the pictures or draws."
    if not last.is_bad:
        return f"Only {first.precision} overflows: go on with --precision {last.precision}."
    if first.weights:
        return "The weights were broken before: go on from an earlier checkpoint, at a lower rate."
    if first.views:
        return "A view is broken: look at these pictures, and tell us."
    return "The network overflows: lower --optim.lr, or add --optim.warmup-epochs, in a new --out."
