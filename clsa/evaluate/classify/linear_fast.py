"""A linear probe that takes seconds: SGD on features extracted once, at several rates together."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from clsa.evaluate.classify.linear import rate_at, within
from clsa.evaluate.features.split import CHOICE_SLOT, hold_out
from clsa.evaluate.results.heads import layer_of, new_layer
from clsa.evaluate.results.records import Found, accuracies_of, findings
from clsa.options.cards import LinearFastCard
from clsa.views import rng

Labelled = tuple[Float[Tensor, "n F"], Int64[Tensor, "n"]]


def linear_fast(
    bank: Labelled, queries: Labelled, num_classes: int, card: LinearFastCard, seed: int
) -> tuple[list[Found], nn.Linear]:
    """Accuracies after the last epoch, and the trained layer.

    This is the linear probe without augmentation. A rate that suits the features of one network can
    be a hundred times one that suits another's, so a published rate also judges the norm of the
    features. Here each rate trains on four fifths of the bank. The rate that is most accurate on
    the other fifth (of equals the first, by default the smallest) then trains on the whole bank.
    The choice uses no picture of `queries`.

    Args:
        bank, queries: features and labels.
        card: schedule and rates.
        seed: of the held-out fifth, the layers and the order.
    """
    features, labels = bank
    kept, held = (torch.from_numpy(rows) for rows in hold_out(len(labels), seed, CHOICE_SLOT))
    kept, held = kept.to(labels.device), held.to(labels.device)
    weights, biases = fit((features[kept], labels[kept]), num_classes, card.rates, card, seed)
    scores = torch.einsum("nf,rcf->rnc", features[held], weights) + biases[:, None]
    right = (scores.argmax(2) == labels[held]).double().mean(1)
    right = right.where(scores.isfinite().all(2).all(1), -1.0)  # never a rate that diverged
    best = card.rates[int(right.argmax())]
    weights, biases = fit(bank, num_classes, (best,), card, seed)
    layer = layer_of(weights[0], biases[0]).to(labels.device)
    with torch.no_grad():
        found = accuracies_of(layer(queries[0]), queries[1])
    return findings(found, "last", card.epochs), layer


def fit(
    bank: Labelled, num_classes: int, rates: tuple[float, ...], card: LinearFastCard, seed: int
) -> tuple[Float[Tensor, "R C F"], Float[Tensor, "R C"]]:
    """Weights and biases of softmax regression by SGD, one set per rate, from the same batches."""
    features, labels = bank
    first = new_layer(features.shape[1], num_classes, seed).to(features.device)
    weights = torch.stack([first.weight.detach()] * len(rates))
    biases = torch.stack([first.bias.detach()] * len(rates))
    moving = [torch.zeros_like(weights), torch.zeros_like(biases)]
    batch_size = within(card.batch_size, len(labels))
    for epoch in range(card.epochs):
        order = torch.from_numpy(rng.permutation(seed, epoch, len(labels))).to(labels.device)
        lr = torch.tensor([rate_at(epoch, rate, card) for rate in rates], device=labels.device)
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
            x, y = features[rows], labels[rows]
            residual = (torch.einsum("bf,rcf->rbc", x, weights) + biases[:, None]).softmax(2)
            residual -= F.one_hot(y, num_classes)
            residual /= batch_size
            gradients = [torch.einsum("rbc,bf->rcf", residual, x), residual.sum(1)]
            for value, gradient, velocity in zip((weights, biases), gradients, moving, strict=True):
                gradient += card.weight_decay * value
                velocity.mul_(card.momentum).add_(gradient)
                value -= lr.view(-1, *[1] * (value.ndim - 1)) * velocity
    return weights, biases
