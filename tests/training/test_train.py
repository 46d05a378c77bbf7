"""Training runs: resuming, what a run leaves, bad steps, signals, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import clsa
from clsa.evaluate.features.extract import frozen
from clsa.learning.models import Network
from clsa.methods import build_method
from clsa.methods.method import Extent
from clsa.methods.moco import MoCo
from clsa.options.config import merge
from clsa.options.run import RunOptions
from clsa.recipes import resolve
from clsa.runs.checkpoint import run_digest
from clsa.runs.digests import digest
from clsa.runs.saved_encoder import load_encoder
from clsa.system.errors import ClsaError, Exit
from clsa.training import fit, stages, step
from clsa.training.setup import describe_resumed
from clsa.training.start import pretrain
from tests.support.pictures import clipart_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 drawings in two class folders: five steps of 8 an epoch, four left over."""
    return clipart_folder(tmp_path_factory.mktemp("pictures"), classes=2, each=22)


def options(pictures: Path, out: Path, **over: Any) -> RunOptions:
    tiny = {
        "recipe": "clsa-small",
        "data": {"data": str(pictures), "workers": 0, "resident_limit": 1e-6},
        "out": str(out),
        "batch_size": 8,
        "epochs": 2,
        "probe_every": 0,
        "device": "cpu",
        "views": {"size": 16, "weak": {"sizes": (16,)}},
        "strong": {"sizes": (16,)},
        "model": {"projector_hidden": 32, "projector_dim": 16, "norm_groups": 2},
        "method": {"queue_size": 20},
    }
    return resolve(merge(tiny, over))


def test_resume_is_bitwise_after_three_stops_in_one_epoch_with_other_worker_counts(
    pictures: Path, tmp_path: Path
) -> None:
    pretrain(options(pictures, tmp_path / "whole", log_every=1))
    whole = run_digest(tmp_path / "whole")
    for stop, workers in ((1, 0), (3, 1), (4, 2), (None, 0)):
        torch.manual_seed(workers + 17)  # no global generator may matter
        pretrain(
            options(
                pictures,
                tmp_path / "cut",
                max_steps=stop,
                data={"workers": workers},
                probe_every=1,
                log_every=1,
            )
        )
    assert run_digest(tmp_path / "cut") == whole
    lines = [
        json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    ]
    whole_lines = [
        json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses == {line["step"]: line["loss"] for line in whole_lines}


def test_a_start_says_where_it_goes_on_or_that_nothing_is_left(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def told(**over: Any) -> str:
        capsys.readouterr()
        pretrain(options(pictures, out, **over))
        return capsys.readouterr().err

    assert "resumed" not in (new := told(max_steps=6)) and "nothing" not in new
    assert "nothing was to be done: --max-steps 6 is reached\n" in told(max_steps=6)
    assert "resumed at step 6 of 10 (epoch 2)\n" in told()
    done = f"all 10 steps (2 epochs) are done; to train for longer: clsa extend {out} --epochs N"
    assert f"nothing was to be done: {done}\n" in told()
    long = options(pictures, out, epochs=640)
    assert describe_resumed(long, 31, 5) == "resumed at step 31 of 3,200 (epoch 7)"


def test_what_a_look_has_found_stands_in_one_line_of_the_metrics(
    pictures: Path, tmp_path: Path
) -> None:
    out = pretrain(options(pictures, tmp_path / "run", epochs=9, log_every=3))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # looks at steps 20 and 40; lines at every third step and at the end of an epoch of five
    assert [line["step"] for line in lines if "rankme" in line] == [20, 40]
    assert [line["step"] for line in lines if "spread" in line] == [20, 40]


def test_another_seed_another_digest_and_the_same_seed_the_same(
    pictures: Path, tmp_path: Path
) -> None:
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(options(pictures, tmp_path / name, seed=seed, max_steps=2))
        digests.append(run_digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]


def test_a_finished_run_is_left_as_it_is(pictures: Path, tmp_path: Path) -> None:
    out = pretrain(options(pictures, tmp_path / "run", epochs=1))
    before = run_digest(out)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").iterdir()}
    pretrain(options(pictures, out, epochs=1))
    assert run_digest(out) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "checkpoints").iterdir()}


def test_what_a_run_leaves_behind(pictures: Path, tmp_path: Path) -> None:
    out = pretrain(options(pictures, tmp_path / "run", epochs=4, keep_every=1, probe_every=2))
    names = {path.name for path in (out / "checkpoints").iterdir()}
    steps = {
        f"step-{step:06d}{suffix}" for step in (5, 10, 15, 20) for suffix in (".ckpt", ".json")
    }
    best = {name for name in names if name.startswith("best-")}
    assert names - best == steps and best in (
        {"best-000010.ckpt", "best-000010.json"},
        {"best-000020.ckpt", "best-000020.json"},
    )
    status = json.loads((out / "status.json").read_text())
    assert status == {"code": 0, "reason": "finished", "step": 20, "resumable": False}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    probes = {line["step"]: line["knn"] for line in lines if "knn" in line}
    assert list(probes) == [10, 20]
    (record,) = json.loads((out / "results.json").read_text())
    assert (record["protocol"], record["value"]) == ("knn-online", probes[20])
    encoder = load_encoder(out).state_dict()
    assert record["encoder_digest"] == digest(encoder) and record["n"] == 9
    logged = next(line for line in lines if "loss" in line)
    assert {"contrast", "divergence", "target_entropy", "kl", "grad_norm", "lr", "images_per_s",
            "data_wait", "epoch"} <= set(logged)  # fmt: skip
    assert logged["loss"] == pytest.approx(logged["contrast"] + logged["divergence"])
    assert logged["divergence"] == pytest.approx(logged["target_entropy"] + logged["kl"], rel=1e-5)
    assert any((out / "tensorboard").iterdir())
    with Image.open(out / "views.png") as sheet:
        assert sheet.size[0] > 300 and len(sheet.convert("RGB").getcolors(1 << 20) or []) > 100
    features = load_encoder(out)(torch.zeros(2, 3, 16, 16))
    assert features.shape == (2, 256)


def test_only_the_last_two_checkpoints_stay(pictures: Path, tmp_path: Path) -> None:
    out = pretrain(options(pictures, tmp_path / "run", epochs=4))
    assert sorted(path.name for path in (out / "checkpoints").glob("*.ckpt")) == [
        "step-000015.ckpt",
        "step-000020.ckpt",
    ]


def test_resident_and_streamed_runs_see_the_same_crops(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {"1e-06": [], "1.0": []}
    make_views = step.make_views

    def spy(crops: Any, specs: Any, step: int, run: Any) -> Any:
        seen[str(run.options.data.resident_limit)].append(crops.crops[2].float())
        return make_views(crops, specs, step, run)

    monkeypatch.setattr(step, "make_views", spy)
    for limit in (1e-6, 1.0):
        run = options(pictures, tmp_path / f"{limit}", max_steps=2, data={"resident_limit": limit})
        pretrain(run)
    assert len(seen["1.0"]) >= 2
    for streamed, resident in zip(*seen.values(), strict=True):
        assert (streamed - resident.round()).abs().max() <= 1


class _NaNBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * torch.nan


def poison(monkeypatch: pytest.MonkeyPatch, where: str, bad_steps: range) -> list[bool]:
    """Make steps bad at `where`; returns a list that gets, per step, whether it moved anything."""
    make_views, step_of, forward = step.make_views, step.train_step, MoCo.forward
    moved: list[bool] = []

    def views(crops: Any, specs: Any, step: int, run: Any) -> Any:
        batch = make_views(crops, specs, step, run)
        if where == "image" and step in bad_steps:
            batch.views[1][0, 0, 0, 0] = torch.inf
        return batch

    def losses(self: MoCo, batch: Any) -> Any:
        output = forward(self, batch)
        contrast = output.losses["contrast"]
        if batch.step in bad_steps and where == "loss":
            contrast = contrast * torch.nan
        if batch.step in bad_steps and where == "gradient":
            contrast = _NaNBackward.apply(contrast)
        return output._replace(losses={"contrast": contrast})

    def watched(model: Any, state: Any, crops: Any, run: Any) -> Any:
        if where == "key network" and state.step in bad_steps:
            next(model.base.key_network.parameters()).data[0] = torch.nan
        before = digest([state.method.state_dict(), state.optimizer.state_dict()])
        stats = step_of(model, state, crops, run)
        moved.append(before != digest([state.method.state_dict(), state.optimizer.state_dict()]))
        return stats

    monkeypatch.setattr(step, "make_views", views)
    monkeypatch.setattr(MoCo, "forward", losses)
    monkeypatch.setattr(fit, "train_step", watched)
    return moved


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["image", "loss", "gradient", "key network"])
def test_a_bad_step_moves_nothing_and_the_run_goes_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, precision: str
) -> None:
    moved = poison(monkeypatch, where, range(3, 4))
    out = pretrain(
        options(pictures, tmp_path / "run", precision=precision, log_every=1, max_steps=6)
    )
    lasting = where == "key network"  # the test broke a weight, which stays broken
    assert moved == [True] * 3 + [False] + [not lasting] * 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in lines if "skipped" in line]
    assert skipped == ([4, 5, 6] if lasting else [4])
    assert [line["step"] for line in lines if "loss" in line] == [
        step for step in range(1, 7) if step not in skipped
    ]


def test_bad_steps_in_a_row_end_the_run_also_over_a_resume(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "gradient", range(3, 100))
    pretrain(options(pictures, tmp_path / "run", epochs=8, max_steps=12))
    with pytest.raises(ClsaError, match=r"non-finite gradient in base\..* at step 27 - 25") as end:
        pretrain(options(pictures, tmp_path / "run", epochs=8))
    assert end.value.code == Exit.UNHEALTHY
    assert json.loads((tmp_path / "run" / "status.json").read_text())["code"] == 76


def test_a_run_whose_first_steps_are_all_bad_ends_soon(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "loss", range(100))
    with pytest.raises(ClsaError, match=r"non-finite loss .* at step 4 - 5 bad steps"):
        pretrain(options(pictures, tmp_path / "run"))


def test_changed_pictures_and_changed_options_are_refused(pictures: Path, tmp_path: Path) -> None:
    copy = clipart_folder(tmp_path / "copy", classes=2, each=22)
    pretrain(options(copy, tmp_path / "run", max_steps=1))
    before = run_digest(tmp_path / "run")
    with pytest.raises(ClsaError, match=r"optim\.lr: 0\.06 -> 0\.1"):
        pretrain(options(copy, tmp_path / "run", optim={"lr": 0.1}))
    next(copy.rglob("*.webp")).unlink()
    with pytest.raises(ClsaError, match=r"data changed: \+0 -1 ~0 \(digest "):
        pretrain(options(copy, tmp_path / "run"))
    assert run_digest(tmp_path / "run") == before


def test_python_call_and_max_minutes(pictures: Path, tmp_path: Path) -> None:
    out = clsa.pretrain(
        pictures, tmp_path / "run", recipe="moco-v2-small", batch_size=16, epochs=100,
        max_minutes=0.001, workers=0, device="cpu", probe_every=0,
        views={"size": 16, "weak": {"sizes": [16]}},
    )  # fmt: skip
    status = json.loads((out / "status.json").read_text())
    assert status["reason"] == "max_minutes" and status["resumable"] and status["step"] >= 1


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "clsa", "pretrain", *args]


def flags(pictures: Path, out: Path) -> list[str]:
    return (
        f"--data {pictures} --out {out} --batch-size 8 --views.size 16 --views.weak.sizes 16 "
        "--strong.sizes 16 --model.norm-groups 2 --method.queue-size 20 --probe-every 0 "
        "--device cpu --workers 1 --resident-limit 1e-6"
    ).split()


def test_a_terminated_run_saves_says_75_and_resumes(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = command(*flags(pictures, out), "--epochs", "400")
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (out / "checkpoints").exists():
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, 15)  # the whole group, loader workers too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said.splitlines()[-1].startswith("error: stopped at step") and "Traceback" not in said
    status = json.loads((out / "status.json").read_text())
    assert status["code"] == 75 and status["resumable"]
    step = status["step"]
    done = subprocess.run([*args, "--max-steps", str(step + 1)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "status.json").read_text())["step"] == step + 1


def ranks(world: int, pictures: Path, out: Path, recipe: str) -> list[dict[str, Any]]:
    script = [
        str(ROOT / "tests" / "support" / "distributed.py"),
        str(pictures),
        str(out),
        recipe,
        "3",
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *launch, *script], check=True, env=env, timeout=120)
    return [torch.load(out / f"rank{r}-of-{world}.pt", weights_only=True) for r in range(world)]


@pytest.mark.parametrize("recipe", ["clsa-small", "clsa-paper-small"])
def test_two_processes_of_four_equal_one_of_eight(
    pictures: Path, tmp_path: Path, recipe: str
) -> None:
    (one,) = ranks(1, pictures, tmp_path, recipe)
    first, second = ranks(2, pictures, tmp_path, recipe)
    for number in range(3):
        for a, b, c in zip(*(r["grads"][number] for r in (one, first, second)), strict=True):
            assert torch.equal(b, c)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name, value in one["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(value, first["state"][name], rtol=1e-4, atol=1e-5)


def test_torchrun_is_the_whole_difference(pictures: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "clsa"]
    args = [*flags(pictures, tmp_path / "run"), "--max-steps", "6", "--epochs", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, "pretrain", *args],
        capture_output=True,
        text=True,
        env=env,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 6
    assert done.stdout.count("Next:") == 1


def test_compiling_reaches_every_encoder_and_no_evaluation(pictures: Path, tmp_path: Path) -> None:
    from torch._dynamo import config

    asked = options(pictures, tmp_path, compile=True)
    method = build_method(asked, Extent(44, 2, 5, 10))
    step.parallel(method, asked)
    networks = [module for module in method.modules() if isinstance(module, Network)]
    assert len(networks) == 2 and config.recompile_limit >= step.MAX_GRAPHS
    for network in networks:
        compiled = network.encoder._compiled_call_impl
        assert compiled is not None
        with frozen(network.encoder):
            assert network.encoder._compiled_call_impl is None
        assert network.encoder._compiled_call_impl is compiled


@pytest.mark.parametrize("over", [{}, {"stages": ("classes:2",)}], ids=["plain", "in stages"])
def test_tensorboard_that_is_missing_is_refused_before_anything_is_written(
    over: dict[str, Any], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(ClsaError, match=r"clsa\[tensorboard\]"):
        stages.pretrain(options(pictures, tmp_path / "run", tensorboard="on", **over))
    assert not (tmp_path / "run").exists()
