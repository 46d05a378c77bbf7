"""What this machine can do for the checks; what it cannot must be named, or CI fails."""

import functools
import os
import shutil
import subprocess

# Named here (or, comma-separated, in CLSA_CANNOT): the checks that need them are left out, and
# docs/reliability.md says so. Each is one of NEEDS.
CANNOT: tuple[str, ...] = ()

NEEDS = {
    "mount": "a private mount namespace with a tmpfs (root): full disks, read-only folders",
    "chattr": "chattr +i (root, ext4): files that cannot be deleted",
    "nobody": "changing to another user (root): folders without permission",
    "strace": "strace: system calls; audit hooks of Python stand in for it",
}


def cannot() -> list[str]:
    """What is named as missing on this machine."""
    given = os.environ.get("CLSA_CANNOT", "")
    return sorted({*CANNOT, *filter(None, given.split(","))})


@functools.cache
def has(need: str) -> bool:
    """Whether this machine can do `need`, one of NEEDS."""
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
