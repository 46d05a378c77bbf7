"""SimCLR's loss and the bank of each direction."""

import math

import pytest
import torch

from clsa.methods.simclr import SimCLR
from clsa.system.errors import ClsaError
from tests.support import reference
from tests.support.contract import EXTENT, batch_of, tiny


def build(temperature: float = 0.1) -> SimCLR:
    return SimCLR(tiny("simclr", method={"temperature": temperature}), EXTENT)


def test_loss_equals_the_float64_loop_over_both_views() -> None:
    method = build(0.3).eval()
    batch = batch_of(method)
    first, second = (method.network(view).detach() for view in batch.views)
    wanted = reference.nt_xent(first, second, 0.3)
    assert method(batch).losses["contrast"].item() == pytest.approx(wanted, abs=1e-5)


def test_chance_is_the_log_of_all_other_rows_and_a_constant_network_is_there() -> None:
    method = build().eval()
    assert method.landmarks.chance == pytest.approx(math.log(15))
    batch = batch_of(method)
    same = [view[:1].expand_as(view).contiguous() for view in batch.views[:1] * 2]
    loss = method(batch._replace(views=same)).losses["contrast"]
    assert loss.item() == pytest.approx(math.log(15), abs=1e-5)


def test_each_view_is_compared_with_all_rows_but_itself() -> None:
    """methods 3.3: bank_i = all b and a_j, j != i; the positive is b_i; then a and b swapped."""
    method = build()
    output = method(batch_of(method))
    first, second = (comparison.queries[0] for comparison in output.comparisons)
    for comparison, own, other in zip(
        output.comparisons, (first, second), (second, first), strict=True
    ):
        candidates, positive = comparison.candidates, comparison.positive
        assert candidates is not None and positive is not None
        assert isinstance(own, torch.Tensor) and isinstance(other, torch.Tensor)
        for row in range(8):
            seen = comparison.bank[candidates[row]]
            wanted = torch.cat([other, own[:row], own[row + 1 :]]).detach()
            assert torch.equal(seen, wanted)
            assert torch.equal(comparison.bank[positive[row]], other[row])


def test_other_numbers_of_views_are_refused_and_not_paired_wrongly() -> None:
    with pytest.raises(ClsaError, match="takes 2 weak views"):
        SimCLR(tiny("simclr", views={"weak": {"sizes": (16, 16)}}), EXTENT)
