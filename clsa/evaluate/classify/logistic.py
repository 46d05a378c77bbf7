"""Logistic regression on features extracted once."""

import math

import torch
import torch.nn.functional as functional
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from clsa.evaluate.features.split import CHOICE_SLOT, hold_out
from clsa.evaluate.results.heads import layer_of
from clsa.evaluate.results.records import Found, accuracies_of, findings
from clsa.options.cards import LogisticCard

MAX_STEPS = 1000
CHUNK = 1 << 15


def logistic(
    bank: tuple[Float[Tensor, "N F"], Int64[Tensor, "N"]],
    queries: tuple[Float[Tensor, "n F"], Int64[Tensor, "n"]],
    num_classes: int,
    card: LogisticCard,
    seed: int,
) -> tuple[list[Found], nn.Linear]:
    """Accuracies of logistic regression on standardised features, and a layer for plain features.

    The L2 weights of the card's grid are tried in order, from the largest down, until the
    cross-entropy on a held-out fifth of the bank no longer falls. The best one is then used to fit
    the whole bank. The choice uses no picture of `queries`. Choosing by accuracy instead, over 5
    seeds of the drawings, gave weights 30 times apart and test accuracies 3.4 points apart;
    choosing by cross-entropy always gave the same weight.

    Args:
        bank, queries: features and labels.
        card: the grid of L2 weights.
        seed: of the held-out fifth.
    """
    features, labels = bank
    kept, held = (torch.from_numpy(rows) for rows in hold_out(len(labels), seed, CHOICE_SLOT))
    mean, scale = _moments(features[kept])
    train, test = (features[kept] - mean) * scale, (features[held] - mean) * scale
    weights, best, least = None, card.grid[0], math.inf
    for l2 in card.grid:
        tried = fit_logistic(train, labels[kept], num_classes, l2, weights)
        loss = functional.cross_entropy(predict_logistic(test, tried), labels[held]).item()
        if loss >= least:
            break
        weights, best, least = tried, l2, loss  # the next fit starts here
    mean, scale = _moments(features)
    weights = fit_logistic((features - mean) * scale, labels, num_classes, best, weights)
    scores = predict_logistic((queries[0] - mean) * scale, weights)
    plain = weights[:, :-1] * scale
    layer = layer_of(plain, weights[:, -1] - plain @ mean.double()).to(features.device)
    return findings(accuracies_of(scores, queries[1])), layer


def _moments(train: Float[Tensor, "N F"]) -> tuple[Float[Tensor, "F"], Float[Tensor, "F"]]:
    """Mean of each feature, and 1 over its standard deviation, or 0 if the feature is constant."""
    mean, std = train.mean(0), train.std(0, correction=0)
    return mean, torch.where(std > 1e-6 * mean.abs(), 1 / std, 0)


def fit_logistic(
    features: Float[Tensor, "n F"],
    labels: Int64[Tensor, "n"],
    num_classes: int,
    l2: float,
    start: Float64[Tensor, "C F+1"] | None = None,
    tolerance: float = 1e-4,
) -> Float64[Tensor, "C F+1"]:
    """Weights and, in the last column, biases of multinomial logistic regression.

    Minimises mean_i -log softmax(W x_i + b)[y_i] + l2/2 |W|^2 by full-batch L-BFGS in float64, so
    nothing is random. scikit-learn's C is 1 / (n l2). The search runs over U with [W b] = U P,
    where (P^T P)^-1 is the Hessian of one class at zero weights: features of deep networks are so
    correlated that a search over W itself takes 2 to 5 times as many steps.

    Args:
        start: initial weights; zeros if not given.
        tolerance: on the largest entry of the gradient with respect to U. Measured on 60,000
            pictures: 1e-5 takes 1.6 times as long and moves top-1 by 0.1 points at most.
    """
    hessian = _second_moment(features) / num_classes
    hessian.diagonal()[:-1] += l2
    root = torch.linalg.cholesky(hessian)
    precondition = torch.linalg.inv(root)
    weights = torch.zeros(num_classes, len(root), dtype=torch.float64, device=features.device)
    if start is not None:
        weights = start @ root
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=MAX_STEPS,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, gradient = _loss_and_gradient(weights @ precondition, features, labels, l2)
        weights.grad = gradient @ precondition.T
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return weights @ precondition


def _second_moment(features: Float[Tensor, "n F"]) -> Float64[Tensor, "F+1 F+1"]:
    """Mean of x x^T, where x has a 1 appended."""
    parts = (functional.pad(x.double(), (0, 1), value=1.0) for x in features.split(CHUNK))
    total = features.new_zeros(features.shape[1] + 1, features.shape[1] + 1, dtype=torch.float64)
    for x in parts:
        total.addmm_(x.T, x)
    return total / len(features)


def predict_logistic(
    features: Float[Tensor, "n F"], weights: Float64[Tensor, "C F+1"]
) -> Float64[Tensor, "n C"]:
    """Logits W x + b."""
    return features.double() @ weights[:, :-1].T + weights[:, -1]


def _loss_and_gradient(
    weights: Float64[Tensor, "C F+1"],
    features: Float[Tensor, "n F"],
    labels: Int64[Tensor, "n"],
    l2: float,
) -> tuple[Float64[Tensor, ""], Float64[Tensor, "C F+1"]]:
    """Loss and gradient, in chunks, so that a large set needs little memory for float64 copies."""
    penalised = weights.clone()
    penalised[:, -1] = 0
    loss, gradient = l2 / 2 * penalised.square().sum(), l2 * penalised
    for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        x = x.double()
        log_p = torch.log_softmax(x @ weights[:, :-1].T + weights[:, -1], dim=1)
        loss -= log_p.gather(1, y[:, None]).sum() / len(features)
        residual = log_p.exp_().scatter_add_(1, y[:, None], -torch.ones_like(log_p[:, :1]))
        residual /= len(features)
        gradient[:, :-1] += residual.T @ x
        gradient[:, -1] += residual.sum(0)
    return loss, gradient
