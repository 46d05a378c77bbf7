"""Check 21: a number that is not finite, at each place, for each precision and process count."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clsa.methods.method import Output
from clsa.methods.moco import MoCo
from clsa.options.commands import ReplayOptions
from clsa.runs.digests import digest
from clsa.runs.state import State
from clsa.system import dist
from clsa.training import fit, step
from clsa.training import replay as replaying
from tests.fault import tiny
from tests.fault.damage import Tally
from tests.fault.tiny import Setup

PLACES = ("image", "loss", "gradient", "key network", "weight")
ONE_RANK = "loss of one process"
BAD, STEPS = 7, 12
PATIENCE_S = 120.0


class _NaNBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * torch.nan


def inject(place: str, until: int = BAD + 1) -> None:
    """In an attempt: make a bad number at `place` in steps `BAD` to `until` - 1."""
    make_views, forward = step.make_views, MoCo.forward

    def views(crops: Any, specs: Any, step: int, run: Any) -> Any:
        batch = make_views(crops, specs, step, run)
        if place == "image" and BAD <= step < until and dist.rank() == dist.world_size() - 1:
            batch.views[1][0, 0, 0, 0] = torch.inf
        return batch

    def losses(self: MoCo, batch: Any) -> Output:
        output = forward(self, batch)
        contrast = output.losses["contrast"]
        here = BAD <= batch.step < until
        if here and (place == "loss" or (place == ONE_RANK and dist.rank() == 1)):
            contrast = contrast * torch.nan
        if here and place == "gradient":
            contrast = _NaNBackward.apply(contrast)
        return output._replace(losses={"contrast": contrast})

    step.make_views = replaying.make_views = views
    MoCo.forward = losses


def watch(place: str, told: Path) -> None:
    """In an attempt: record whether the bad step and the next one changed anything."""
    step_of = fit.train_step

    def watched(model: Any, state: State, crops: Any, run: Any) -> Any:
        method: Any = state.method
        if state.step == BAD and place == "key network":
            next(method.key_network.parameters()).data[0] = torch.nan
        if state.step == BAD and place == "weight":
            next(method.network.parameters()).data.mul_(3e38)
        before, step = _digest(state), state.step
        stats = step_of(model, state, crops, run)
        if step in (BAD, BAD + 1):
            with open(f"{told}-{dist.rank()}", "a", encoding="utf-8") as file:
                file.write(json.dumps([step, before != _digest(state), stats.lr]) + "\n")
        return stats

    fit.train_step = watched


def _digest(state: State) -> str:
    return digest({"method": state.method.state_dict(), "optimizer": state.optimizer.state_dict()})


def ranks(world: int, body: Callable[[], int], log: Path) -> list[int]:
    """Exit codes of an attempt in `world` processes."""
    return [tiny.wait(pid, PATIENCE_S) for pid in tiny.start_ranks(world, body, log)]


def cases(setup: Setup, root: Path, chosen: list[tuple[str, str, int]]) -> Tally:
    """For each (place, precision, processes): no change, the run continues, replay finds the cause.

    A broken weight stays broken, so all later steps of those runs are skipped too.
    """
    tally = Tally()
    for place, precision, world in chosen:
        tally.tries += 1
        name = f"{place}, {precision}, {world} processes"
        out, told = root / name.replace(" ", "-"), root / f"{name}.told"
        run = tiny.options(setup.pictures, out, precision=precision, max_steps=STEPS,
                           save_minutes=60.0)  # fmt: skip

        def body(run=run, place=place, told=told) -> int:
            inject(place)
            watch(place, told)
            return tiny.pretrain(run)

        codes = ranks(world, body, root / f"{name}.log")
        lasts = place in ("key network", "weight")
        lines = [json.loads(line) for path in sorted(root.glob(f"{name}.told-*"))
                 for line in path.read_text().splitlines()]  # fmt: skip
        expected = sorted([[BAD, False, True], [BAD + 1, not lasts, lasts]] * world)
        seen = sorted([step, moved, lr == 0.0] for step, moved, lr in lines)
        logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        skipped = [line["step"] for line in logged if "skipped" in line]
        bundle = out / "bad" / f"step-{BAD:06d}.ckpt"
        again = root / f"{name}.again"
        shown = ranks(world, _replayer(place, bundle, again), root / f"{name}.replay.log")
        if any(codes) or seen != expected:
            tally.faults.append(f"{name}: ended {codes}, moved {seen}")
        elif skipped != list(range(BAD + 1, STEPS + 1 if lasts else BAD + 2)):
            tally.faults.append(f"{name}: skipped {skipped}")
        elif any(shown) or (wrong := _missed(place, world, again)):
            tally.faults.append(f"{name}: replay ended {shown}, {wrong}")
    return tally


def _missed(place: str, world: int, found: Path) -> str:
    """The processes' replays, if they missed the cause or named a wrong one; else empty."""
    replays = [json.loads(Path(f"{found}-{rank}").read_text()) for rank in range(world)]
    last = replays[-1]
    only_after = not last["outputs"] and bool(last["gradients"])  # the network itself is finite
    right = {
        "image": [picture for _, picture in last["views"]] == [last["first"]],
        "loss": only_after and last["loss"] == "not",
        ONE_RANK: only_after and last["loss"] == "not",
        "gradient": only_after and last["loss"] == "finite",
        "key network": any(name.startswith("key_network.") for name in last["weights"]),
        "weight": not last["weights"] and last["outputs"][:1] == ["network.encoder.0"],
    }[place]
    others = {"weights": {"key network"}, "views": {"image"}}
    extra = [key for key, places in others.items() if last[key] and place not in places]
    same = len({json.dumps(each["anywhere"]) for each in replays}) == 1
    good = right and not extra and same and all(each["anywhere"][0] for each in replays)
    return "" if good else json.dumps(replays)


def _replayer(place: str, bundle: Path, found: Path) -> Callable[[], int]:
    def body() -> int:
        tiny.shrink_encoder()
        inject(place)
        firsts: list[str] = []
        look = replaying._bad_views

        def noted(views: Any, crops: Any, parts: Any) -> Any:
            firsts.append(parts.shown.ids[int(crops.index[0])])
            return look(views, crops, parts)

        replaying._bad_views = noted
        result = replaying.replay(ReplayOptions(bundle=bundle))
        loss = "finite" if all(map(math.isfinite, result.losses.values())) else "not"
        facts = {**result._asdict(), "first": firsts[0], "loss": loss}
        Path(f"{found}-{result.rank}").write_text(json.dumps(facts))
        print(replaying.describe(result))
        return 0

    return body


def in_a_row(setup: Setup, root: Path) -> Tally:
    """Endless bad steps, continued by a new start: 76, and the message names the step to replay."""
    tally = Tally()
    for place, bad in (("gradient", 25), ("loss", 25)):
        tally.tries += 1
        out = root / f"{place}-row"
        said = ""
        for last, code in ((BAD + 10, 0), (None, 76)):
            run = tiny.options(setup.pictures, out, max_steps=last)

            def body(run=run, place=place) -> int:
                inject(place, until=10**6)
                return tiny.pretrain(run)

            ended, said = tiny.attempt(body, root / f"{place}-row.log")
            if ended != code:
                tally.faults.append(f"{place}: ended {ended}, not {code}")
        status = json.loads((out / "status.json").read_text())
        wanted = f"{bad} bad steps in a row were skipped - `clsa replay {out}/bad/step-{BAD:06d}"
        if status["code"] != 76 or status["resumable"] or wanted not in said:
            tally.faults.append(f"{place}: {status}, {said[-300:]}")
    return tally
