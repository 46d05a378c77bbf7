"""Nearest neighbours: a picture gets the class of the most similar training pictures."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from clsa.evaluate.results.records import Found, accuracies_of, findings
from clsa.options.cards import KnnCard

MAX_SIMILARITIES = 1 << 26


@torch.no_grad()
def knn_predict(
    queries: Float[Tensor, "n F"],
    bank: Float[Tensor, "N F"],
    labels: Int64[Tensor, "N"],
    num_classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
    weighted: bool = True,
) -> Float[Tensor, "n C"]:
    """Scores of every class from the K nearest rows of the bank, by cosine similarity.

    Weighted (InstDisc): score_c = sum over neighbours j of class c of exp((s_j - s_1) / T), where
    s_1 is the similarity of the nearest neighbour; InstDisc's own scores, without s_1, are these
    times exp(s_1 / T). Plain: the number of neighbours of class c; if two classes have the same
    number, the one with the smaller summed distance 1 - s wins, then the one with the smaller
    number. The prediction is `argmax` of a row, the first of equals. If several pictures are as
    near as the K-th one, the first of them in the bank vote.

    Args:
        queries, bank: features of any length.
        neighbours: K, at least 1; all N rows when there are fewer.
        temperature: T > 0.

    Returns:
        Scores, float64.
    """
    neighbours = min(neighbours, len(bank))
    bank = F.normalize(bank, dim=1)
    scores = []
    for chunk in F.normalize(queries, dim=1).split(max(1, MAX_SIMILARITIES // len(bank))):
        similarity, nearest = nearest_of(chunk @ bank.T, neighbours)
        similarity = similarity.double()
        if weighted:
            votes = ((similarity - similarity[:, :1]) / temperature).exp()
        else:  # distances sum to at most 2 K, so they only break ties
            votes = 1 - (1 - similarity).clamp(0, 2) / (2 * neighbours + 1)
        empty = votes.new_zeros(len(chunk), num_classes)
        scores.append(empty.scatter_add_(1, labels[nearest], votes))
    return torch.cat(scores)


def nearest_of(
    similarity: Float[Tensor, "n N"], count: int
) -> tuple[Float[Tensor, "n K"], Int64[Tensor, "n K"]]:
    """The `count` highest similarities of each row and their columns; the first ones of equals.

    `topk` may take any of several equal values, so rows with a tie at the last place are sorted.
    """
    values, places = similarity.topk(count, dim=1)
    last = values[:, -1:]
    unsure = ((similarity == last).sum(1) > (values == last).sum(1)).nonzero()[:, 0]
    if len(unsure):
        sorted_ = similarity[unsure].sort(dim=1, descending=True, stable=True)
        values[unsure], places[unsure] = sorted_.values[:, :count], sorted_.indices[:, :count]
    return values, places


def knn(
    bank: tuple[Float[Tensor, "N F"], Int64[Tensor, "N"]],
    queries: tuple[Float[Tensor, "n F"], Int64[Tensor, "n"]],
    num_classes: int,
    card: KnnCard,
) -> list[Found]:
    """Accuracies of weighted votes, and the accuracy `top1-plain` of plain votes.

    Args:
        bank, queries: features and labels.
    """
    features, labels = queries
    weighted, plain = (
        knn_predict(features, *bank, num_classes, card.neighbours, card.temperature, each)
        for each in (True, False)
    )
    found = accuracies_of(weighted, labels)
    return findings(found | {"top1-plain": accuracies_of(plain, labels)["top1"]})
