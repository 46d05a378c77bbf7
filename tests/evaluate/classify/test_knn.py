import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from clsa.evaluate.classify import knn as module
from clsa.evaluate.classify.knn import knn, knn_predict, nearest_of
from clsa.evaluate.results.records import accuracies_of
from clsa.options.protocols import CARDS
from clsa.system.errors import ClsaError


def at_similarities(*similarities: float) -> Tensor:
    """Rows with these cosine similarities to (1, 0), of various lengths."""
    rows = [(s, math.sqrt(1 - s * s)) for s in similarities]
    return torch.tensor(rows) * torch.arange(1, len(rows) + 1)[:, None]


def blobs(seed: int, count: int, num_classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    centres = torch.randn(num_classes, 16, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(count, 16, generator=generator), labels


QUERY = torch.tensor([[2.0, 0.0]])


def test_weighted_votes_follow_the_nearest_row_and_plain_votes_the_majority() -> None:
    bank, labels = at_similarities(0.9, 0.8, 0.8), torch.tensor([0, 1, 1])
    weighted = knn_predict(QUERY, bank, labels, 2, 3, 0.07)[0] * math.exp(0.9 / 0.07)
    torch.testing.assert_close(
        weighted, torch.tensor([383500.0, 183800.0]).double(), rtol=1e-3, atol=0
    )
    plain = knn_predict(QUERY, bank, labels, 2, 3, weighted=False)[0]
    assert plain.argmax() == 1 and plain.ceil().tolist() == [1, 2]


def test_plain_ties_go_to_the_smaller_summed_distance_then_to_the_smaller_class() -> None:
    bank, labels = at_similarities(0.9, 0.5, 0.8, 0.7), torch.tensor([0, 0, 1, 1])
    assert knn_predict(QUERY, bank, labels, 2, 4, weighted=False).argmax() == 1
    same = QUERY.repeat(4, 1)
    assert knn_predict(QUERY, same, torch.tensor([2, 1, 2, 1]), 3, 4, weighted=False).argmax() == 1
    assert knn_predict(QUERY, same, torch.tensor([2, 1, 2, 1]), 3, 4).argmax() == 1


def test_a_distant_majority_still_outvotes_a_near_minority() -> None:
    bank = torch.tensor([[-1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert knn_predict(QUERY, bank, torch.tensor([0, 0, 1]), 2, 3, weighted=False).argmax() == 0


@pytest.mark.parametrize("neighbours", [1, 2, 7, 20])
def test_equals_scikit_learn(neighbours: int) -> None:
    (bank, labels), (queries, _) = blobs(1, 400, 5), blobs(2, 100, 5)
    arguments: dict[str, Any] = {
        "n_neighbors": neighbours,
        "algorithm": "brute",
        "metric": "cosine",
    }
    plain = KNeighborsClassifier(**arguments).fit(bank.numpy(), labels.numpy())
    votes = knn_predict(queries, bank, labels, 5, neighbours, weighted=False).ceil()
    np.testing.assert_allclose(votes / neighbours, plain.predict_proba(queries.numpy()), atol=1e-9)
    arguments["weights"] = lambda distance: np.exp(-distance / 0.07)
    weigh = KNeighborsClassifier(**arguments)
    shares = knn_predict(queries, bank, labels, 5, neighbours)
    shares /= shares.sum(1, keepdim=True)
    expected = weigh.fit(bank.numpy(), labels.numpy()).predict_proba(queries.numpy())
    np.testing.assert_allclose(shares, expected, atol=1e-4)


def test_limits_of_neighbours_and_temperature() -> None:
    (bank, labels), (queries, _) = blobs(1, 101, 3), blobs(2, 50, 3)
    unit = torch.nn.functional.normalize
    nearest = labels[(unit(queries) @ unit(bank).T).argmax(1)]
    for weighted in (True, False):
        one = knn_predict(queries, bank, labels, 3, 1, weighted=weighted).argmax(1)
        assert torch.equal(one, nearest)
    cold = knn_predict(queries, bank, labels, 3, 20, temperature=1e-5).argmax(1)
    assert torch.equal(cold, nearest)
    every = knn_predict(queries, bank, labels, 3, 1000, weighted=False)
    assert every.argmax(1).tolist() == [labels.bincount().argmax().item()] * 50
    hot = knn_predict(queries, bank, labels, 3, 20, temperature=1e6)
    counts = knn_predict(queries, bank, labels, 3, 20, weighted=False).ceil()
    torch.testing.assert_close(hot, counts, atol=1e-3, rtol=0)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    (bank, labels), (queries, _) = blobs(1, 101, 3), blobs(2, 50, 3)
    whole = knn_predict(queries, bank, labels, 3)
    monkeypatch.setattr(module, "MAX_SIMILARITIES", 7 * 101)
    torch.testing.assert_close(knn_predict(queries, bank, labels, 3), whole, rtol=1e-5, atol=1e-7)


def test_measures_in_percent() -> None:
    bank, queries = blobs(1, 400, 3), blobs(2, 100, 3)
    found = {one.metric: one.value for one in knn(bank, queries, 3, CARDS["knn-20"])}
    assert set(found) == {"top1", "balanced", "top1-plain"}
    assert all(50 < value <= 100 for value in found.values())


def test_of_pictures_equally_near_the_first_ones_vote() -> None:
    bank = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]])
    labels = torch.tensor([2, 1, 1, 0, 0, 0, 3])
    for count, winner in ((1, 2), (3, 1), (6, 0)):
        for weighted in (True, False):
            scores = knn_predict(QUERY, bank, labels, 4, count, weighted=weighted)
            assert scores.argmax(1).item() == winner
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randint(0, 5, (40, 30), generator=generator).float()
    values, places = nearest_of(similarity, 7)
    wanted = similarity.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, wanted.values[:, :7])
    assert torch.equal(places.sort(1).values, wanted.indices[:, :7].sort(1).values)


def test_of_equal_scores_the_first_classes_are_the_top_five() -> None:
    scores = torch.zeros(12, 12)
    scores[:, 7] = 1.0
    found = accuracies_of(scores, torch.arange(12))
    assert found["top5"] == pytest.approx(100 * 5 / 12)  # 7, then 0, 1, 2, 3
    with pytest.raises(ClsaError, match="diverged"):
        accuracies_of(torch.full((4, 6), torch.nan), torch.arange(4))
