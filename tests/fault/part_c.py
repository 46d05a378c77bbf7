"""Checks 14 to 20: signals, processes, resources. `python -m tests.fault.part_c long`."""

import sys
from pathlib import Path

from tests.fault import crew, lane, limits, preempt, ranks, soak, stops
from tests.fault.figures import Figure
from tests.fault.lane import Check, figure_of
from tests.fault.machine import has
from tests.fault.tiny import Setup


def terms(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 14."""
    moments = preempt.terms(setup, setup.at("terms"), 56 if is_long else 3, seed=0)
    imports = preempt.imports(setup, setup.at("imports"), 20 if is_long else 1, seed=0)
    what = "SIGTERM, half of them twice: begin, first batch, step, preparation, probe, save, end"
    what += ", preparation after a refused save"
    return [figure_of(14, what, moments), figure_of(14, "SIGTERM while it imports", imports)]


def queues(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 15."""
    kinds = list(preempt.KINDS) * 6 if is_long else ["an array", "INT twice"]
    tally = preempt.others(setup, setup.at("queues"), kinds, seed=0)
    what = f"SIGUSR1 under SLURM, SIGINT, SIGHUP: {', '.join(dict.fromkeys(kinds))}"
    return [figure_of(15, what, tally)]


def both(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Checks 14 and 15 with two processes."""
    tally = stops.stops(setup, setup.at("stops"), 48 if is_long else 2, seed=0)
    what = "SIGUSR1 under SLURM or SIGTERM to one or both of 2 processes: "
    what += "begin, step, preparation, save" if is_long else "step, preparation"
    launched = stops.launched(setup, setup.at("signalled"), 5 if is_long else 1)
    return [
        figure_of(15, what, tally),
        figure_of(15, "SIGUSR1 to torchrun, with README's options", launched),
    ]


def peers(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 16."""
    kinds = list(ranks.ENDS) * 5 if is_long else ["raises", "SIGSTOP"]
    forked = ranks.losses(setup, setup.at("ranks"), kinds, seed=0)
    what = f"of 2 or 4 processes one {', '.join(dict.fromkeys(kinds))}"
    rows = [figure_of(16, what, forked)]
    if is_long:  # in the short lane only check 17 uses torchrun
        launched = ranks.launched(setup, setup.at("launched"), list(ranks.ENDS))
        rows.append(figure_of(16, "the same under torchrun", launched))
    return rows


def in_place(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 17."""
    tally = ranks.restarts(setup, setup.at("restarts"), 10 if is_long else 1)
    return [figure_of(17, "kill -9 of a process under torchrun --max-restarts", tally)]


def loaders(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 18."""
    kinds = list(crew.ENDS) * 5 if is_long else ["SIGSTOP", "an exception"]
    tally = crew.ends(setup, setup.at("crew"), kinds, seed=0)
    return [figure_of(18, f"a loader process: {', '.join(dict.fromkeys(kinds))}", tally)]


def resources(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 19."""
    rows, place = [], setup.at("limits")
    if has("mount"):
        shm = limits.small_shm(setup, place, 5 if is_long else 1)
        rows.append(figure_of(19, "/dev/shm of 1 MB, too small and large enough", shm))
    files = limits.few_files(setup, place, 5 if is_long else 1)
    memory = limits.little_memory(setup, place, 10 if is_long else 1, seed=0)
    core = limits.one_core(setup, place, 5 if is_long else 1)
    return [
        *rows,
        figure_of(19, "ulimit -n of 20 to 64", files),
        figure_of(19, "ulimit -v of 0.3 to 3 GB", memory),
        figure_of(19, "one core", core),
    ]


def endurance(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 20; the short lane has only a few starts and stops."""
    stops = soak.cycles(setup, setup.at("cycles"), soak.CYCLES if is_long else 4, seed=0)
    rows = [figure_of(20, "starts and stops, every fourth by kill -9", stops)]
    if is_long:
        steps, note = soak.long_run(setup, setup.at("soak"))
        rows.append(figure_of(20, "3,000 steps: memory, files, threads, /dev/shm", steps, note))
    return rows


CHECKS: dict[str, Check] = {
    "terms": terms,
    "queues": queues,
    "stops": both,
    "ranks": peers,
    "restarts": in_place,
    "crew": loaders,
    "limits": resources,
    "soak": endurance,
}


if __name__ == "__main__":
    sys.exit(lane.main("C", CHECKS, sys.argv[1:]))
