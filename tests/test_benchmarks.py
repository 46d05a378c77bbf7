"""Benchmarks: the page that they write, and that the compared sides do the same work."""

import argparse
import json
import random
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import augment, gpu, loss, on_paper, page, photographs, plain_views, report, scale
from benchmarks import input as input_path
from benchmarks import step as whole_step
from benchmarks.drive import Drive
from benchmarks.photographs import SYNTHETIC, prepared
from clsa.methods import build_method
from clsa.methods.method import Batch, Extent, Method, sum_of
from clsa.options.run import RunOptions, StrongOptions, ViewOptions
from clsa.pictures.sources import Pictures
from clsa.recipes import resolve
from clsa.system.errors import ClsaError
from clsa.views.specs import strong_specs, weak_specs
from clsa.views.transform import POOLS, amount
from tests.support.reference import written_out

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
    told = {"command": "run", "date": "2026-01-01", "commit": "abc", "seconds": 61.2}
    told |= {"about": "What is compared.", "machine": facts, "notes": ["A note."]}
    return {"title": title, "rows": [asdict(row) for row in rows], **told}


def arguments(*given: str) -> argparse.Namespace:
    return report.parser("Title.", threads=1).parse_args(given)


def test_ratios_say_how_many_times_better_ours_is() -> None:
    quicker = report.versus("a", 30.0, 10.0, "images/s", "peer", at_least=3.0)
    assert (quicker.ratio, quicker.met, quicker.budget) == (3.0, True, ">= 3x")
    shorter = report.versus("a", 2.0, 8.0, "ms", "peer", at_least=5.0, less_is_better=True)
    assert (shorter.ratio, shorter.met) == (4.0, False)
    assert report.versus("a", 2.0, 8.0, "ms", "peer").met is None
    spread = report.versus("a", 3.0, 1.0, "images/s", "peer", rounds=[3.5, 2.5, 3.0]).spread
    assert spread == (2.5, 3.5)
    nothing = report.versus("a", 0.0, 8.0, "MB", "peer", at_least=5.0, less_is_better=True)
    assert (nothing.ours, nothing.ratio, nothing.met) == (0.0, None, True)


def test_shares_are_percent_with_budgets_on_either_side() -> None:
    enough = report.share("a", 9.0, 10.0, at_least=0.9)
    assert (enough.ours, enough.unit, enough.budget, enough.met) == (90.0, "%", ">= 90 %", True)
    too_much = report.share("a", 2.0, 10.0, at_most=0.1)
    assert (too_much.budget, too_much.met) == ("<= 10 %", False)


def test_the_page_has_every_budget_first_and_then_every_result_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "BUDGETS", {"run gpu": {"quick": ">= 2x", "on a GPU": "<= 7 %"}})
    met = report.versus(
        "quick, or not", 30.0, 10.0, "images/s", "peer|s", at_least=2.0, rounds=[2.5, 3.25]
    )
    missed = report.share("slow", 9.0, 10.0, at_most=0.5)
    for name, made in (
        ("zebra", result("Of other machines", report.Row("bare", 1234.5))),
        ("step", result("Steps", missed)),
        ("input", result("Input", met)),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    text = page.render(tmp_path)
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    sections = ["Input", "Steps", "Of other machines", "On paper: 8 and 64 GPUs"]
    assert titles == ["Budgets: 1 of 3 met", *sections]
    quick = (
        "| quick, or not | 30.0 | 10.0 | images/s | 3.00x (2.50 to 3.25) | >= 2x met | peer\\|s |"
    )
    assert text.count(quick) == 2
    assert text.count("| slow | 90.0 | - | % | - | <= 50 % **missed** | - |") == 2
    assert text.count("| bare | 1,234 | - |  | - | - | - |") == 1
    assert text.count("| on a GPU | <= 7 % | `run gpu` |") == 1 and "| quick | " not in text
    assert "## Input\n\nWhat is compared.\n\n| claim" in text
    told = "`run`, 2026-01-01, commit abc, 61 s: one; 2 cores; 1 thread; Python 3, torch 2."
    assert told in text


def test_the_page_in_docs_equals_the_page_made_from_the_results() -> None:
    assert report.PAGE.read_text() == page.render(report.RESULTS)


def test_hours_on_paper_use_the_rate_of_the_uncompiled_step_of_clsa() -> None:
    claims = ["steps: clsa, batch 256, plain, cudnn.benchmark: whole step", on_paper.CLAIM,
              "compiled: clsa, batch 256, compiled: whole step"]  # fmt: skip
    rows = [report.Row(claim, rate) for claim, rate in zip(claims, (3e3, 1e3, 4e3), strict=True)]
    assert on_paper.gpu_rate([result("GPU", *rows)]) == 1e3
    assert on_paper.gpu_rate([result("GPU", rows[0], rows[2])]) is None
    assert on_paper.CLAIM in page.BUDGETS["bash benchmarks/gpu.sh"]
    nothing = {"key views": 0.0, "keys": 0.0, "gradients": 0.0}
    assert on_paper.hours(nothing, 8, 256, 1e3) == pytest.approx(200 * 625 * 0.256 / 3600)
    waits = {"key views": 10e9, "keys": 10e9, "gradients": 200e9}  # 0.1 s, 1 s behind 0.17 s
    seconds = 0.256 + 0.1 + 1 - 0.256 * 2 / 3
    assert on_paper.hours(waits, 8, 256, 1e3) == pytest.approx(200 * 625 * seconds / 3600)


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
    assert page.number(value) == told


def test_quick_results_are_written_only_to_a_given_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    rows, docstring = [report.Row("a claim", 1.0)], "Title.\n\n    run it\n\nWhat it\nis.\n\nMore."
    report.publish("name", "Title", rows, arguments("--quick"), docstring, 1)
    assert "a claim" in capsys.readouterr().out and not list(tmp_path.iterdir())
    apart = tmp_path / "apart"
    report.publish("name", "Title", rows, arguments("--quick", "--out", str(apart)), docstring, 1)
    told = json.loads((apart / "name.json").read_text())
    assert told["rows"][0]["claim"] == "a claim" and told["about"] == "What it is."
    assert 0 <= told["seconds"] < 60 and told["commit"] == report.commit()
    assert not report.PAGE.exists()
    report.publish("name", "Title", rows, arguments(), docstring, 1)
    assert (tmp_path / "results" / "name.json").exists()
    assert "a claim" in report.PAGE.read_text()


def test_a_commit_is_marked_dirty_if_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"rev-parse": "abc1234", "status": ""}
    monkeypatch.setattr(report, "said", lambda *command: answers[command[1]])
    assert report.commit() == "abc1234"
    answers["status"] = " M clsa/loading/loader.py"
    assert report.commit() == "abc1234+dirty"
    answers["rev-parse"] = ""
    assert report.commit() == ""


def test_sides_are_called_in_turn() -> None:
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = report.alternate(sides, repeats=2, warmup=1)
    assert calls == ["a", "b"] * 3 and {len(taken) for taken in times.values()} == {2}


def test_a_missing_peer_is_reported_on_one_line() -> None:
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


def test_chunked_log_softmax_equals_the_written_out_loss(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_the_peer_draws_the_same_amounts_as_ours(op: str) -> None:
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
    specs = weak_specs(ViewOptions()) + strong_specs(ViewOptions(), StrongOptions(), 2)
    views = plain_views.Views(specs)
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


def test_photographs_are_cut_to_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.resize((2000, 1200)).save(tmp_path / "large.jpg")
    image.save(tmp_path / "small.jpg")
    (tmp_path / "not.jpg").write_text("no picture")
    assert [path.name for path in photographs.photographs(tmp_path)] == ["large.jpg"]
    with prepared(tmp_path, 50, 40, 88, count=3) as (folder, told):
        sizes = [Image.open(path).size for path in sorted(folder.iterdir())]
    assert sizes == [(50, 40)] * 3 and told == "" and not folder.exists()
    none = tmp_path / "none"
    with pytest.raises(ClsaError, match=r"no photographs in .*none.* - .*--photos DIR"):
        prepared(none, 50, 40, 88, count=3).__enter__()
    monkeypatch.setattr(photographs, "FOLDERS", (str(none),))
    with prepared(None, 50, 40, 88, count=3) as (folder, told):
        drawn = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    assert [image.shape for image in drawn] == [(40, 50, 3)] * 3 and told == SYNTHETIC
    assert all(image.std() > 10 for image in drawn) and (drawn[0] != drawn[1]).any()


def budgets(command: str) -> list[str]:
    return [claim for of, claims in page.BUDGETS.items() if command in of for claim in claims]


def judged(rows: list[report.Row]) -> list[str]:
    return [row.claim for row in rows if row.met is not None]


def begins(claims: list[str], wanted: list[str]) -> bool:
    """Whether claims and budgets of the page match one to one: each claim begins as its budget."""
    pairs = zip(claims, wanted, strict=True)
    return all(claim.startswith(budget) for claim, budget in pairs)


def test_the_input_path_is_measured_on_both_sides(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    for i in range(2):
        Image.fromarray(pixels).resize((500, 375)).save(tmp_path / f"{i}.jpg")
    rows = input_path.measure(tmp_path, "500x375", SYNTHETIC, batch=2, repeats=1, budgets=True)
    assert all(row.ours and row.claim.endswith(SYNTHETIC) for row in rows)
    compared = [row for row in rows if row.ratio and row.spread]
    assert len(compared) == 5 and len(rows) == 6 and all(row.spread for row in compared)
    assert begins(judged(rows), budgets("input"))
    assert [row.budget for row in rows] == ["", "", ">= 8x", ">= 10x", "", ""]


def test_a_pack_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(b"no picture")
    with pytest.raises(ClsaError, match="unreadable"):
        input_path.measure(tmp_path, "500x375", "", batch=2, repeats=1, budgets=True)


def test_the_loss_gives_all_figures_for_main_sizes_and_only_times_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = {"one pass": (2.0, 0.0), "written out": (11.0, 30.0), "chunked": (8.0, 40.0)}

    def apart(side: str, *_: object) -> dict:
        seconds, peak = figures[side]
        return {"seconds": seconds, "peak_mb": peak, "grads": [[1.0, 2.0]]}

    monkeypatch.setattr(loss, "apart", apart)
    rows, gap = loss.compare(loss.Sizes(), 1, main=True)
    assert begins(judged(rows), budgets("loss")) and gap == 0
    assert [(row.ours, row.peer, row.ratio, row.met) for row in rows] == [
        (2.0, 11.0, 5.5, True), (0.0, 30.0, None, True),
        (2.0, 8.0, 4.0, None), (0.0, 40.0, None, None),
    ]  # fmt: skip
    others, _ = loss.compare(loss.Sizes(batch=32), 1, main=False)
    assert [(row.unit, row.met) for row in others] == [("s", None)] * 2


def test_one_side_of_the_loss_is_measured() -> None:
    sizes, threads = loss.Sizes(4, 50, 8, 2, 2), torch.get_num_threads()
    try:
        found = [loss.measure(side, sizes, 1) for side in loss.SIDES]
    finally:
        torch.set_num_threads(threads)
    for told in found:
        assert len(told["grads"]) == 4 and told["seconds"] > 0
        torch.testing.assert_close(*(torch.tensor(one["grads"]) for one in (told, found[0])))


def test_steps_are_judged_by_medians_and_shares_by_sums() -> None:
    seconds = {"ours": (1.0, 3.0, 2.0), "lightly": (8.0, 10.0, 9.0), "plain": (5.0, 5.0, 5.0)}
    found = {}
    for side in (*whole_step.OURS, *whole_step.PEERS):
        taken = seconds[side.code.split("-")[0]]
        rounds = [{"step": step, "encoder": step - 0.1} for step in taken]
        found |= {(side, 0): rounds}
        if side.code != "ours":  # with two workers it is slower
            found |= {(side, 2): [{"step": 2 * told["step"]} for told in rounds]}
    rows = whole_step.judge(found, 256)
    assert (rows[0].ours, rows[0].ratio, rows[0].spread) == (128.0, 4.5, (10 / 3, 8.0))
    assert begins(judged(rows), budgets("step"))
    shares = [row.ours for row in rows if "encoder" in row.claim]
    assert shares == [pytest.approx(100 * 5.7 / 6)] * 3


def test_growth_of_memory_is_in_percent() -> None:
    steps, alone, streamed = (200, 2000), (100.0, 0.0, 0.0), (100.0, 50.0, 9.0)
    rows = [
        *scale.growth("tiny resident run", steps, alone, (99.0, 0.0, 0.0)),
        *scale.growth("tiny streamed run", steps, streamed, (102.5, 51.0, 9.0)),
    ]
    judgements = [(row.ours, row.budget, row.met) for row in rows if row.met is not None]
    assert judgements == [
        (pytest.approx(-1), "<= 2 %", True),
        (pytest.approx(2.5), "<= 2 %", False),
        (pytest.approx(2), "<= 2 %", True),
    ]
    assert begins(judged(rows), budgets("scale --parts memory"))


def test_start_up_is_judged_on_a_million_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_up(out: Path, pictures: Path, cache: str) -> tuple[float, float, float]:
        if cache != "off":
            Path(cache).mkdir(exist_ok=True)
            (Path(cache) / "listing").touch()
        return 5.5, 300.0, 20.0

    monkeypatch.setattr(scale, "start_up", start_up)
    counted = scale.num_files
    monkeypatch.setattr(
        scale, "num_files", lambda root: 1_000_000 if root.name == "million" else counted(root)
    )
    rows = list(scale.start_rows(tmp_path, tmp_path / "million", quick=False))
    assert begins(judged(rows), budgets("--parts start"))
    assert [row.met for row in rows[:6:3]] == [True, False]
    (tmp_path / "again" / "cache").mkdir(parents=True)
    (tmp_path / "again" / "cache" / "listing").touch()
    with pytest.raises(AssertionError, match="the cache says otherwise"):
        list(scale.start_rows(tmp_path / "again", tmp_path / "million", quick=False))


def test_parts_of_scale_have_separate_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(folder: Path, pictures: Path, quick: bool) -> list[report.Row]:
        """Start-up.

        Of something.
        """
        return [report.Row("a claim", 1.0)]

    monkeypatch.setattr(scale, "PARTS", {"start": (rows, 1), "work": (rows, 2)})
    (tmp_path / "one").mkdir()
    given = ["--parts", "start", "--pictures", str(tmp_path / "one"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scale", *given])
    scale.main()
    assert [path.stem for path in tmp_path.glob("*.json")] == ["start-small"]
    monkeypatch.setattr(scale, "num_files", lambda root: 1_000_000)
    scale.main()
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["start", "start-small"]
    told = json.loads((tmp_path / "start.json").read_text())
    assert (told["title"], told["about"]) == ("Scale: start-up", "Of something.")


def test_the_steps_on_a_gpu_run_and_their_claims_match_the_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [(name, 256) for name in ("moco-v2", "clsa", "clsa-multi")]
    monkeypatch.setattr(gpu, "PLAN", plan)
    monkeypatch.setattr(gpu, "VARIANTS", {})
    monkeypatch.setattr(gpu, "breakdown", lambda drive, named: [])
    monkeypatch.setattr(gpu, "Sizes", lambda batch, weak, strong: loss.Sizes(batch, 99, 8, 1, 1))
    given = ["--device", "cpu", "--quick", "--threads", "1", "--out", str(tmp_path)]
    for part in ("steps", "loss"):
        monkeypatch.setattr(sys, "argv", ["gpu", part, *given])
        gpu.main()
    found = page.load(tmp_path)
    assert list(found) == ["gpu-steps", "gpu-loss"]
    rows = [row for each in found.values() for row in each["rows"] if row["met"] is not None]
    claims = [row["claim"] for row in rows if "1024" not in row["claim"]]
    assert begins(claims, budgets("gpu.sh"))
    assert "a Triton kernel for the loss of clsa, batch 256 is" in found["gpu-loss"]["notes"][0]
    assert re.search(
        r"\nsteps: clsa, batch 256, plain: whole step: [\d.,]+ images/s", capsys.readouterr().out
    )


def test_the_weak_recipe_is_measured_against_each_peer() -> None:
    pytest.importorskip("kornia")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    source = Pictures(pixels, np.zeros(20, np.int64), ["one"])
    rows = list(augment.weak_recipe(source, batch=16, repeats=1))
    peers = [re.split(r"\W", row.against)[0] for row in rows]
    assert peers == ["kornia", "torchvision", "torchvision"] * 2
    assert all(row.ours and row.peer and row.unit == "ms" for row in rows)


def test_drive_runs_whole_steps() -> None:
    with Drive("moco-v2-small", **TINY) as drive:
        before = [weight.clone() for weight in drive.method.network.parameters()]
        drive.encoder_alone()()
        after = list(drive.method.network.parameters())
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        drive.step()
        assert drive.state.step == 1 and not torch.equal(before[0], after[0])
        assert [tuple(view.shape) for view in drive.views().views] == [(8, 3, 32, 32)] * 2
        line = json.loads(drive.state.folder.metrics.read_text())
    assert line["step"] == 1 and line["images_per_s"] > 0
    assert not drive.state.folder.path.exists()


# ---- the peers compute what ours does


def drawn_pictures(folder: Path, count: int) -> Path:
    draw = np.random.default_rng(0)
    (folder / "class").mkdir()
    for i in range(count):
        pixels = draw.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "class" / f"{i}.png")
    return folder


def plainly(recipe: str) -> RunOptions:
    """The recipe in float32, with one group of batch norm and a queue of 12."""
    values = {"precision": "fp32", "method": {"queue_size": 12}, "model": {"norm_groups": 1}}
    return resolve({"recipe": recipe, "batch_size": 8, **values})


def ours(options: RunOptions) -> tuple[Method, Batch]:
    """Our method, with a key network other than its query network, and a batch of noise."""
    method = build_method(options, Extent(8, 0, 1, 10))
    draw = torch.Generator().manual_seed(0)
    for weight in key_network(method).parameters():
        weight.data += 0.01 * torch.randn(weight.shape, generator=draw)
    views = [torch.randn(8, 3, 32, 32, generator=draw) for _ in method.view_specs]
    return method, Batch(views, torch.arange(8), torch.zeros(8, dtype=torch.int64), 0)


def key_network(method: Method) -> torch.nn.Module:
    found = dict(method.named_modules())
    return next(module for name, module in found.items() if name.endswith("key_network"))


def copy_weights(target: torch.nn.Module, source: torch.nn.Module) -> None:
    """Copy weights to a module with the same tensors in the same order, under other names.

    Also give it our memory layout: another layout rounds differently, and a ReLU that flips because
    of it changes gradients by a thousandth.
    """
    values = source.state_dict().values()
    target.load_state_dict(dict(zip(target.state_dict(), values, strict=True)))
    target.to(memory_format=torch.channels_last)  # pyright: ignore


def assert_same_gradients(ours: torch.nn.Module, peer: torch.nn.Module) -> None:
    pairs = list(zip(ours.parameters(), peer.parameters(), strict=True))
    for mine, theirs in pairs:
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=2e-6)
    assert max(float(mine.grad.abs().max()) for mine, _ in pairs if mine.grad is not None) > 1e-2


def test_the_plain_clsa_has_the_same_loss_and_gradients_as_ours(tmp_path: Path) -> None:
    from benchmarks.plain_clsa import PlainCLSA

    options = plainly("clsa-small")
    method, batch = ours(options)
    plain = PlainCLSA(options, drawn_pictures(tmp_path, 8), workers=0)
    copy_weights(plain.network, method.network)
    copy_weights(plain.key_network, key_network(method))
    plain.queue.copy_(dict(method.named_buffers())["base.queue.rows"])
    output = method(batch)
    sum_of(output.losses.values()).backward()
    loss, keys = plain.loss(*batch.views)
    loss.backward()
    torch.testing.assert_close(loss, sum_of(output.losses.values()))
    torch.testing.assert_close([keys], output.state)
    assert_same_gradients(method.network, plain.network)


def test_lightlys_moco_has_the_same_loss_and_gradients_as_ours(tmp_path: Path) -> None:
    pytest.importorskip("lightly")
    from benchmarks.lightly_moco import LightlyMoCo

    options = plainly("moco-v2-small")
    method, batch = ours(options)
    peer = LightlyMoCo(options, drawn_pictures(tmp_path, 8), workers=0, fast=False)
    theirs = torch.nn.ModuleList([peer.backbone, peer.head])
    copy_weights(theirs, method.network)
    copy_weights(torch.nn.ModuleList([peer.key_backbone, peer.key_head]), key_network(method))
    peer.criterion.memory_bank.bank.copy_(dict(method.named_buffers())["queue.rows"])
    output = method(batch)
    sum_of(output.losses.values()).backward()
    key_view, query_view = batch.views
    loss = peer.loss(query_view, key_view)
    loss.backward()
    torch.testing.assert_close(loss, output.losses["contrast"])
    torch.testing.assert_close([peer.criterion.memory_bank.bank[:8]], output.state)
    assert_same_gradients(method.network, theirs)


def test_the_plain_clsa_updates_its_weights_and_queue(tmp_path: Path) -> None:
    from benchmarks.plain_clsa import PlainCLSA

    options = resolve({"recipe": "clsa-small", "method": {"queue_size": 12}, **TINY})
    torch.manual_seed(0)
    plain = PlainCLSA(options, drawn_pictures(tmp_path, 9), workers=0)
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


def test_lightlys_side_updates_its_weights_and_bank(tmp_path: Path) -> None:
    pytest.importorskip("lightly")
    from benchmarks.lightly_moco import LightlyMoCo

    options = resolve({"recipe": "moco-v2-small", **TINY})
    peer = LightlyMoCo(options, drawn_pictures(tmp_path, 8), workers=0, fast=False)
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
