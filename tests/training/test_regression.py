"""Guards the speed of a step without a clock: operations, allocations, reads by the host.

Times are measured in benchmarks/; here a change that adds work to every step fails at once, on any
machine. The bounds are the counted numbers or a little above; raise one only for a reason.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as td
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from clsa.learning.optim import build_optimizer
from clsa.loading.crops import Crops
from clsa.loading.loader import batches
from clsa.loading.order import Order
from clsa.methods import build_method
from clsa.methods.method import Extent
from clsa.options.config import merge
from clsa.options.run import DataOptions
from clsa.pictures.opening import open_source
from clsa.pictures.sources import Pictures, Source
from clsa.recipes import resolve
from clsa.runs.computing import begin
from clsa.runs.folder import RunFolder
from clsa.runs.state import State
from clsa.system import dist
from clsa.system.signals import Stop
from clsa.training.health import LOOK_EVERY, Health
from clsa.training.step import Run, make_views, parallel, train_step
from clsa.views import rng
from tests.support.pictures import jpeg_folder

SIZE = 16
CPU = torch.device("cpu")
# Operators for whose result the host has to wait on a GPU.
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "equal",
    "is_nonzero", "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount",
}  # fmt: skip
READS = (
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__",
    "__complex__", "__contains__",
)  # fmt: skip


class Seen(TorchDispatchMode):
    """Counts operators; records those that wait, and the number of elements of new storages."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.waiting: list[str] = []
        self.allocated: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.ops[name] += 1
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        masks = name.startswith(("index", "_index")) and any(x.dtype == torch.bool for x in given)
        if name in WAITING or (
            masks and name.split(".")[0] in ("index", "index_put", "index_put_")
        ):
            self.waiting.append(name)
        known = {x.untyped_storage()._cdata for x in given}
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                self.allocated.append(x.numel())
        return out


@contextlib.contextmanager
def reads() -> Iterator[Counter[str]]:
    """Counts how often the host reads numbers from a tensor, for each function that does so."""
    seen: Counter[str] = Counter()
    inside = [0]

    def spy(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **keywords: Any) -> Any:
            seen[name] += not inside[0]  # one function may call another
            inside[0] += 1
            try:
                return plain(*args, **keywords)
            finally:
                inside[0] -= 1

        return asked

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            if hasattr(Tensor, name):
                patch.setattr(Tensor, name, spy(name, getattr(Tensor, name)))
        yield seen


class Trainer:
    """Steps of a tiny `clsa-small` on random pixels."""

    def __init__(self, out: Path, batch: int, recipe: str = "clsa-small", **over: Any):
        five = (SIZE,) * 5
        views: dict[str, Any] = {"size": SIZE, "weak": {"sizes": (SIZE,), "blur": 0.5}}
        views = merge(views, {"weak": {"sizes": five}} if "multi" in recipe else {})
        strong = five if "multi" in recipe else (SIZE,)
        tiny = {
            "recipe": recipe,
            "batch_size": batch,
            "precision": "fp32",
            "views": views,
            "strong": {"sizes": strong},
            "model": {"projector_hidden": 32, "projector_dim": 16, "norm_groups": 2},
            "method": {"queue_size": 200},
        }
        self.options = resolve(merge(tiny, over))
        self.method = build_method(self.options, Extent(100 * batch, 0, 100, 2000))
        optimizer = build_optimizer(self.method, self.options.optim)
        self.state = State(self.method, optimizer, "", RunFolder(out))
        self.run = Run(self.options, CPU, 100, Stop(), begin(self.options, CPU))
        self.model = parallel(self.method, self.options)
        self.share = batch // dist.world_size()

    def crops(self) -> Crops:
        generator = torch.Generator().manual_seed(self.state.step)
        shape, views = (self.share, 3, SIZE, SIZE), len(self.method.view_specs)
        index = torch.arange(self.share) + self.share * dist.rank()
        crops = [
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).contiguous(
                memory_format=torch.channels_last
            )
            for _ in range(views)
        ]
        return Crops(crops, index, torch.full((self.share,), -1), index)

    def step(self) -> None:
        train_step(self.model, self.state, self.crops(), self.run)


def operations(out: Path, batch: int, recipe: str) -> Counter[str]:
    """Operators of the second step, without the making of its random crops."""
    trainer = Trainer(out, batch, recipe)
    trainer.step()  # the optimiser makes its state
    crops = trainer.crops()
    with Seen() as seen:
        train_step(trainer.model, trainer.state, crops, trainer.run)
    return seen.ops


def test_the_operations_of_a_step_do_not_grow_with_the_batch(tmp_path: Path) -> None:
    """From 256 pictures on every strong operation is drawn in each round; the bank is one tile."""
    some, more = (operations(tmp_path, batch, "clsa-small") for batch in (256, 512))
    assert some == more
    assert some.total() <= 3000


def test_eleven_views_cost_operations_in_proportion(tmp_path: Path) -> None:
    assert operations(tmp_path, 64, "clsa-multi-small").total() <= 12_500


def test_the_counters_see_every_operation_that_waits() -> None:
    x = torch.arange(6.0)
    acts: dict[str, Callable[[], object]] = {
        "item": lambda: x[0].item(),
        "float": lambda: float(x[0]),
        "int": lambda: int(x[0]),
        "bool": lambda: bool(x[0] > 1),
        "tolist": lambda: x.tolist(),
        "numpy": lambda: x.numpy(),
        "asarray": lambda: np.asarray(x),
        "cpu": lambda: x.cpu(),
        "in": lambda: 3 in x,
        "mask": lambda: x[x > 2],
        "put": lambda: x.clone().__setitem__(x > 2, torch.ones(3)),
        "nonzero": lambda: x.nonzero(),
        "where": lambda: torch.where(x > 2),
        "unique": lambda: x.unique(),
        "equal": lambda: torch.equal(x, x + 1),
        "select": lambda: x.masked_select(x > 2),
    }
    for name, act in acts.items():
        with reads() as told, Seen() as seen:
            act()
        assert told.total() or seen.waiting, name
    with reads() as told, Seen() as seen:
        torch.where(x > 2, x, -x).index_select(0, torch.tensor([1, 2]))[torch.tensor([0])].sum()
    assert not told and not seen.waiting


@pytest.mark.parametrize("recipe", ["clsa-small", "moco-v2-small", "clsa-multi-small"])
def test_the_host_reads_the_device_once_in_a_step(recipe: str, tmp_path: Path) -> None:
    """`agree` calls `tolist` once; `numpy` is called on index, labels and draws, on the CPU."""
    trainer = Trainer(tmp_path, 8, recipe)
    trainer.step()
    crops = trainer.crops()
    with reads() as told, Seen() as seen:
        train_step(trainer.model, trainer.state, crops, trainer.run)
    assert told == {"tolist": 1, "numpy": 3}
    assert seen.waiting == []


def test_a_number_that_is_not_finite_costs_no_further_read(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, 8)
    crops = trainer.crops()
    with reads() as told:
        stats = train_step(trainer.model, trainer.state, crops, trainer.run)
    assert told == {"tolist": 1, "numpy": 3}
    with reads() as told:
        stats.numbers()
    assert told == {"__float__": len(stats.terms)}


@pytest.mark.parametrize("recipe", ["clsa-small", "swav-small"])
def test_a_look_of_health_reads_the_device_once(recipe: str, tmp_path: Path) -> None:
    """It calls `cpu` once; what judges after that gets no other tensor of the device."""
    trainer = Trainer(tmp_path, 8, recipe)
    health = Health(trainer.method, 10, 0, LOOK_EVERY - 1, watches=True)
    crops, judged = trainer.crops(), []
    with reads() as told, Seen() as seen:
        train_step(trainer.model, trainer.state, crops, trainer.run)
    assert told == {"tolist": 1, "numpy": 3} and not seen.waiting  # the hook reads nothing
    judge = health._judge
    health._judge = lambda gathered, shape: judged.append((gathered, shape)) or []
    with reads() as told, Seen() as seen:
        health.after(1.0, 1.0, is_bad=False)
    assert told == {"cpu": 1} and not seen.waiting
    ((gathered, shape),) = judged
    assert judge(gathered, shape) == [] and health.numbers["spread"] > 0


def resident() -> tuple[Source, DataOptions]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 20, 24, 3), dtype=np.uint8)
    return Pictures(pixels, np.full(40, -1, np.int64), []), DataOptions()


def streamed(root: Path) -> tuple[Source, DataOptions]:
    jpeg_folder(root, [(20, 24)] * 40)
    options = DataOptions(workers=0, resident_limit=1e-9)
    return open_source(str(root), "train", options), options


SEEDS = {"resident": 5, "streamed": 6}  # permutations are cached: each kind needs its own seed


@pytest.mark.parametrize("kind", SEEDS)
def test_views_are_drawn_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view draws twice in a step, for its box and for its pixels, each for the whole batch."""
    source, options = resident() if kind == "resident" else streamed(tmp_path / "pictures")
    trainer, drawn = Trainer(tmp_path, 8), Counter[int]()
    plain = rng.hash_bits

    def counted(seed: int, epoch: int, index: Any, view: int, slots: Any) -> Any:
        drawn[view] += 1
        return plain(seed, epoch, index, view, slots)

    monkeypatch.setattr(rng, "hash_bits", counted)
    order, specs = Order(len(source), 8, seed=SEEDS[kind]), trainer.method.view_specs
    for crops in batches(source, specs, order, 0, 3, CPU, options):
        train_step(trainer.model, trainer.state, crops, trainer.run)
    views = {spec.view: 2 * 3 for spec in specs}
    assert drawn == {**views, rng.PERMUTATION: 3, rng.ORDER: 1}


@pytest.mark.parametrize(("view", "most"), [("weak0", 10), ("strong0", 14)])
def test_pixels_are_copied_no_more_often_than_needed(view: str, most: int, tmp_path: Path) -> None:
    """Counts allocations of at least a whole batch of pictures while one view is made."""
    batch = 64
    trainer = Trainer(tmp_path, batch)
    crops = trainer.crops()
    places = [place for place, spec in enumerate(trainer.method.view_specs) if spec.name == view]
    specs = [trainer.method.view_specs[place] for place in places]
    few = crops._replace(crops=[crops.crops[place] for place in places])
    with Seen() as seen:
        make_views(few, specs, 0, trainer.run)
    whole = [numel for numel in seen.allocated if numel >= batch * 3 * SIZE * SIZE]
    assert 0 < len(whole) <= most
    assert max(seen.allocated) <= 1.6 * batch * 3 * SIZE * SIZE


def _exchange(rank: int, rendezvous: str, out: str) -> None:
    """Run one of two ranks; save the collectives of its third step, those for gradients included.

    The second step is skipped: in it DistributedDataParallel agrees once on the gradients' order.
    """
    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    trainer = Trainer(Path(out), 8)
    assert isinstance(trainer.model, DistributedDataParallel)
    assert not trainer.model.broadcast_buffers
    trainer.step()
    trainer.step()
    crops = trainer.crops()
    with torch.profiler.profile(record_shapes=True) as profile:
        train_step(trainer.model, trainer.state, crops, trainer.run)
    calls = [
        (event.key.removeprefix("gloo:"), event.input_shapes[0])
        for event in profile.events()
        if event.key.startswith("gloo:")
    ]
    weights = sum(p.numel() for p in trainer.method.parameters() if p.requires_grad)
    torch.save((calls, weights), f"{out}/calls{rank}")
    td.destroy_process_group()


def test_ranks_exchange_key_views_keys_gradients_and_a_flag(tmp_path: Path) -> None:
    """Nothing else: no bank, buffer or weight is sent in a step."""
    spawn(_exchange, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        calls, weights = torch.load(tmp_path / f"calls{rank}", weights_only=True)
        assert calls[:2] == [("all_to_all", [4, 3, SIZE, SIZE]), ("all_gather", [4, 16])]
        assert {kind for kind, _ in calls[2:]} == {"all_reduce"} and len(calls) <= 5
        flags = ["a bad number", "a stop", "loss", "norm of the gradient"]
        assert sum(numel for _, (numel,) in calls[2:]) == weights + len(flags)
