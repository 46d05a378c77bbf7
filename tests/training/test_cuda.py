"""Results on a GPU equal those on a CPU; skipped without a GPU."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clsa.evaluate.evaluate import evaluate
from clsa.learning import losses
from clsa.learning.bank import KeyQueue, keys_with_queue
from clsa.learning.models import Network, autocast, encode_shuffled, momentum_copy
from clsa.learning.optim import build_optimizer
from clsa.loading import loader
from clsa.loading.order import Order
from clsa.methods import build_method
from clsa.methods.method import Extent
from clsa.options.commands import EvaluateOptions
from clsa.options.config import merge
from clsa.options.run import (
    DataOptions,
    ModelOptions,
    RunOptions,
    StrongOptions,
    ViewOptions,
    WeakViews,
)
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Pictures
from clsa.recipes import resolve
from clsa.runs.checkpoint import load_newest
from clsa.runs.computing import begin
from clsa.runs.folder import RunFolder
from clsa.runs.state import State
from clsa.system.machine import upload
from clsa.system.signals import Stop
from clsa.training import step
from clsa.training.start import pretrain
from clsa.training.step import Run, train_step
from clsa.views import geometry, rng, transform
from clsa.views.specs import ViewSpec, strong_specs, weak_specs
from tests.support.pictures import clipart_folder, jpeg_folder
from tests.support.reference import written_out

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clipart_folder(tmp_path_factory.mktemp("drawings"), classes=2, each=22)


def options(pictures: Path, out: Path, **over: Any) -> RunOptions:
    tiny = {
        "recipe": "clsa-small",
        "data": {"data": str(pictures), "workers": 0, "resident_limit": 1e-6},
        "out": str(out),
        "batch_size": 8,
        "epochs": 2,
        "log_every": 1,
        "device": str(GPU),
        "precision": "fp32",
        "views": {"size": 16, "weak": {"sizes": (16,)}},
        "strong": {"sizes": (16,)},
        "model": {"projector_hidden": 32, "projector_dim": 16, "norm_groups": 2},
        "method": {"queue_size": 20},
    }
    return resolve(merge(tiny, over))


def noise(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def unit(rows: int, dim: int, seed: int) -> Tensor:
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


# ---- views


def test_the_counter_gives_the_same_bits() -> None:
    index, slots = np.arange(1000) * 7919, np.arange(40)
    wanted = rng.hash_bits(3, 5, index, 2, slots)
    got = rng.hash_bits(3, 5, torch.from_numpy(index).to(GPU), 2, torch.from_numpy(slots).to(GPU))
    assert torch.equal(got.cpu(), torch.from_numpy(wanted))


def test_uploads_arrive_whole_while_the_device_is_busy() -> None:
    """Pinned memory is reused many times before the copies are done."""
    busy = torch.randn(2048, 2048, device=GPU)
    for _ in range(20):
        busy = busy @ busy / 2048
    sent = [np.full(5000, i, np.int64) for i in range(200)]
    got = [upload([array], GPU)[0] for array in sent]
    for array, tensor in zip(sent, got, strict=True):
        assert np.array_equal(array, tensor.cpu().numpy())


def test_crops_are_the_same() -> None:
    images, size = noise(64, 75, 100), 48
    spec = ViewSpec("key", size, (0.2, 1.0), 0)
    heights, widths = np.full(64, 75), np.full(64, 100)
    boxes, flips = transform.crop_params(spec, 0, 1, np.arange(64), heights, widths)
    wanted = geometry.crop(images, boxes, size, flips)
    got = geometry.crop(images.to(GPU), boxes, size, flips)
    torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0.01)


@pytest.mark.parametrize("size", [32, 96])
def test_weak_views_are_the_same(size: int) -> None:
    weak = WeakViews(sizes=(size,), solarize=(0.2,))
    spec = weak_specs(ViewOptions(size=size, weak=weak))[1]
    params = transform.sample(spec, 0, 0, np.arange(128))
    crops = noise(128, size, size).contiguous(memory_format=torch.channels_last)
    wanted = transform.pixels(crops, params, spec)
    got = transform.pixels(crops.to(GPU), params, spec).cpu()
    kept = ~params.solarize  # values at one half may round to either side
    torch.testing.assert_close(got[kept], wanted[kept], rtol=0, atol=5e-4)
    assert ((got - wanted).abs() > 5e-4).float().mean() < 1e-4


@pytest.mark.parametrize("pool", ["paper", "official", "randaugment"])
def test_strong_operations_are_the_same(pool: Any) -> None:
    """On uint8, where every operation is integer arithmetic or rounds its float64 result."""
    strong = StrongOptions(sizes=(48,), pool=pool)
    (spec,) = strong_specs(ViewOptions(size=48), strong, 2)
    params = transform.sample(spec, 0, 0, np.arange(256))
    images = noise(256, 48, 48)
    wanted = transform.apply_ops(images, params, pool)
    got = transform.apply_ops(images.to(GPU), params, pool).cpu()
    assert (wanted != images).flatten(1).any(1).float().mean() > 0.9
    assert (got != wanted).float().mean() < 1e-3


# ---- losses, bank


@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_gradients_are_the_same(masked: bool) -> None:
    """Over a bank longer than a chunk, against float64 on the CPU."""
    count, dim, length = 16, 32, losses.CUDA_CHUNK + 100
    queries = [unit(count, dim, seed) for seed in range(4)]
    bank, positive = unit(length, dim, 9), torch.arange(count)
    seen = torch.eye(count, dtype=torch.bool) if masked else None
    results = []
    for device, kind in ((GPU, torch.float32), (CPU, torch.float64)):
        mine = [query.to(device, kind, copy=True).requires_grad_() for query in queries]
        terms = losses.contrast_and_divergence(
            mine[:2], mine[2:], bank.to(device, kind), positive.to(device),
            candidates=None if seen is None else seen.to(device),
        )  # fmt: skip
        (terms.contrast + terms.divergence).backward()
        values = [*terms, *(query.grad for query in mine)]
        results.append([value.detach().cpu().double() for value in values if value is not None])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    if not masked:
        plain = written_out(queries[:2], queries[2:], bank, positive)
        assert results[0][0] + results[0][1] == pytest.approx(plain.item(), rel=1e-4)


def test_losses_are_float32_under_autocast() -> None:
    bank, query = unit(300, 64, 1), unit(4, 64, 2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = losses.info_nce(query.to(GPU), bank.to(GPU), torch.arange(4, device=GPU))
    assert got.dtype == torch.float32
    wanted = losses.info_nce(query, bank, torch.arange(4))
    assert got.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_the_queue_is_the_same() -> None:
    queues = [KeyQueue(20, 8, 0).to(device) for device in (CPU, GPU)]
    for number, rows in enumerate((8, 8, 8, 33, 5)):
        for queue, device in zip(queues, (CPU, GPU), strict=True):
            queue.enqueue(unit(rows, 8, number).to(device))
    assert torch.equal(queues[0].rows, queues[1].rows.cpu())
    assert queues[0].pointer.item() == queues[1].pointer.item() == (8 + 8 + 8 + 33 + 5) % 20
    bank, own, seen = keys_with_queue(unit(8, 8, 7).to(GPU), queues[1], batch_negatives=False)
    assert seen is not None and {bank.device.type, own.device.type, seen.device.type} == {GPU.type}


# ---- networks


def test_bf16_where_the_gpu_computes_in_it_and_unit_rows_in_float32() -> None:
    native = torch.cuda.get_device_capability() >= (8, 0)
    images = torch.randn(8, 3, 32, 32, device=GPU)
    network = Network(ModelOptions(encoder="resnet10-w32", norm_groups=2), seed=0).to(GPU)
    for precision, bf16 in (("auto", native), ("bf16", True), ("fp32", False)):
        with autocast(GPU, precision):
            assert (torch.mm(images[0, 0], images[0, 0]).dtype == torch.bfloat16) == bf16
            rows = network(images)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(8, device=GPU))


@pytest.mark.parametrize("groups", [1, 4])
def test_networks_and_their_gradients_are_the_same(groups: int) -> None:
    settings = ModelOptions(encoder="resnet10-w32", projector_hidden=32, norm_groups=groups)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for device in (CPU, GPU):
        network = Network(settings, seed=0).to(device)
        shown = images.to(device).contiguous(memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(allow_tf32=False):
            rows = network(shown)
            rows[:, 0].sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        running = [value for name, value in network.named_buffers() if "running" in name]
        results.append([value.detach().cpu() for value in (rows, *gradients, *running)])
        assert network.encoder.get_submodule("conv1").weight.is_contiguous(
            memory_format=torch.channels_last
        )
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-4 + 1e-2 * wanted.abs().max())


def test_shuffled_keys_come_back_in_order() -> None:
    settings = ModelOptions(encoder="resnet10-w32", projector_hidden=32, norm_groups=4)
    network = momentum_copy(Network(settings, seed=0)).to(GPU).eval()
    images = torch.randn(16, 3, 32, 32, device=GPU)
    with torch.backends.cudnn.flags(allow_tf32=False):
        torch.testing.assert_close(
            encode_shuffled(network, images, 0, 5), network(images), rtol=1e-3, atol=1e-4
        )


# ---- runs


def test_streamed_crops_are_the_same(tmp_path: Path) -> None:
    folder = jpeg_folder(tmp_path / "jpegs", [(40 + 3 * i, 60 - 2 * i) for i in range(12)])
    read = DataOptions(data=str(folder), workers=1, resident_limit=1e-6)
    source, order = open_source(str(folder), "train", read), Order(12, 6, 0)
    chosen = options(folder, tmp_path / "run")
    specs = weak_specs(chosen.views) + strong_specs(chosen.views, chosen.strong, 2)
    both = [loader.batches(source, specs, order, 0, 4, device, read) for device in (CPU, GPU)]
    for wanted, got in zip(*both, strict=True):
        assert torch.equal(wanted.index, got.index) and torch.equal(wanted.labels, got.labels)
        for a, b in zip(wanted.crops, got.crops, strict=True):
            assert b.device.type == GPU.type and a.stride() == b.stride()
            assert torch.equal(a, b.cpu())


def spy_on_order(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    seen: list[list[int]] = []
    make_views = step.make_views

    def spy(crops: Any, specs: Any, step: int, run: Any) -> Any:
        if len(crops.index) == run.options.batch_size:  # not the contact sheet's
            seen.append(crops.index.tolist())
        return make_views(crops, specs, step, run)

    monkeypatch.setattr(step, "make_views", spy)
    return seen


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("limit", [1e-6, 1.0])
def test_a_run_resumes_in_the_order_of_a_run_on_the_cpu(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    seen = spy_on_order(monkeypatch)
    values = {"data": {"resident_limit": limit}}
    pretrain(options(drawings, tmp_path / "cpu", device="cpu", probe_every=0, **values))
    on_cpu = seen.copy()
    seen.clear()
    for stop in (3, None):
        pretrain(options(drawings, tmp_path / "gpu", max_steps=stop, **values))
    assert seen == on_cpu and len(seen) == 10
    status = json.loads((tmp_path / "gpu" / "status.json").read_text())
    assert status == {"code": 0, "reason": "finished", "step": 10, "resumable": False}
    # the rounding of convolutions differs and grows from step to step
    assert losses_of(tmp_path / "gpu") == pytest.approx(losses_of(tmp_path / "cpu"), rel=0.05)
    first = [losses_of(tmp_path / name)[0] for name in ("gpu", "cpu")]
    assert first[0] == pytest.approx(first[1], rel=2e-3)


def test_a_run_from_the_cpu_resumes_and_is_evaluated_on_gpu(drawings: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(options(drawings, out, device="cpu", max_steps=2, probe_every=0))
    cpu = load_newest(out / "checkpoints")
    state_options = options(drawings, out, probe_every=0)
    method = build_method(state_options, Extent(44, 2, 5, 10)).to(GPU)
    optimizer = build_optimizer(method, state_options.optim)
    assert cpu is not None
    state = State(method, optimizer, cpu.state["data_digest"], RunFolder(out))
    state.resume()
    assert state.step == 2
    for name, value in method.state_dict().items():
        assert value.device.type == GPU.type and torch.equal(value.cpu(), cpu.state["method"][name])
    momenta = [entry["momentum_buffer"] for entry in optimizer.state.values()]
    saved = [entry["momentum_buffer"] for entry in cpu.state["optimizer"]["state"].values()]
    assert len(momenta) == len(saved) > 10
    for moved, kept in zip(momenta, saved, strict=True):
        assert moved.device.type == GPU.type and torch.equal(moved.cpu(), kept)
    pretrain(state_options)
    protocols = ("knn-20", "knn-strong", "logistic", "linear-fast", "linear-clsa", "finetune")
    judged = EvaluateOptions(
        run=out, device=str(GPU), change=("epochs=2", "batch_size=8"), protocol=protocols
    )
    records = evaluate(judged)
    assert {record.protocol for record in records} == set(protocols)
    assert all(0 <= record.value <= 100 for record in records)


@pytest.mark.parametrize("recipe", ["moco-v2-small", "clsa-small", "clsa-paper-small"])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_the_host_reads_once_a_step(tmp_path: Path, recipe: str, name: str) -> None:
    chosen = options(
        tmp_path, tmp_path / "run", recipe=recipe, precision="auto",
        optim={"name": name, "clip_norm": 3.0},
        views={"size": 16, "weak": {"sizes": (16,), "blur": 0.5, "solarize": 0.2}},
    )  # fmt: skip
    images = noise(32, 24, 24).permute(0, 2, 3, 1).numpy()
    source, order = Pictures(images, np.full(32, -1), []), Order(32, 8, 0)
    method = build_method(chosen, Extent(32, 0, 4, 8)).to(GPU)
    state = State(method, build_optimizer(method, chosen.optim), "", RunFolder(tmp_path / "run"))
    run = Run(chosen, GPU, order.steps_per_epoch, Stop(), begin(chosen, GPU))
    stream = loader.batches(source, method.view_specs, order, 0, 6, GPU, DataOptions(data="noise"))
    for _ in range(3):  # the first steps make states, handles and plans
        train_step(method, state, next(stream), run)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                train_step(method, state, next(stream), run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) == 3, waits
    assert state.step == 6
