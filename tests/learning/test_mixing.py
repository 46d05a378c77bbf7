import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.learning.losses import info_nce, streams
from clsa.learning.mixture_loss import mixed_contrast
from clsa.options.wrappers import MixtureOptions
from clsa.views.mixing import Mixture, beta_quantile, boxed, draw, mix

INDEX = torch.arange(20_000)


def uniform_grid(count: int = 20_001) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)


def test_shares_of_alpha_one_are_uniform_and_of_alpha_two_follow_their_polynomial() -> None:
    u = uniform_grid()
    torch.testing.assert_close(beta_quantile(u, 1.0), u, atol=1e-12, rtol=0)
    x = beta_quantile(u, 2.0)
    torch.testing.assert_close(3 * x**2 - 2 * x**3, u, atol=1e-6, rtol=0)
    half = beta_quantile(u, 0.5)  # the arcsine law
    torch.testing.assert_close(2 / math.pi * half.sqrt().asin(), u, atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 1.5, 2.0, 2.5, 30.0, 2000.0])
def test_shares_have_the_variance_of_beta_are_symmetric_and_rise(alpha: float) -> None:
    u = uniform_grid()
    x = beta_quantile(u, alpha)
    assert x[0] == 0 or alpha > 100
    assert (x.diff() >= 0).all() and x.isfinite().all()
    torch.testing.assert_close(x + x.flip(0), torch.ones_like(x), atol=1e-9, rtol=0)
    middle = beta_quantile((u[1:] + u[:-1]) / 2, alpha)
    assert middle.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=2e-3)


def box_by_loops(share: float, centre: tuple[float, float], size: int) -> set[tuple[int, int]]:
    """Pixels of CutMix's box, one by one."""
    half = size * math.sqrt(1 - share) / 2
    spans = []
    for place in centre:
        low, high = max(0.0, place * size - half), min(float(size), place * size + half)
        spans.append(range(round(low), round(high)))
    return {(y, x) for y in spans[0] for x in spans[1]}


def test_a_box_of_16_in_32_leaves_three_quarters() -> None:
    share, box = boxed(torch.tensor([0.75]).double(), torch.full((1, 2), 0.5).double(), 32)
    assert share.item() == 0.75
    assert box.tolist() == [[0.25, 0.25, 0.75, 0.75]]
    images, partners = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    mixed = mix(images, partners, Mixture(share.float(), box.float()))
    assert mixed[0, 0].sum() == 256 and mixed[0, :, 8:24, 8:24].min() == 1


def test_boxes_equal_the_slow_ones_are_clipped_and_the_share_follows() -> None:
    shares = torch.tensor([0.3, 0.5, 0.9, 0.02, 1.0]).double()
    centres = torch.tensor([[0.0, 0.0], [0.9, 0.2], [0.31, 0.77], [0.5, 0.45], [0.3, 0.3]]).double()
    left, box = boxed(shares, centres, 30)
    images, partners = torch.zeros(5, 3, 30, 30), torch.ones(5, 3, 30, 30)
    mixed = mix(images, partners, Mixture(left.float(), box.float()))
    for row in range(5):
        pixels = box_by_loops(shares[row].item(), tuple(centres[row].tolist()), 30)
        assert {tuple(p) for p in mixed[row, 0].nonzero().tolist()} == pixels
        assert left[row].item() == pytest.approx(1 - len(pixels) / 900)
    assert left[0] > 0.3 and left[4] == 1  # a corner was cut off; nothing was pasted


def test_every_resolution_has_the_same_box_and_lambda_is_that_of_the_largest() -> None:
    mixture = draw(MixtureOptions(), 224, seed=0, step=3, index=INDEX[:50])
    areas = {}
    for size in (224, 112, 160):
        images, partners = torch.zeros(50, 3, size, size), torch.ones(50, 3, size, size)
        inside = mix(images, partners, mixture)[:, 0]
        areas[size] = inside.mean((1, 2))
        assert mixture.box is not None
        for row in range(50):
            edges = (mixture.box[row] * size).tolist()
            found = inside[row].nonzero()
            if len(found):
                low, high = found.min(0).values.tolist(), (found.max(0).values + 1).tolist()
                assert max(abs(a - b) for a, b in zip([*low, *high], edges, strict=True)) <= 0.51
    torch.testing.assert_close(1 - areas[224], mixture.share, atol=1e-6, rtol=0)
    assert (areas[160] - areas[224]).abs().max() < 0.01


def test_mixtures_are_drawn_by_the_counter_and_follow_beta() -> None:
    options = MixtureOptions(mixing="mixup", alpha=0.2)
    first = draw(options, 32, 0, 7, INDEX)
    assert first.box is None
    assert torch.equal(first.share, draw(options, 32, 0, 7, INDEX).share)
    assert torch.equal(first.share[5:9], draw(options, 32, 0, 7, INDEX[5:9]).share)
    for seed, step in ((1, 7), (0, 8)):
        assert not torch.equal(first.share, draw(options, 32, seed, step, INDEX).share)
    assert first.share.mean().item() == pytest.approx(0.5, abs=0.01)
    assert first.share.var().item() == pytest.approx(1 / 5.6, abs=0.005)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, share = x.flip(0), first.share[:4, None, None, None]
    mixed = mix(x, y, first.part(0, 4))
    torch.testing.assert_close(mixed, share * x + (1 - share) * y)
    none = draw(MixtureOptions(mixing="none"), 32, 0, 7, INDEX[:3])
    assert none.share.tolist() == [0.5] * 3


def rows_of(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)))


def slow_mixed(
    queries: list[Tensor], weights: list[float], own: list[Tensor], partners: list[Tensor],
    rest: Tensor, share: Tensor, positive: Tensor, own_only: bool,
) -> float:  # fmt: skip
    """The equation in loops, in float64."""
    total = 0.0
    for query, weight in zip(queries, weights, strict=True):
        for first, second in zip(own, partners, strict=True):
            for i, q in enumerate(query.double()):
                for part, keys in ((share[i].item(), first), (1 - share[i].item(), second)):
                    seen = [keys[positive[i]]] if own_only else list(keys)
                    logits = [float(q @ k.double()) / 0.2 for k in [*seen, *rest]]
                    nce = math.log(sum(map(math.exp, logits)))
                    nce -= float(q @ keys[positive[i]].double()) / 0.2
                    total += weight * part * nce / len(query)
    return total


@pytest.mark.parametrize("own_only", [True, False])
def test_the_mixed_contrast_equals_the_equation(own_only: bool) -> None:
    queries = [rows_of(4, seed) for seed in range(2)]
    own, partners = [rows_of(6, 5), rows_of(6, 6)], [rows_of(6, 7), rows_of(6, 8)]
    rest, share = rows_of(9, 9), torch.tensor([0.1, 0.5, 1.0, 0.0])
    positive = torch.tensor([2, 3, 4, 5])  # the second of two processes
    candidates = positive[:, None] == torch.arange(6) if own_only else None
    found = mixed_contrast(
        streams(queries, rest, 0.2), [0.5, 2.0], own, partners, share, positive, candidates
    )
    wanted = slow_mixed(queries, [0.5, 2.0], own, partners, rest, share, positive, own_only)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_lambda_one_is_the_plain_contrast_and_the_loss_is_linear_in_lambda() -> None:
    query = rows_of(4, 0).requires_grad_()
    keys, others, rest, own = rows_of(4, 1), rows_of(4, 2), rows_of(9, 3), torch.arange(4)

    def at(share: float) -> Tensor:
        stream = streams([query], rest, 0.2)
        return mixed_contrast(stream, [1.0], [keys], [others], torch.full((4,), share), own, None)

    plain = info_nce(query, torch.cat([keys, rest]), own, 0.2)
    torch.testing.assert_close(at(1.0), plain)
    torch.testing.assert_close(at(0.0), info_nce(query, torch.cat([others, rest]), own, 0.2))
    torch.testing.assert_close(at(0.3), 0.3 * at(1.0) + 0.7 * at(0.0))
    (grad,) = torch.autograd.grad(at(1.0), query)
    (wanted,) = torch.autograd.grad(plain, query)
    torch.testing.assert_close(grad, wanted)


def test_quantiles_are_float64() -> None:
    u = torch.from_numpy(np.random.default_rng(0).uniform(size=100))
    assert beta_quantile(u, 2.0).dtype == torch.float64
