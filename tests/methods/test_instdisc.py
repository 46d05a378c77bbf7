import math

import pytest
import torch
from torch import Tensor

from clsa.learning.losses import Stream
from clsa.methods.instdisc import InstDisc
from tests.support import reference, reference_memory
from tests.support.contract import EXTENT, ROWS, batch_of, tiny

COUNT, TEMPERATURE = 6, 0.07


def build(**over: object) -> InstDisc:
    method = {"num_negatives": COUNT, "temperature": TEMPERATURE, **over}
    return InstDisc(tiny("instdisc", method=method), EXTENT).eval()


def queries(method: InstDisc, step: int = 0) -> Tensor:
    with torch.no_grad():
        return method.network(batch_of(method, step).views[0]).double()


def test_one_view_is_seen() -> None:
    assert [spec.name for spec in build().view_specs] == ["weak0"]


def test_first_loss_equals_a_loop_with_the_normaliser_of_the_batch() -> None:
    method = build()
    batch = batch_of(method)
    bank, _, _ = method.memory.compare(batch.index, COUNT, method.seed, 0)
    rows = queries(method), bank[:ROWS], bank[ROWS:]
    total = reference_memory.normalizer(*rows, EXTENT.num_pictures, TEMPERATURE)
    wanted = reference_memory.noise_contrastive(*rows, total, EXTENT.num_pictures, TEMPERATURE)
    output = method(batch)
    assert output.losses["contrast"].item() == pytest.approx(wanted, rel=1e-5)
    assert output.state[2].item() == pytest.approx(math.log(total), abs=1e-5)


def test_normaliser_is_kept_after_the_first_step_and_never_again() -> None:
    method = build()
    output = method(batch_of(method))
    first = output.state[2].clone()
    assert method.log_normalizer == pytest.approx(math.log(EXTENT.num_pictures))
    method.after_step(output.state, 0)
    assert torch.equal(method.log_normalizer, first)
    for step in (1, 2):
        batch = batch_of(method, step)
        bank, _, _ = method.memory.compare(batch.index, COUNT, method.seed, step)
        wanted = reference_memory.noise_contrastive(
            queries(method, step),
            bank[:ROWS],
            bank[ROWS:],
            math.exp(first.item()),
            EXTENT.num_pictures,
            TEMPERATURE,
        )
        output = method(batch)
        assert output.losses["contrast"].item() == pytest.approx(wanted, rel=1e-4)
        method.after_step(output.state, step)
        assert torch.equal(method.log_normalizer, first)


def test_chance_is_the_loss_when_rows_and_noise_are_equally_likely() -> None:
    method = {"num_negatives": 4096, "temperature": TEMPERATURE}
    options = tiny("instdisc", method=method, model={"projector_dim": 128})
    landmarks = InstDisc(options, EXTENT).landmarks
    assert landmarks.chance == pytest.approx(9.317888, abs=1e-6)
    assert 1.0 < landmarks.floor < 1.01, "the noise alone costs m ln(1 + 1/m)"
    assert build(num_negatives=0).landmarks.chance == pytest.approx(math.log(EXTENT.num_pictures))


def test_without_negatives_it_is_the_softmax_over_all_rows() -> None:
    method = build(num_negatives=0)
    batch = batch_of(method, 1)
    output = method(batch)
    rows = queries(method, 1)
    wanted = reference.info_nce(rows, method.memory.rows, batch.index, TEMPERATURE)
    assert output.losses["contrast"].item() == pytest.approx(wanted, rel=1e-5)
    (comparison,) = output.comparisons
    assert comparison.bank is method.memory.rows and comparison.candidates is None
    assert comparison.positive is not None and torch.equal(comparison.positive, batch.index)


@pytest.mark.parametrize("count", [0, COUNT])
def test_step_moves_rows_by_the_place_in_the_data_set_and_no_others(count: int) -> None:
    method = build(num_negatives=count)
    before, batch = method.memory.rows.clone(), batch_of(method, 2)
    assert batch.index[0] == 2 * ROWS, "places in the data set, not in the batch"
    output = method(batch)
    assert torch.equal(method.memory.rows, before)
    method.after_step(output.state, 2)
    others = torch.ones(EXTENT.num_pictures, dtype=torch.bool)
    others[batch.index] = False
    assert torch.equal(method.memory.rows[others], before[others])
    for place, feature in zip(batch.index, queries(method, 2), strict=True):
        wanted = torch.tensor(reference_memory.moved(before[place], feature, 0.5)).float()
        torch.testing.assert_close(method.memory.rows[place], wanted, atol=1e-6, rtol=1e-5)


def test_strong_views_are_compared_with_the_own_row_and_the_same_drawn_rows() -> None:
    method = build()
    batch = batch_of(method)
    (comparison,) = method(batch).comparisons
    bank, _, _ = method.memory.compare(batch.index, COUNT, method.seed, 0)
    assert torch.equal(comparison.bank, bank)
    assert comparison.candidates is not None
    assert torch.equal(comparison.candidates, torch.eye(ROWS, dtype=torch.bool))
    (stream,) = comparison.queries
    assert isinstance(stream, Stream) and torch.equal(
        stream.query, method.query(batch.views[0], batch)
    )


def test_several_views_are_averaged() -> None:
    options = tiny("instdisc", views={"weak": {"sizes": (16,)}})
    method, alone = InstDisc(options, EXTENT).eval(), InstDisc(tiny("instdisc"), EXTENT).eval()
    for each in (method, alone):
        each.log_normalizer.fill_(5.0)
    batch = batch_of(method, 1)
    output = method(batch)
    apart = [alone(batch._replace(views=[view])) for view in batch.views]
    mean = sum(each.losses["contrast"].item() for each in apart) / 2
    assert output.losses["contrast"].item() == pytest.approx(mean, rel=1e-6)
    torch.testing.assert_close(output.state[1], (apart[0].state[1] + apart[1].state[1]) / 2)
