"""The short lane: every check of every part, with few tries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 540  # the longest takes 2 minutes on an idle core
PARTS = {"a": range(1, 8), "b": range(8, 14), "c": range(14, 21), "d": range(21, 24)}


@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("part", PARTS)
def test_short_lane(part: str, tmp_path: Path) -> None:
    """Run the part in its own process, which has started no thread before it forks."""
    found = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"tests.fault.part_{part}", "short", "--json", str(found)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures, unnamed = json.loads(found.read_text())
    assert {row[0] for row in figures} == set(PARTS[part])
    if unnamed:
        pytest.skip(f"some checks were left out: this machine lacks {', '.join(unnamed)}")
