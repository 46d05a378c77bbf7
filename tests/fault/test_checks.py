"""Tests of the checks: a wrong order of system calls is detected, figures reach the page."""

import json
from pathlib import Path

import pytest

from tests.fault import figures, seen, tiny
from tests.fault.figures import BEGIN, END, Figure
from tests.fault.order import Event, order_faults

OUT = Path("/run")
FOLDER = "/run/checkpoints"


def saved(name: str) -> list[Event]:
    """One file as it should be written."""
    temporary, path = f"{FOLDER}/.{name}.tmp-7", f"{FOLDER}/{name}"
    calls = [Event(call, temporary) for call in ("make", "write", "write", "fsync")]
    return [*calls, Event("rename", temporary, path), Event("fsync", FOLDER)]


DATA, MANIFEST = saved("step-000012.ckpt"), saved("step-000012.json")
PRUNED = [Event("unlink", f"{FOLDER}/step-000006{end}") for end in (".json", ".ckpt")]
GOOD = [*DATA, *MANIFEST, *PRUNED, Event("open", "/run/metrics.jsonl")]


def test_the_right_order_is_accepted() -> None:
    published, wrong = order_faults(GOOD, OUT)
    assert published == ["checkpoints/step-000012.ckpt", "checkpoints/step-000012.json"]
    assert wrong == []


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([*(e for e in DATA if e.call != "fsync"), *MANIFEST], "before it was renamed"),
        ([*DATA[:3], DATA[4], DATA[3], DATA[5], *MANIFEST], "before it was renamed"),
        ([Event("open", DATA[0].path), *DATA[1:], *MANIFEST], "under its final name"),
        ([*DATA[:2], DATA[3], DATA[2], *DATA[4:], *MANIFEST], "before it was renamed"),
        ([*MANIFEST, *DATA], "the manifest was published before its data"),
        ([*DATA, *MANIFEST[:-1], *PRUNED], "pruned before its successor was flushed to the disk"),
        ([*DATA, *MANIFEST[:-1]], "its folder is not flushed"),
        ([*GOOD, Event("open", f"{FOLDER}/step-000018.ckpt")], "under its final name"),
    ],
)
def test_a_wrong_order_is_detected(events: list[Event], told: str) -> None:
    assert any(told in each for each in order_faults(events, OUT)[1])


def test_figures_are_stored_and_shown_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = tmp_path / "reliability.md"
    docs.write_text(f"# Before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(figures, "DOCS", docs)
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    rows = [Figure(1, "kills", 200, 200, "80 inside"), Figure(4, "bits", 10, 9, "", ("bit 3",))]
    for part in ("B", "A"):
        figures.keep(part, rows, 90.0)
    text = docs.read_text()
    assert text.startswith(f"# Before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert lines[0] == "| A1 | kills | 200 | 200 | 1.5 % | 80 inside |"
    assert lines[1] == "| A4 | bits | 10 | 9 |  |  |"
    assert [line[:5] for line in lines] == ["| A1 ", "| A4 ", "| B1 ", "| B4 "]
    assert "old" not in text and "bit 3" not in text
    again = [Figure(4, "bits", 10, 10), Figure(2, "savers", 3, 3)]
    figures.keep("A", again, 30.0, is_whole=False)
    lines = [line for line in docs.read_text().splitlines() if line.startswith("| A")]
    assert lines[0] == "| A1 | kills | 200 | 200 | 1.5 % | 80 inside |"
    assert lines[1:] == ["| A2 | savers | 3 | 3 |  |  |", "| A4 | bits | 10 | 10 | 30.0 % |  |"]
    assert "2.0 minutes" in docs.read_text()
    assert str(rows[1]) == "check 4 bits: 9 of 10; 1 faults: bit 3"


def test_logs_of_seen_pictures_are_merged_and_compared(tmp_path: Path) -> None:
    log = tmp_path / "seen"
    lines = [
        [["cut", 0, 1, 7], [[0, 0, 9, 9], True]],
        [["step", 0], [1, [5, 7], [5, 7], 3.0]],
        [["step", 0], [0, [2, 3], [2, 3], 1.0]],
        [["cut", 0, 1, 7], [[0, 0, 9, 9], True]],
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = seen.read(log)
    assert found.order() == {0: [2, 3, 5, 7]} and found.losses() == {0: 2.0}
    assert found.drawn == {("cut", 0, 1, 7): [[0, 0, 9, 9], True]} and not found.faults
    with open(log, "a") as file:
        file.write(json.dumps([["cut", 0, 1, 7], [[0, 0, 9, 8], True]]) + "\n")
    assert len(seen.read(log).faults) == 1


def test_other_gives_a_different_value_of_every_kind() -> None:
    for value in (True, False, 3, 0.5, "moco", None, (1, 2), (), Path("a")):
        assert tiny.other(value) != value
