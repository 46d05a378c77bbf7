import json
from pathlib import Path

import pytest

from clsa.recipes import resolve
from clsa.runs import computing
from clsa.runs.computing import Computing
from clsa.runs.folder import FREE, RunFolder
from clsa.system.errors import ClsaError, Exit


def options(**over: object):
    return resolve({"recipe": "clsa-small", **over})


def claimed(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.check(options())
    folder.claim(options(), Computing(threads=1, precision="fp32"))
    return folder


def test_a_new_an_empty_and_the_runs_own_folder_are_accepted(tmp_path: Path) -> None:
    folder = claimed(tmp_path / "a" / "b")
    folder.check(options())
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").check(options())


def test_leftovers_of_a_start_killed_at_once_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".in-use").write_text("1 host 12:00")
    (tmp_path / ".config.yaml.tmp-999999999").write_text("reci")
    RunFolder(tmp_path).check(options())
    claimed(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".in-use", "config.yaml", computing.NAME}


def test_foreign_folders_are_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ClsaError, match="neither empty nor a run's folder"):
        RunFolder(tmp_path).check(options())
    (tmp_path / "config.yaml").write_text("my_project: precious\n")
    with pytest.raises(ClsaError, match=r"config\.yaml does not describe a run"):
        RunFolder(tmp_path).check(options())
    assert (tmp_path / "config.yaml").read_text() == "my_project: precious\n"


@pytest.mark.parametrize(
    "left", ["checkpoints/step-000001.json", "encoder.safetensors", "results.json"]
)
def test_another_run_is_refused_once_it_has_something_to_lose(tmp_path: Path, left: str) -> None:
    folder = claimed(tmp_path / "run")
    folder.check(options(epochs=7))  # nothing is saved yet: a first mistake can be corrected
    (folder.path / left).parent.mkdir(exist_ok=True)
    (folder.path / left).write_text("{}")
    with pytest.raises(ClsaError, match=r"holds another run \(epochs: 20 -> 7\)") as caught:
        folder.check(options(epochs=7))
    assert caught.value.code == Exit.USAGE


def test_a_run_of_another_method_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = claimed(tmp_path / "run")
    folder.encoder.write_text("")
    for other in ("byol-small", "supervised-small"):  # more options, and fewer
        now = resolve({"recipe": other})
        with pytest.raises(ClsaError, match=rf"another run \(method.name: moco -> {other[:-6]}, "):
            folder.check(now)


def test_options_that_compute_nothing_may_differ(tmp_path: Path) -> None:
    folder = claimed(tmp_path / "run")
    folder.encoder.write_text("")
    assert {"max_steps", "data.workers", "device", "out"} <= FREE
    folder.check(options(max_steps=3, data={"workers": 4, "data": "moved/elsewhere"}, device="cpu"))


def test_metrics_are_cut_where_a_run_resumes(tmp_path: Path) -> None:
    folder = claimed(tmp_path / "run")
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    folder.cut_metrics(2)
    assert folder.metrics.read_text().splitlines() == lines[:2]


def test_quarantine_is_read_back(tmp_path: Path) -> None:
    folder = claimed(tmp_path / "run")
    assert folder.read_quarantine() == {}
    reasons = {"a.jpg": "empty", "caf\udce9.jpg": "truncated"}
    folder.write_quarantine(reasons)
    assert folder.read_quarantine() == reasons
    (folder.path / "quarantine.jsonl").write_text('{"path": "a.jpg", "rea')
    assert folder.read_quarantine() == {}


def test_status_says_how_the_run_ended(tmp_path: Path) -> None:
    folder = claimed(tmp_path / "run")
    folder.write_status(Exit.PREEMPTED, "SIGTERM", 5, True)
    status = json.loads(folder.status_file.read_text())
    assert status == {"code": 75, "reason": "SIGTERM", "step": 5, "resumable": True}
