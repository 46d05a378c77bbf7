"""Checks 14 to 20: signals, processes, resources. `python -m tests.fault.part_c long`."""

import sys
from pathlib import Path

from tests.fault import lane, preempt
from tests.fault.figures import Figure
from tests.fault.lane import Check, figure_of
from tests.fault.tiny import Setup


def terms(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 14."""
    moments = preempt.terms(setup, setup.at("terms"), 49 if is_long else 7, seed=0)
    imports = preempt.imports(setup, setup.at("imports"), 20 if is_long else 3, seed=0)
    what = "SIGTERM, half of them twice: begin, first batch, step, preparation, probe, save, end"
    return [figure_of(14, what, moments), figure_of(14, "SIGTERM while it imports", imports)]


def queues(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 15."""
    count = len(preempt.KINDS) * (10 if is_long else 1)
    tally = preempt.others(setup, setup.at("queues"), count, seed=0)
    what = f"SIGUSR1 under SLURM, SIGINT, SIGHUP: {', '.join(preempt.KINDS)}"
    return [figure_of(15, what, tally)]


CHECKS: dict[str, Check] = {
    "terms": terms,
    "queues": queues,
}


if __name__ == "__main__":
    sys.exit(lane.main("C", CHECKS, sys.argv[1:]))
