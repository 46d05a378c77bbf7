"""What the checks need from this machine; if something is missing and not listed, CI fails."""

import functools
import os
import shutil
import subprocess

# Keys of NEEDS that this machine lacks; CLSA_CANNOT may list more, separated by commas. Checks that
# need them are left out, and docs/reliability.md says so.
CANNOT: tuple[str, ...] = ()

NEEDS = {
    "mount": "a private mount namespace with a tmpfs (root): full disks, read-only folders",
    "chattr": "chattr +i (root, ext4): files that cannot be deleted",
    "nobody": "changing to another user (root): folders without permission",
    "strace": "strace: recording of system calls; without it, audit hooks of Python record them",
}


def cannot() -> list[str]:
    """The needs that are listed as missing on this machine."""
    given = os.environ.get("CLSA_CANNOT", "")
    return sorted({*CANNOT, *filter(None, given.split(","))})


@functools.cache
def has(need: str) -> bool:
    """Whether this machine provides `need`, a key of NEEDS."""
    if need in cannot():
        return False
    if need == "strace":
        return bool(shutil.which("strace")) and _runs("strace -qq -o /dev/null true")
    if need == "nobody":
        return os.geteuid() == 0
    if need == "mount":
        return os.geteuid() == 0 and _runs("unshare -m mount -t tmpfs -o size=1m tmpfs /mnt")
    return os.geteuid() == 0 and _runs(
        "f=$(mktemp) && { chattr +i $f && chattr -i $f; code=$?; rm -f $f; exit $code; }"
    )


def _runs(command: str) -> bool:
    return subprocess.run(["sh", "-c", command], capture_output=True).returncode == 0
