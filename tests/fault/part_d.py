"""Checks 21 to 23: numbers and health. `python -m tests.fault.part_d long` stores the figures."""

import sys
from pathlib import Path

from tests.fault import bad_numbers, lane, sick
from tests.fault.figures import Figure
from tests.fault.lane import Check, figure_of
from tests.fault.tiny import Setup

SEEDS = [0, 1, 2, 3, 4]


def not_finite(world: int) -> Check:
    """Check 21 with `world` processes."""

    def check(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
        places = [*bad_numbers.PLACES, *([bad_numbers.ONE_RANK] if world > 1 else [])]
        precisions = ("fp32", "bf16")
        every = [(place, precision, world) for place in places for precision in precisions]
        chosen = every if is_long else every[world % 2 :: 5]
        found = bad_numbers.cases(setup, root, chosen)
        what = f"a number that is not finite, {world} process{'es' * (world > 1)}"
        rows = [figure_of(21, what, found, f"{', '.join(places)}; fp32 and bf16; with replay")]
        if world == 1:
            row = bad_numbers.in_a_row(setup, root)
            rows.append(figure_of(21, "bad steps in a row, over a new start", row, "ends with 76"))
        return rows

    return check


def sickening(number: int, kinds: dict[str, sick.Sickness], name: str) -> Check:
    """One fault of check 22 or 23."""

    def check(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
        seeds = SEEDS if is_long else SEEDS[:1]
        found, names = sick.sicken(root, name, kinds[name], seeds, sick.FROM)
        note = f"within {kinds[name].within} steps: {', '.join(sorted(names))}"
        return [figure_of(number, name, found, note)]

    return check


def healthy(half: int) -> Check:
    """Every other one of the healthy runs of checks 22 and 23."""

    def check(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
        runs = sick.HEALTHY[half::2]
        steps = sick.HEALTHY_STEPS if is_long else 160
        found = sick.healthy(root, runs if is_long else runs[:1], steps)
        what = f"nothing: {('first', 'other')[half]} healthy runs of {steps:,} steps, no alarm"
        return [figure_of(22, what, found, ", ".join(dict.fromkeys(name for name, _ in runs)))]

    return check


def stopping(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Last part of check 23: --stop-on-collapse."""
    found = sick.stopping(setup, root, sick.FROM if is_long else 40)
    return [figure_of(23, "last layer zeroed, with and without --stop-on-collapse", found)]


CHECKS: dict[str, Check] = {
    "finite-1": not_finite(1),
    "finite-2": not_finite(2),
    "healthy-0": healthy(0),
    "healthy-1": healthy(1),
    **{f"spike {name}": sickening(22, sick.SPIKES, name) for name in sick.SPIKES},
    **{f"collapse {name}": sickening(23, sick.COLLAPSES, name) for name in sick.COLLAPSES},
    "stopping": stopping,
}


if __name__ == "__main__":
    sys.exit(lane.main("D", CHECKS, sys.argv[1:]))
