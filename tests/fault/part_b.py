"""Checks 8 to 13: exact resume. `python -m tests.fault.part_b long` stores the figures."""

import sys
from pathlib import Path

from tests.fault import ablation, changes, lane, resumes, worlds
from tests.fault.figures import Figure
from tests.fault.lane import Check, figure_of
from tests.fault.tiny import Setup


def stops(precision: str) -> Check:
    """Check 8 in one precision."""

    def check(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
        names, count = list(resumes.STOPS), len(resumes.VARIANTS)
        cases = [(precision, name, variant) for name in names for variant in range(count)]
        if not is_long:  # every stop and every variant once; in bf16 only a third of them
            cases = [(precision, name, place) for place, name in enumerate(names)]
            cases = cases if precision == "fp32" else cases[4:]
        found = resumes.stops(resumes.classed(root / "pictures"), root, cases)
        note = f"stops: {', '.join(names)}; 0 to 2 workers, with and without probe"
        what = f"signal to stop, scrambled generators, {precision}: digest and what each view saw"
        return [figure_of(8, what, found, note)]

    return check


def inexact(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 8 on runs that do not resume exactly, which it must detect."""
    found = resumes.mutants(resumes.classed(root / "pictures"), root)
    what = f"a bad resume ({', '.join(resumes.MUTANTS)}): found out"
    return [figure_of(8, what, found)]


def keys(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 9."""
    pictures = resumes.classed(root / "pictures")
    dropped, changed, added = ablation.keys(pictures, root, None if is_long else 12)
    return [
        figure_of(9, "a key of the checkpoint left out: 66 and its name", dropped),
        figure_of(9, "a key added: 66 and its name", added),
        figure_of(9, "a key's value changed: another digest", changed),
    ]


def seeds(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 10."""
    pictures = resumes.classed(root / "pictures")
    count = 5 if is_long else 2
    found = resumes.seeds(pictures, root, count)
    told = resumes.environments(pictures, setup.at("environments"))
    return [
        figure_of(10, f"the same seed {count} times, then {count} others", found),
        figure_of(10, "other threads, torch, processor: told in a line", told),
    ]


def processes(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 11."""
    pairs = worlds.CHANGES if is_long else worlds.CHANGES[:2]
    found = worlds.changes(setup.pictures, root, 3 if is_long else 1, pairs)
    refused = worlds.indivisible(setup.pictures, setup.at("indivisible"))
    told = ", ".join(f"{before} to {after}" for before, after in worlds.CHANGES)
    note = f"same pictures; losses of 20 steps within {worlds.CLOSE:g}, without batch norm"
    return [
        figure_of(11, f"another number of processes: {told}", found, note),
        figure_of(11, "a batch that they cannot share: 2", refused),
    ]


def pictures(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 12."""
    stops = [4, 12, 15] if is_long else [9]
    refused, accepted = changes.pictures(resumes.classed(root / "pictures"), root, stops)
    note = "accepted: without a kill, and killed during it"
    return [
        figure_of(12, "other pictures: " + ", ".join(changes.CHANGES), refused),
        figure_of(12, "the same with --accept-data-change", accepted, note),
    ]


def drift(setup: Setup, root: Path, is_long: bool) -> list[Figure]:
    """Check 13: the same tries in the short and the long lane, since each is quick."""
    fixed, free, names = changes.drift(resumes.classed(root / "pictures"), root)
    return [
        figure_of(13, "another value of an option that decides the run: 2 and what differs", fixed),
        figure_of(13, "another value of an option that does not: goes on", free),
        figure_of(13, "a typo, an unknown key, a config.yaml of another version", names),
    ]


CHECKS: dict[str, Check] = {
    "stops-fp32": stops("fp32"),
    "stops-bf16": stops("bf16"),
    "inexact": inexact,
    "keys": keys,
    "seeds": seeds,
    "processes": processes,
    "changed-pictures": pictures,
    "drift": drift,
}


if __name__ == "__main__":
    sys.exit(lane.main("B", CHECKS, sys.argv[1:]))
