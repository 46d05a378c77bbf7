"""Check 3: what a power cut would leave, derived from the order of a run's system calls."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.fault import tiny
from tests.fault.machine import has
from tests.fault.tiny import Setup

CALLS = "openat,write,fsync,rename,renameat,renameat2,unlink,unlinkat"
STREAMS = ("metrics.jsonl", "tensorboard", ".in-use")  # appended to, or only used during a run
ENTRY = "import sys; from tests.fault import order; sys.exit(order.traced(*sys.argv[1:]))"


class Event(NamedTuple):
    """One successful system call below the run folder."""

    call: str
    """make (exclusive open), open (any other open to write), write, fsync, rename or unlink."""
    path: str
    to: str = ""


def order_faults(events: list[Event], out: Path) -> tuple[list[str], list[str]]:
    """The files published in a run folder, and what was wrong with the order of calls."""
    wrong, published = [], []
    for place, event in enumerate(events):
        name = event.path.removeprefix(f"{out}/")
        if event.call == "open" and not name.startswith(STREAMS):
            wrong.append(f"{name}: written directly under its final name")
        if event.call == "unlink" and name.startswith("checkpoints/") and ".tmp-" not in name:
            synced = _last(events[:place], "fsync", f"{out}/checkpoints")
            if synced < _last(events[:place], "rename", f"{out}/checkpoints", folder=True):
                wrong.append(f"{name}: pruned before its successor was flushed to the disk")
        if event.call != "rename":
            continue
        before = [each.call for each in events[:place] if each.path == event.path]
        if before[:1] != ["make"] or before[-1:] != ["fsync"] or "write" not in before:
            wrong.append(f"{name}: {before[:1] + before[-2:]} before it was renamed")
        folder, to = str(Path(event.to).parent), event.to.removeprefix(f"{out}/")
        after = [each.call for each in events[place + 1 :] if each.path == folder]
        if after[:1] != ["fsync"]:
            wrong.append(f"{to}: its folder is not flushed")
        is_manifest = to.startswith("checkpoints/") and to.endswith(".json")
        if is_manifest and f"{to[:-5]}.ckpt" not in published:
            wrong.append(f"{to}: the manifest was published before its data")
        published.append(to)
    return published, wrong


def _last(events: list[Event], call: str, path: str, folder: bool = False) -> int:
    places = [
        place
        for place, event in enumerate(events)
        if event.call == call and (str(Path(event.to).parent) if folder else event.path) == path
    ]
    return max(places, default=-1)


def traced(pictures: str, out: str) -> int:
    """A short run that saves at each epoch and prunes three of the checkpoints."""
    over = {"max_steps": 30, "save_minutes": 15, "keep_every": 0}
    return tiny.pretrain(tiny.options(Path(pictures), Path(out), **over))


def by_strace(setup: Setup, root: Path) -> tuple[list[Event], Path]:
    """Events of a run under strace, in its own process."""
    out, trace = root / "strace-run", root / "trace"
    command = ["strace", "-f", "-y", "-qq", "-e", f"trace={CALLS}", "-o", str(trace)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, sys.executable, "-c", ENTRY, str(setup.pictures), str(out)],
        check=True, env=env, timeout=240, capture_output=True,
    )  # fmt: skip
    lines = _joined(trace.read_text(errors="replace").splitlines())
    return [event for line in lines if (event := _parsed(line, str(out)))], out


def _joined(lines: list[str]) -> Iterator[str]:
    """Join calls that strace split in two because another thread's call came between."""
    begun: dict[str, str] = {}
    for line in lines:
        pid = line.partition(" ")[0]
        if line.endswith(" <unfinished ...>"):
            begun[pid] = line.removesuffix(" <unfinished ...>")
        elif match := re.match(r"\d+ +<\.\.\. \w+ resumed>", line):
            yield begun.pop(pid, "") + line[match.end() :]
        else:
            yield line


def _parsed(line: str, out: str) -> Event | None:
    match = re.match(r"\d+ +(\w+)\((.*)\) += (-?\d+)", line)
    if not match or int(match[3]) < 0 or out not in line:
        return None
    call, rest = match[1], match[2]
    paths = [each for pair in re.findall(r'"([^"]*)"|\d+<([^>]*)>', rest) for each in pair if each]
    paths = [path for path in paths if path == out or path.startswith(f"{out}/")]
    if not paths:
        return None
    if call == "openat":
        if "O_EXCL" in rest:
            return Event("make", paths[0])
        return Event("open", paths[0]) if "O_WRONLY" in rest or "O_RDWR" in rest else None
    if call.startswith("rename"):
        return Event("rename", paths[0], paths[-1])
    return Event(call.removesuffix("at"), paths[0])


def by_hooks(setup: Setup, root: Path) -> tuple[list[Event], Path]:
    """The same events recorded inside Python, without strace: audit events and os.fsync."""
    out, noted = root / "hooked-run", root / "events"

    def body() -> int:
        events: list[Event] = []
        fsync = os.fsync

        def hook(name: str, args: tuple[Any, ...]) -> None:
            paths = [os.fspath(each) for each in args[:2] if isinstance(each, (str, os.PathLike))]
            if not paths or not str(paths[0]).startswith(str(out)):
                return
            if name == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
                events.append(Event("make" if args[2] & os.O_EXCL else "open", str(paths[0])))
            elif name == "os.rename":
                events.append(Event("rename", str(paths[0]), str(paths[1])))
            elif name == "os.remove" and os.path.lexists(paths[0]):
                events.append(Event("unlink", str(paths[0])))

        def noted_fsync(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")
            if os.fstat(handle).st_size and not os.path.isdir(path):
                events.append(Event("write", path))
            fsync(handle)
            events.append(Event("fsync", path))

        os.fsync = noted_fsync
        sys.addaudithook(hook)
        code = traced(str(setup.pictures), str(out))
        noted.write_text("".join("\t".join(event) + "\n" for event in list(events)))
        return code

    code, said = tiny.attempt(body, root / "log")
    if code:
        raise RuntimeError(said)
    lines = noted.read_text().splitlines()
    return [Event(*line.split("\t")) for line in lines], out


WRITERS = {
    "checkpoint": "checkpoints/step-000030.ckpt",
    "manifest": "checkpoints/step-000030.json",
    "encoder": "encoder.safetensors",
    "results": "results.json",
    "status": "status.json",
    "configuration": "config.yaml",
}


def check(setup: Setup, root: Path) -> tuple[str, int, list[str]]:
    """How the calls were recorded, the number of writers, and what was wrong."""
    with_strace = has("strace")
    events, out = (by_strace if with_strace else by_hooks)(setup, root)
    published, wrong = order_faults(events, out)
    wrong += [f"{name} was not written" for name, path in WRITERS.items() if path not in published]
    if not any(event.call == "unlink" and event.path.endswith(".ckpt") for event in events):
        wrong.append("nothing was pruned")
    return "strace" if with_strace else "audit hooks", len(WRITERS), wrong
