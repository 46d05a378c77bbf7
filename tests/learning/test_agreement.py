"""Our losses compared with those of lightly 1.6, written by other people from the same papers.

If lightly's number differs from ours, the test says why and checks how the two are related:
BYOL and SimSiam share one lightly class, the mean negative cosine c of one direction: BYOL's loss
is 4 + 2 (c_a + c_b) and SimSiam's (c_a + c_b) / 2. MoCo's positive is a separate column in lightly
and a bank row here. lightly raises DINO's teacher temperature at every epoch, we at every step.
lightly's `loss` module needs no Lightning.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn as their_sinkhorn
from torch import Tensor

from clsa.learning.assignments import sharpened, similarity, sinkhorn, swapped_prediction
from clsa.learning.bank import KeyQueue, keys_with_queue
from clsa.learning.losses import info_nce
from clsa.learning.pair_losses import cosine_regression, nt_xent
from clsa.methods import build_method
from clsa.methods.dino import DINO
from clsa.methods.method import Batch, Method
from clsa.methods.swav import SwAV
from tests.support.contract import EXTENT, batch_of, tiny, train

SEEDS = [0, 1, 2]


def rows_of(*shape: int, seed: int = 0) -> Tensor:
    """Unit rows in float32, leaves with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1).requires_grad_()


def unit(rows: Tensor) -> Tensor:
    """Normalise once more, as lightly does, so that gradients are tangent to the sphere."""
    return F.normalize(rows, dim=1)


def assert_agrees(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """Value and gradients, to 1e-5."""
    torch.testing.assert_close(ours, theirs.reshape(()), atol=1e-5, rtol=1e-5)
    gradients = (
        torch.autograd.grad(loss.sum(), inputs, retain_graph=True) for loss in (ours, theirs)
    )
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def queries_of(method: Method, batch: Batch) -> list[Tensor]:
    with torch.no_grad():
        return [method.query(view, batch) for view in batch.views]


def frozen(recipe: str, **method: Any) -> Method:
    """In eval mode, so that a view's projection does not depend on how often it is computed."""
    return build_method(tiny(recipe, method=method), EXTENT).eval()


# ---- SimCLR


@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_simclr(seed: int, temperature: float) -> None:
    first, second = rows_of(16, 32, seed=seed), rows_of(16, 32, seed=seed + 10)
    theirs = NTXentLoss(temperature)(first, second)
    ours = nt_xent(unit(first), unit(second), temperature)
    assert_agrees(ours, theirs, [first, second])


def test_simclr_method() -> None:
    method = frozen("simclr", temperature=0.2)
    batch = batch_of(method)
    theirs = NTXentLoss(0.2)(*queries_of(method, batch))
    torch.testing.assert_close(method(batch).losses["contrast"], theirs, atol=1e-5, rtol=1e-5)


# ---- BYOL, SimSiam


@pytest.mark.parametrize("seed", SEEDS)
def test_regression(seed: int) -> None:
    prediction, target = rows_of(16, 32, seed=seed), rows_of(16, 32, seed=seed + 10).detach()
    theirs = 2 + 2 * NegativeCosineSimilarity()(prediction, target)
    ours = cosine_regression(unit(prediction), target)
    assert_agrees(ours, theirs, [prediction])


def test_byol_method() -> None:
    method, cosine = frozen("byol"), NegativeCosineSimilarity()
    train(method, 1)  # so that the target network differs
    batch, target = batch_of(method, 1), method.get_submodule("key_network")
    first, second = batch.views
    a, b = (method.get_submodule("predictor")(method.network.project(v)) for v in batch.views)
    theirs = 4 + 2 * (cosine(a, target(second)) + cosine(b, target(first)))
    torch.testing.assert_close(method(batch).losses["regression"], theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_simsiam_method() -> None:
    method, cosine = frozen("simsiam"), NegativeCosineSimilarity()
    batch = batch_of(method)
    projected = [method.network.project(view) for view in batch.views]
    predicted = [method.get_submodule("predictor")(rows) for rows in projected]
    theirs = (cosine(predicted[0], projected[1]) + cosine(predicted[1], projected[0])) / 2
    torch.testing.assert_close(method(batch).losses["regression"], theirs, atol=1e-5, rtol=1e-5)


# ---- MoCo


@pytest.mark.parametrize("temperature", [0.07, 0.2])
@pytest.mark.parametrize("seed", SEEDS)
def test_moco_with_a_queue(seed: int, temperature: float) -> None:
    """Step for step: both queues start equal, take the keys after use and drop the oldest first.

    The queue length is a multiple of the batch: past its end lightly drops the rest of a batch,
    while ours wraps around.
    """
    theirs, queue = NTXentLoss(temperature, (24, 16)), KeyQueue(24, 16, seed)
    theirs.memory_bank.bank = queue.rows.clone()
    for step in range(5):
        query = rows_of(8, 16, seed=100 * seed + step)
        keys = rows_of(8, 16, seed=100 * seed + step + 50).detach()
        bank, own, candidates = keys_with_queue(keys, queue, batch_negatives=False)
        ours = info_nce(unit(query), bank, own, temperature, candidates)
        assert_agrees(ours, theirs(query, keys), [query])
        queue.enqueue(keys)
        torch.testing.assert_close(queue.rows, theirs.memory_bank.bank)


def test_moco_past_the_end_of_the_queue() -> None:
    """Why the test above uses a multiple of the batch: 8 keys go into the last 4 places of 12."""
    theirs, queue = NTXentLoss(0.2, (12, 16)), KeyQueue(12, 16, 0)
    theirs.memory_bank.bank = queue.rows.clone()
    for step in range(2):
        keys = rows_of(8, 16, seed=step).detach()
        theirs(rows_of(8, 16, seed=9), keys)
        queue.enqueue(keys)
    assert torch.equal(queue.rows[:4], keys[4:]) and torch.equal(queue.rows[8:], keys[:4])
    assert torch.allclose(theirs.memory_bank.bank[8:], keys[:4])
    assert not torch.allclose(theirs.memory_bank.bank[:4], keys[4:])


# ---- SwAV


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("epsilon", [0.03, 0.05, 0.5])
def test_sinkhorn(epsilon: float, iterations: int) -> None:
    scores = similarity(rows_of(16, 32), rows_of(20, 32, seed=1)).detach()
    ours, theirs = (
        sinkhorn(scores, epsilon, iterations),
        their_sinkhorn(scores, iterations, epsilon),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_sinkhorn_where_an_exponential_overflows() -> None:
    """exp(0.9 / 0.01) is past the largest float32: lightly's codes are NaN there, ours are not."""
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    assert their_sinkhorn(scores, 3, 0.01).isnan().any()
    exact = their_sinkhorn(scores.double(), 3, 0.01).float()
    torch.testing.assert_close(sinkhorn(scores, 0.01, 3), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("queued", [0, 24])
@pytest.mark.parametrize("local", [0, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_swav(seed: int, local: int, queued: int) -> None:
    prototypes = rows_of(20, 32, seed=99)
    queries = [rows_of(16, 32, seed=seed + 10 * view) for view in range(2 + local)]
    past = [rows_of(queued, 32, seed=seed + 70 + view).detach() for view in (0, 1)]
    scores = [similarity(query, prototypes) for query in queries]
    old = [similarity(rows, prototypes) for rows in past]
    theirs = SwaVLoss()(scores[:2], scores[2:], old if queued else None)
    together = [torch.cat(pair).detach() for pair in zip(scores, old, strict=False)]
    targets = [sinkhorn(each)[:16] for each in together]
    assert_agrees(swapped_prediction(targets, scores), theirs, [*queries, prototypes])


def test_swav_method_with_its_queue() -> None:
    method = frozen("swav")
    assert isinstance(method, SwAV) and method.queue is not None
    train(method, 2)  # 16 projections of a view in 12 places
    batch = batch_of(method, 2)
    rows = method.prototypes.rows.detach()
    scores = [query @ rows.T for query in queries_of(method, batch)]
    queue = [past @ rows.T for past in method.queue.rows.chunk(2, dim=1)]
    theirs = SwaVLoss()(scores[:2], scores[2:], queue)[0]
    ours = method(batch).losses["swapped_prediction"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# ---- DINO


@pytest.mark.parametrize("local", [0, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_dino_with_its_centre_over_steps(seed: int, local: int) -> None:
    theirs, center = DINOLoss(20, teacher_temp=0.04), torch.zeros(20)
    for step in range(3):
        student = [
            similarity(rows_of(16, 8, seed=1000 * seed + 100 * step + view), rows_of(20, 8))
            for view in range(2 + local)
        ]
        taught = [each.detach().roll(1, 0) for each in student[:2]]
        targets = [sharpened(each, center, 0.04) for each in taught]
        inputs = [each.detach().requires_grad_() for each in student]
        assert_agrees(swapped_prediction(targets, inputs), theirs(taught, inputs), inputs)
        center.lerp_(torch.stack(taught).mean((0, 1)), 0.1)
        torch.testing.assert_close(theirs.center[0, 0], center, atol=1e-6, rtol=1e-5)


def test_dino_method() -> None:
    method = frozen("dino", first_teacher_temperature=0.05, teacher_temperature=0.05)
    assert isinstance(method, DINO)
    train(method, 2)
    batch, theirs = batch_of(method, 2), DINOLoss(10, teacher_temp=0.05)
    theirs.center.copy_(method.center)
    with torch.no_grad():
        rows, fixed = (F.normalize(p.rows) for p in (method.prototypes, method.teacher_prototypes))
        student = [query @ rows.T for query in queries_of(method, batch)]
        taught = [method.teacher(view) @ fixed.T for view in batch.views[:2]]
        wanted = theirs(taught, student)
    output = method(batch)
    torch.testing.assert_close(output.losses["distillation"], wanted, atol=1e-5, rtol=1e-5)
    method.after_step(output.state, 2)
    torch.testing.assert_close(method.center, theirs.center[0, 0], atol=1e-6, rtol=1e-5)


def test_dinos_temperatures_meet_where_an_epoch_begins() -> None:
    """lightly reaches the last temperature in warm-up epoch W, we after it: our W - 1 is its W."""
    theirs = DINOLoss(10, 0.04, 0.07, 4).teacher_temp_schedule
    method = frozen("dino", teacher_warmup_epochs=3.0)
    assert isinstance(method, DINO)
    ours = [method.teacher_temperature(epoch * EXTENT.steps_per_epoch) for epoch in range(4)]
    assert ours == pytest.approx(theirs.tolist())


def test_lightlys_losses_need_no_lightning() -> None:
    code = """
import sys
blocked = "lightning pytorch_lightning lightning_fabric lightning_utilities lightly_utils".split()
sys.modules.update(dict.fromkeys(blocked))
import lightly.loss
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "imported\n", done.stderr
