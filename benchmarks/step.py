"""Whole steps at 32 px on the CPU against lightly and a plain CLSA, and the encoder's share.

    python -m benchmarks.step                          # everything, about 8 minutes on 2 cores
    python -m benchmarks.step --profile clsa-small     # where one step spends its time

Each side runs in its own processes, the sides in turn, on the embedded drawings. Ours holds them in
memory, as `clsa pretrain` does; the peers read WebP files from a folder through a DataLoader,
without workers and with two, and the better of the two counts. The rate is the number of pictures
divided by the mean time of a step, with waiting for data and, on our side, the log; the median of
several rounds counts. Our steps alternate with the encoder alone, that is forward and backward of
the networks on the same shapes and nothing else; its share is calculated over all rounds together.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks import report
from benchmarks.drive import Drive
from benchmarks.report import Row, seconds, share, versus
from clsa.pictures.named_sets import CLIPART
from clsa.recipes import resolve

LIGHTLY, ENCODER = 4.0, 0.9  # budgets: rate compared with lightly's, the encoder's share of a step
WORKERS = (0, 2)


class Steps(Protocol):
    """Anything that trains step by step."""

    def step(self) -> None: ...


class Side(NamedTuple):
    """The recipe that a process runs, and whose code runs it."""

    recipe: str
    code: str  # ours, lightly, lightly-fast or plain

    @property
    def name(self) -> str:
        return f"{self.recipe}:{self.code}"


OURS = [Side(name, "ours") for name in ("moco-v2-small", "clsa-small", "clsa-multi-small")]
PEERS = [
    Side("moco-v2-small", "lightly"),
    Side("moco-v2-small", "lightly-fast"),
    Side("clsa-small", "plain"),
]
TOLD = {
    "lightly": "lightly 1.6, float32 as its example",
    "lightly-fast": "lightly 1.6 with bf16 and channels_last",
    "plain": "the official algorithm written plainly",
}


def batch_options(args: argparse.Namespace) -> dict[str, Any]:
    """The batch size, and for a small batch fewer groups of batch norm."""
    few = {"model": {"norm_groups": 2}} if args.batch < 16 else {}
    return {"batch_size": args.batch, **few}


def peer(side: Side, args: argparse.Namespace) -> Steps:
    """A peer, ready to step."""
    options = resolve({"recipe": side.recipe, **batch_options(args)})
    if side.code == "plain":
        from benchmarks.plain_clsa import PlainCLSA

        return PlainCLSA(options, args.files, args.workers)
    from benchmarks.lightly_moco import LightlyMoCo

    return LightlyMoCo(options, args.files, args.workers, fast=side.code == "lightly-fast")


def child(side: Side, args: argparse.Namespace) -> dict[str, float]:
    """In its own process, measure mean seconds of a step and, for ours, of the encoder alone."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)  # the peers draw from global generators
    if side.code != "ours":
        steps = peer(side, args)
        for _ in range(args.warmup):
            steps.step()
        return {"step": sum(seconds(steps.step) for _ in range(args.steps)) / args.steps}
    with Drive(side.recipe, **batch_options(args)) as drive:
        alone = drive.encoder_alone()
        total = {"step": 0.0, "encoder": 0.0}
        for number in range(args.warmup + args.steps):
            for name, call in (("step", drive.step), ("encoder", alone)):
                taken = seconds(call)
                if number >= args.warmup:
                    total[name] += taken / args.steps
        return total


def measure(side: Side, workers: int, args: argparse.Namespace) -> dict[str, float]:
    """The result of `child` in a new process; our steps are faster, so it runs more of them."""
    ours = side.code == "ours"
    num_steps = args.steps * (1 if args.quick or not ours or "multi" in side.recipe else 2)
    command = [sys.executable, "-m", "benchmarks.step", "--side", side.name]
    for name in ("batch", "threads", "warmup", "files"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--workers", str(workers), "--steps", str(num_steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> list[Row]:
    """Measure all sides in turn, for several rounds."""
    runs = [(side, 0) for side in OURS]
    runs += [(side, workers) for side in PEERS for workers in WORKERS]
    found: dict[tuple[Side, int], list[dict[str, float]]] = {run: [] for run in runs}
    for _ in range(args.rounds):
        for run in runs:
            found[run].append(measure(*run, args))
            told = ", ".join(
                f"{name} {1e3 * value:.0f} ms" for name, value in found[run][-1].items()
            )
            print(f"{run[0].name}, {run[1]} workers: {told}", file=sys.stderr)
    return judge(found, args.batch)


def judge(found: dict[tuple[Side, int], list[dict[str, float]]], batch: int) -> list[Row]:
    """The rows, from the results of `child` in every round, by side and number of workers."""
    times = {run: [told["step"] for told in rounds] for run, rounds in found.items()}
    rows = []
    for side in PEERS:
        mine = times[Side(side.recipe, "ours"), 0]
        theirs = min((times[side, workers] for workers in WORKERS), key=median)
        rows.append(
            versus(
                f"`{side.recipe}`, whole steps, batch {batch}",
                *(batch / median(mine), batch / median(theirs), "images/s", TOLD[side.code]),
                at_least=LIGHTLY if side.code == "lightly" else None,
                rounds=[peer / ours for ours, peer in zip(mine, theirs, strict=True)],
            )
        )
    for side in OURS:
        claim, rounds = f"`{side.recipe}`, batch {batch}", found[side, 0]
        step, encoder = (sum(told[name] for told in rounds) for name in ("step", "encoder"))
        rows.append(Row(f"{claim}: whole step", 1e3 * median(times[side, 0]), unit="ms"))
        rows.append(share(f"{claim}: encoder alone, of the step", encoder, step, ENCODER))
    return rows


def profile(recipe: str, args: argparse.Namespace) -> None:
    """Print the ten operations that take most of the time of one step."""
    torch.set_num_threads(args.threads)
    with Drive(recipe, **batch_options(args)) as drive:
        for _ in range(args.warmup):
            drive.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            drive.step()
    table = seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=10)
    print(f"one step of {recipe}, batch {args.batch}, {args.threads} threads")
    print(table)


def main() -> None:
    """Compare all sides, run one side, or profile one step."""
    parser = report.parser(__doc__, threads=2)
    parser.add_argument("--batch", type=int, default=256, help="pictures per step (256)")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of a peer; ours makes twice as many (5)"
    )
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measurement (3)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="rounds, each with a new process per side (2)"
    )
    parser.add_argument("--profile", metavar="RECIPE", help="print the profile of one step")
    for name, kind in (("side", str), ("workers", int), ("files", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.batch, args.steps, args.warmup, args.rounds = 8, 1, 1, 1
    if args.profile:
        profile(args.profile, args)
        return
    if args.side:
        print(json.dumps(child(Side(*args.side.split(":")), args)))
        return
    report.require("lightly")
    with tempfile.TemporaryDirectory() as folder:
        args.files = Path(folder)
        with tarfile.open(CLIPART) as archive:
            names = [m for m in archive if m.name.split("/")[0] in ("train", "unlabelled")]
            archive.extractall(folder, members=names, filter="data")
        rows = compare(args)
    notes = [
        "Encoder resnet10-w32 at 32 px, queue 4,096. Peers: the same backbone without groups in "
        "its batch norm, float32 unless stated otherwise, the better of 0 and 2 loader workers. "
        "Ours keeps freed memory, as `clsa pretrain` does; the peers run as their users run them."
    ]
    title = "Whole steps on the CPU"
    report.publish("step", title, rows, args, __doc__, args.threads, ("lightly",), notes)


if __name__ == "__main__":
    report.run(main)
