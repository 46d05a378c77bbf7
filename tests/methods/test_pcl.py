import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa.learning.clustering import Clusters
from clsa.learning.losses import info_nce
from clsa.learning.models import Network
from clsa.methods.method import Extent
from clsa.methods.pcl import PCL
from clsa.options.run import RunOptions
from clsa.runs import digests
from clsa.system.errors import ClsaError
from clsa.views import rng
from tests.support.contract import batch_of, train

EXTENT = Extent(num_pictures=60, num_classes=3, steps_per_epoch=3, num_steps=12)


def build(seed: int = 0, **method: Any) -> PCL:
    values = {
        "batch_size": 8,
        "seed": seed,
        "views": {"size": 16, "weak": {"sizes": method.pop("sizes", (16,)), "blur": 0.0}},
        "model": {
            "encoder": "resnet10-w32",
            "projector_hidden": 32,
            "projector_dim": 16,
            "norm_groups": 2,
        },
        "method": {
            "name": "pcl", "queue_size": 12, "key_momentum": 0.9, "num_clusters": (5, 6),
            "warmup_epochs": 0, "num_negatives": 2, **method,
        },
    }  # fmt: skip
    return PCL(RunOptions.parse(values, "test"), EXTENT)


def embed(network: Network) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return F.normalize(torch.randn(60, network.dim, generator=generator))


def clusterings(method: PCL) -> list[Clusters]:
    return [clusters for clusters in method.clusterings if isinstance(clusters, Clusters)]


def prototype_loss(method: PCL, queries: list[Tensor], index: Tensor, step: int) -> float:
    """The equation written as loops in float64."""
    total = 0.0
    for number, clusters in enumerate(clusterings(method)):
        count = len(clusters.centroids)
        own = [int(clusters.assignment[i]) for i in index]
        draws = rng.uniforms(
            method.seed, step, torch.arange(count), rng.NEGATIVES, torch.tensor([number])
        )[:, 0].tolist()
        others = sorted((c for c in range(count) if c not in own), key=lambda c: draws[c])
        chosen = sorted(set(own)) + others[: method.options.num_negatives]
        for query in queries:
            for q, mine in zip(query.double(), own, strict=True):
                logits = {
                    c: float(q @ clusters.centroids[c].double()) / float(clusters.concentrations[c])
                    for c in chosen
                }
                lse = math.log(sum(math.exp(value) for value in logits.values()))
                total += (lse - logits[mine]) / (len(query) * len(clusterings(method)))
    return total


@pytest.mark.parametrize("num_negatives", [1, 2, 100])
@pytest.mark.parametrize("sizes", [(16,), (16, 16)])
def test_losses_equal_the_equations(num_negatives: int, sizes: tuple[int, ...]) -> None:
    method = build(num_negatives=num_negatives, sizes=sizes)
    method.before_epoch(0, embed)
    batch = batch_of(method, 1)
    output = method(batch)
    (comparison,) = output.comparisons
    queries = [stream.query.detach() for stream in comparison.queries]  # pyright: ignore
    wanted = prototype_loss(method, queries, batch.index, 1)
    assert output.losses["prototypes"].item() == pytest.approx(wanted, rel=1e-5)
    bank = torch.cat([output.state, method.queue.rows])
    own_only = torch.eye(8, dtype=torch.bool)
    terms = [info_nce(query, bank, torch.arange(8), 0.2, own_only) for query in queries]
    torch.testing.assert_close(output.losses["contrast"].detach(), torch.stack(terms).sum())


def test_gradient_of_the_prototype_term_equals_autograd_of_the_dense_one() -> None:
    method = build(num_negatives=100)
    method.before_epoch(0, embed)
    batch = batch_of(method, 0)
    loss = method(batch).losses["prototypes"]
    got = torch.autograd.grad(loss, list(method.network.parameters()))
    query = method.network(batch.views[1])
    dense = [
        F.cross_entropy(query @ c.centroids.T / c.concentrations, c.assignment[batch.index])
        for c in clusterings(method)
    ]
    wanted = torch.autograd.grad(torch.stack(dense).mean(), list(method.network.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_warm_up_has_the_contrast_alone_and_clusters_nothing() -> None:
    method = build(warmup_epochs=2)
    first = digests.digest(method.clusterings.state_dict())
    for epoch in range(2):
        method.before_epoch(epoch, lambda network: pytest.fail("nothing to embed"))
    assert digests.digest(method.clusterings.state_dict()) == first
    assert set(method(batch_of(method, 5)).losses) == {"contrast"}  # the last step of epoch 1
    method.before_epoch(2, embed)
    assert digests.digest(method.clusterings.state_dict()) != first
    assert set(method(batch_of(method, 6)).losses) == {"contrast", "prototypes"}


def test_each_epoch_and_clustering_has_its_own_seed_and_the_key_network_is_embedded() -> None:
    method, seen = build(num_clusters=(5, 5)), []

    def watched(network: Network) -> Tensor:
        seen.append(network)
        return embed(network)

    method.before_epoch(0, watched)
    assert seen == [method.key_network]
    first, second = (clusters.centroids.clone() for clusters in clusterings(method))
    assert not torch.equal(first, second)
    method.before_epoch(1, embed)
    assert not torch.equal(clusterings(method)[0].centroids, first)
    again = build(num_clusters=(5, 5))
    again.before_epoch(0, embed)
    assert torch.equal(clusterings(again)[0].centroids, first)


def test_resuming_within_an_epoch_keeps_its_clusters() -> None:
    straight = build()
    straight.before_epoch(0, embed)
    train(straight, 1)
    resumed = build(seed=1)
    resumed.seed = straight.seed
    resumed.load_state_dict(straight.state_dict())
    for step in (1, 2):
        train(straight, 1, step)
        train(resumed, 1, step)
    assert digests.digest(straight.state_dict()) == digests.digest(resumed.state_dict())


def test_positives_are_not_in_the_queue_before_they_were_used() -> None:
    method = build()
    state = method(batch_of(method)).state
    assert not any(torch.equal(key, row) for key in state for row in method.queue.rows)
    method.after_step(state, 0)
    assert torch.equal(method.queue.rows[:8], state)


def test_more_clusters_than_pictures_can_fill_are_refused() -> None:
    with pytest.raises(ClsaError, match="num_clusters 7"):
        build(num_clusters=(5, 7))
