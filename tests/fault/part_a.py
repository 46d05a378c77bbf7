"""Checks 1 to 7: checkpoints. `python -m tests.fault.part_a long` stores the figures."""

import shutil
import sys
import time
from pathlib import Path

from tests.fault import damage, disk, lane, order, pruning, races, storm
from tests.fault.figures import Figure
from tests.fault.lane import Check, figure_of
from tests.fault.machine import has
from tests.fault.tiny import Setup

STORM_S = 600.0  # a long storm ends after this time, even with fewer kills


def _lacking(*needs: str) -> str:
    """A note on which of `needs` this machine lacks."""
    return ", ".join(f"without {need}" for need in needs if not has(need))


def kill_storm(workers: int) -> Check:
    """Check 1 with `workers` loader processes."""

    def check(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
        kills = 200 if is_long else (4 if workers else 10)
        until = time.monotonic() + STORM_S
        found = storm.storm(setup, root, kills, seed=workers, workers=workers, until=until)
        faults = list(found.faults)
        if (
            found.is_void() if is_long else found.is_void(storm.INSIDE / 2)
        ):  # with few kills the share varies more
            faults.append(f"void: only {found.inside} of {found.kills} kills hit a save")
        note = f"{found.inside} inside a save, {found.finished} runs ended"
        survived = max(found.kills - len(faults), 0)
        what = f"SIGKILL of the group, half of them aimed at a save, {workers} workers"
        return [Figure(1, what, found.kills, survived, note, tuple(faults))]

    return check


def mutants(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 2: each bad saver must fail check 1."""
    rows = []
    for name, mutate in storm.MUTANTS.items():
        caught, kills, seeds = 0, [], 3 if is_long else 1
        for seed in range(seeds):
            place = setup.at(f"{name}-{seed}".replace(" ", "-"))
            found = storm.storm(setup, place, 40, seed, mutate=mutate, first_fault=True)
            caught += bool(found.faults)
            kills.append(found.kills)
            shutil.rmtree(place, ignore_errors=True)
        faults = ("not caught",) * (seeds - caught)
        note = f"caught after {max(kills)} kills at most"
        rows.append(Figure(2, f"a bad saver: {name}", seeds, caught, note, faults))
    return rows


def system_calls(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 3."""
    how, writers, faults = order.check(setup, root)
    survived = max(writers - len(faults), 0)
    what = "power cut, by the order of system calls: checkpoint, manifest, encoder, results, status"
    return [Figure(3, f"{what}, configuration", writers, survived, f"by {how}", tuple(faults))]


def damages(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 4."""
    out = damage.three_checkpoints(setup, root)
    flips, cuts = (300, 200) if is_long else (20, 10)
    bits = damage.bits(out, flips, cuts, seed=0)
    cases = list(damage.CASES) if is_long else ["a bit of the newest", "all of them"]
    note = f"{flips} flipped bits, {cuts} lengths, the rest in the manifest"
    return [
        figure_of(4, "one flipped bit, a cut tail", bits, note),
        figure_of(
            4, "damage, then a new start", damage.runs(setup, root, out, cases), "; ".join(cases)
        ),
    ]


def disks(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 5."""
    rows, needs = [], _lacking("mount", "chattr", "nobody")
    if has("mount"):
        long = [0.3, 0.9, 1.1, 1.5, 2.1, 2.5, 2.9, 5, 6, 8]
        full = disk.full_disks(setup, setup.at("full"), long if is_long else [0.9, 2.5])
        rows.append(figure_of(5, "a disk of 0.3 to 8 checkpoints", full))
    cases = [(0, 0), (1, 1), (2, 2), (2, 9)] if is_long else [(0, 0), (2, 1)]
    kinds, _ = disk.kinds(setup, setup.at("kinds"), cases)
    rows.append(
        figure_of(5, f"{', '.join(disk.FAULTS)}: at the start, once, for good", kinds, needs)
    )
    writers = disk.writers(setup, setup.at("writers"), 10 if is_long else 1)
    rows.append(figure_of(5, "the disk fills up within a file, each writer", writers))
    return rows


def prunings(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 6."""
    kills = pruning.kills(setup, setup.at("pruned"), 50 if is_long else 4, seed=0)
    damaged = pruning.damaged(setup, setup.at("pruned-damaged"))
    rows = [
        figure_of(6, "SIGKILL between publishing and pruning", kills),
        figure_of(6, "the newest two damaged, saves between, new starts", damaged),
    ]
    if has("chattr"):
        refused = pruning.refused(setup, setup.at("pruned-refused"))
        rows.append(figure_of(6, "a checkpoint that cannot be deleted", refused))
    return rows


def owners(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 7."""
    rows = []
    for locks in (True, False):
        where, count = "" if locks else ", no flock", 20 if is_long else 2
        race = races.race(setup, setup.at(f"race-{locks}"), count, locks)
        stale = races.stale(setup, setup.at(f"stale-{locks}"), count // 2, locks)
        rows.append(figure_of(7, f"two starts at once{where}", race))
        rows.append(figure_of(7, f"a lock left by kill -9{where}", stale))
    return rows


CHECKS: dict[str, Check] = {
    "kills": kill_storm(0),
    "kills-workers": kill_storm(2),
    "mutants": mutants,
    "order": system_calls,
    "damage": damages,
    "disks": disks,
    "pruning": prunings,
    "owners": owners,
}


if __name__ == "__main__":
    sys.exit(lane.main("A", CHECKS, sys.argv[1:]))
