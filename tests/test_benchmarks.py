"""Benchmarks: the page they write, and that the sides which are compared do the same work."""

import argparse
import contextlib
import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import written_out

from benchmarks import augment, loss, plain_views, report
from benchmarks import input as input_path
from benchmarks.drive import Drive
from benchmarks.photographs import photographs, prepared
from clsa.errors import ClsaError
from clsa.options import MethodOptions, ViewOptions
from clsa.sources import Pictures
from clsa.views import POOLS, amount, view_specs

ROOT = Path(report.__file__).parent.parent
TINY = {"batch_size": 8, "model": {"norm_groups": 2}, "log_every": 1}


def result(title: str, *rows: report.Row) -> dict:
    facts = {
        "processor": "one",
        "cores": 2,
        "threads": 1,
        "python": "3",
        "versions": {"torch": "2"},
    }
    told = {"command": "run", "date": "2026-01-01", "machine": facts, "notes": ["A note."]}
    return {"title": title, "rows": [asdict(row) for row in rows], **told}


def test_ratios_say_how_many_times_better_ours_is() -> None:
    quicker = report.versus("a", 30.0, 10.0, "images/s", "peer", at_least=3.0)
    assert (quicker.ratio, quicker.met, quicker.budget) == (3.0, True, ">= 3x")
    shorter = report.versus("a", 2.0, 8.0, "ms", "peer", at_least=5.0, less_is_better=True)
    assert (shorter.ratio, shorter.met) == (4.0, False)
    assert report.versus("a", 2.0, 8.0, "ms", "peer").met is None


def test_shares_are_percent_with_budgets_on_either_side() -> None:
    enough = report.share("a", 9.0, 10.0, at_least=0.9)
    assert (enough.ours, enough.unit, enough.budget, enough.met) == (90.0, "%", ">= 90 %", True)
    too_much = report.share("a", 2.0, 10.0, at_most=0.1)
    assert (too_much.budget, too_much.met) == ("<= 10 %", False)


def test_the_page_has_every_result_in_order_and_every_budget_on_top(tmp_path: Path) -> None:
    met = report.versus("quick", 30.0, 10.0, "images/s", "peer|s", at_least=2.0)
    missed = report.share("slow", 9.0, 10.0, at_most=0.5)
    for name, made in (
        ("zebra", result("Of other machines", report.Row("bare", 1234.5))),
        ("step", result("Steps", missed)),
        ("input", result("Input", met)),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    page = report.render(tmp_path)
    titles = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["Budgets: 1 of 2 met", "Input", "Steps", "Of other machines"]
    assert page.count("| quick | 30.0 | 10.0 | images/s | 3.00x | >= 2x met | peer\\|s |") == 2
    assert page.count("| slow | 90.0 | - | % | - | <= 50 % **missed** | - |") == 2
    assert page.count("| bare | 1,234 | - |  | - | - | - |") == 1
    assert "`run`, 2026-01-01: one; 2 cores, 1 thread; Python 3, torch 2." in page


def test_the_page_in_docs_is_that_of_the_results() -> None:
    if report.PAGE.exists() or any(report.RESULTS.glob("*.json")):
        assert report.PAGE.read_text() == report.render(report.RESULTS)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.01234, "0.012"),
        (0.5, "0.50"),
        (12.34, "12.3"),
        (65792, "65,792"),
    ],
)
def test_numbers_have_about_three_digits(value: float | None, told: str) -> None:
    assert report.number(value) == told


def test_quick_results_are_written_only_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    rows = [report.Row("a claim", 1.0)]
    quick = argparse.Namespace(quick=True, threads=1, out=None)
    report.publish("name", "Title", rows, quick)
    assert "a claim" in capsys.readouterr().out and not list(tmp_path.iterdir())
    quick.out = tmp_path / "apart" / "gpu.json"
    report.publish("name", "Title", rows, quick)
    assert json.loads(quick.out.read_text())["rows"][0]["claim"] == "a claim"
    assert not report.PAGE.exists()
    report.publish("name", "Title", rows, argparse.Namespace(quick=False, threads=1, out=None))
    assert (tmp_path / "results" / "name.json").exists()
    assert "a claim" in report.PAGE.read_text()


def test_sides_are_called_in_turn() -> None:
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = report.alternate(sides, repeats=2, warmup=1)
    assert calls == ["a", "b"] * 3 and {len(taken) for taken in times.values()} == {2}


def test_a_missing_peer_is_one_line() -> None:
    with pytest.raises(ClsaError, match=r"no_such_peer missing - .* - .*make bench"):
        report.require("torch", "no_such_peer")


def test_make_bench_runs_files_that_exist() -> None:
    line = next(
        line
        for line in (ROOT / "Makefile").read_text().splitlines()
        if line.startswith("BENCHMARKS")
    )
    names = line.split(":=")[1].split()
    missing = [name for name in names if not (ROOT / "benchmarks" / f"{name}.py").exists()]
    assert names and not missing


# ---- the sides do the same work


def test_chunked_log_softmax_is_the_written_out_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7)
    draw = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(4, 8, generator=draw).double(), dim=1) for _ in range(5)]
    bank = F.normalize(torch.randn(20, 8, generator=draw).double(), dim=1)
    values, grads = [], []
    for function in (loss.chunked, written_out):
        queries = [row.clone().requires_grad_() for row in rows]
        value = function(queries[:2], queries[2:], bank, torch.arange(4))
        value.backward()
        values.append(value.detach())
        grads.append(torch.stack([query.grad for query in queries if query.grad is not None]))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("op", POOLS["official"])
def test_the_peer_draws_the_amounts_that_we_draw(op: str) -> None:
    random.seed(0)
    drawn = {plain_views.AMOUNTS[op](level, 32) for level in range(1, 10) for _ in range(40)}
    magnitude = np.repeat((np.arange(9) + 0.5) / 9, 2)
    sign = np.tile([-1.0, 1.0], 9)
    ours = amount(op, "official", magnitude, sign, 32)
    assert sorted(drawn) == pytest.approx(sorted(set(ours.tolist())), abs=1e-12)


def test_the_peers_strong_view_has_rounds_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[int] = []

    def operate(image: Image.Image, op: str, amount: float) -> Image.Image:
        applied[-1] += 1
        return image

    monkeypatch.setattr(plain_views, "operate", operate)
    specs = view_specs(ViewOptions(), MethodOptions())
    views = plain_views.Views(ViewOptions(), specs)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    random.seed(0)
    torch.manual_seed(0)
    applied.append(0)
    made = views(Image.fromarray(pixels))
    assert [view.shape[-1] for view in made] == [224, 224, 96]
    for _ in range(400):
        applied.append(0)
        views.views[-1](Image.fromarray(pixels))
    assert np.mean(applied) == pytest.approx(2.5, abs=0.3) and set(applied) == set(range(6))


def test_photographs_are_cut_to_size(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.resize((2000, 1200)).save(tmp_path / "large.jpg")
    image.save(tmp_path / "small.jpg")
    (tmp_path / "not.jpg").write_text("no picture")
    assert [path.name for path in photographs(tmp_path)] == ["large.jpg"]
    with prepared(tmp_path, 50, 40, 88, count=3) as folder:
        sizes = [Image.open(path).size for path in sorted(folder.iterdir())]
    assert sizes == [(50, 40)] * 3 and not folder.exists()
    with pytest.raises(ClsaError, match=r"no photographs in .*small.* - .*--photos DIR"):
        photographs(tmp_path / "small")


def test_the_input_path_is_measured_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_path, "packed", lambda folder: contextlib.nullcontext())
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    for i in range(2):
        Image.fromarray(pixels).resize((500, 375)).save(tmp_path / f"{i}.jpg")
    rows = input_path.measure(tmp_path, "small", batch=2, repeats=1, budgets=True)
    assert [row.claim.split(": ")[1].split()[0] for row in rows] == ["JPEG", "JPEG", "decode"]
    assert all(row.ours and row.peer and row.unit == "images/s" for row in rows)
    assert [row.budget for row in rows] == [">= 8x", "", ""]
    assert rows[0].ours and rows[1].ours and rows[0].ours > rows[1].ours  # the less work, the more


def test_the_weak_recipe_is_measured_against_each_peer() -> None:
    pytest.importorskip("kornia")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    source = Pictures(pixels, np.zeros(20, np.int64), ["one"])
    rows = list(augment.weak_recipe(source, batch=16, repeats=1))
    assert [row.against.split()[0] for row in rows] == ["kornia", "torchvision", "torchvision"] * 2
    assert all(row.ours and row.peer and row.unit == "ms" for row in rows)


def test_the_driven_step_is_a_whole_one(tmp_path: Path) -> None:
    with Drive("moco-v2-small", tmp_path, **TINY) as drive:
        before = [weight.clone() for weight in drive.method.network.parameters()]
        drive.encoder_alone()()
        after = list(drive.method.network.parameters())
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        drive.step()
        assert drive.state.step == 1 and not torch.equal(before[0], after[0])
        assert [tuple(view.shape) for view in drive.views().views] == [(8, 3, 32, 32)] * 2
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 1 and line["images_per_s"] > 0


def test_the_plain_clsa_trains_as_ours_does(tmp_path: Path) -> None:
    from benchmarks.plain_clsa import PlainCLSA
    from clsa.recipes import resolve

    draw = np.random.default_rng(0)
    (tmp_path / "class").mkdir()
    for i in range(9):
        pixels = draw.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "class" / f"{i}.png")
    options = resolve({"recipe": "clsa-small", "method": {"queue_size": 12}, **TINY})
    torch.manual_seed(0)
    plain = PlainCLSA(options, tmp_path, workers=0)
    queue = plain.queue.clone()
    weights = [weight.clone() for weight in plain.network.parameters()]
    for _ in range(2):
        plain.step()
    assert plain.pointer == 16 % 12 and not (plain.queue == queue).all(1).any()
    torch.testing.assert_close(plain.queue.norm(dim=1), torch.ones(12))
    moved = [
        not torch.equal(*pair) for pair in zip(weights, plain.network.parameters(), strict=True)
    ]
    assert all(moved)


def test_lightlys_side_steps(tmp_path: Path) -> None:
    pytest.importorskip("lightly")
    from benchmarks.lightly_moco import LightlyMoCo
    from clsa.recipes import resolve

    draw = np.random.default_rng(0)
    (tmp_path / "class").mkdir()
    for i in range(8):
        pixels = draw.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "class" / f"{i}.png")
    options = resolve({"recipe": "moco-v2-small", **TINY})
    peer = LightlyMoCo(options, tmp_path, workers=0, fast=False)
    bank_size = peer.criterion.memory_bank.size
    assert tuple(bank_size) == (4096, 128)
    keys = [weight.clone() for weight in peer.key_backbone.parameters()]
    for _ in range(2):
        peer.step()
    assert int(peer.criterion.memory_bank.bank_ptr) == 16
    moved = [
        not torch.equal(*pair) for pair in zip(keys, peer.key_backbone.parameters(), strict=True)
    ]
    assert any(moved)
