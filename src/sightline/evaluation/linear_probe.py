"""A linear classifier on frozen features: logistic regression, and the field's sweep of SGD."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sightline.datasets.order import epoch_order
from sightline.evaluation.protocol import Judged, Labelled, wilson

STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""Inverse strengths C of the penalty that are tried, from strong to weak."""

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""Learning rates that are tried, for a batch of 256 (DINOv2's sweep, arXiv 2304.07193, appendix B.3)."""

BATCH, UPDATES = 128, 2_000

HELD_OUT = 0.2
"""The share of the training part by which the penalty and the rate are chosen."""


class Linear(NamedTuple):
    """Classifiers side by side: weights [settings, width + 1, classes], the bias in the last row."""

    mean: Float64[Tensor, " d"]
    spread: Float64[Tensor, " d"]
    weights: Float[Tensor, "settings e classes"]

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "settings n classes"]:
        """The logits of each classifier."""
        x = (features.double() - self.mean) / self.spread
        return x.to(self.weights.dtype) @ self.weights[:, :-1] + self.weights[:, -1:]


def logistic(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    classes: int,
    strengths: Sequence[float],
    *,
    standardise: bool = True,
) -> Linear:
    """Logistic regression for each C of `strengths`: the sum of cross-entropies plus the squared weights over 2 C.

    The bias is not penalised, as in scikit-learn, whose solution this is. L-BFGS in float64, each from the solution
    before it.
    """
    mean, spread = _moments(features, standardise)
    x, count = (features.double() - mean) / spread, len(labels)
    weights = torch.zeros(x.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    found = []
    for strength in strengths:
        optimizer = torch.optim.LBFGS(
            [weights], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()  # noqa: B023  (called within this turn)
            fit = F.cross_entropy(x @ weights[:-1] + weights[-1], labels.long())
            value = fit + weights[:-1].square().sum() / (2 * strength * count)  # noqa: B023
            value.backward()
            return value

        optimizer.step(loss)
        found.append(weights.detach().clone())
    return Linear(mean, spread, torch.stack(found))


def sgd(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, rates: Sequence[float], seed: int
) -> Linear:
    """SGD with momentum 0.9, no decay and a cosine to zero, for all `rates` at a time (DINO's and DINOv2's protocol).

    `UPDATES` batches of `BATCH` images, in an order that follows from the seed; features are standardised, so that the
    rates mean the same for every network.
    """
    mean, spread = _moments(features, True)
    x = ((features.double() - mean) / spread).float()
    steps = torch.tensor(rates, dtype=torch.float32)[:, None, None] * min(BATCH, len(x)) / 256
    weights = torch.randn(x.shape[1] + 1, classes, generator=torch.Generator().manual_seed(seed)) * 0.01
    weights[-1] = 0
    weights = weights.repeat(len(rates), 1, 1)
    momentum, size = torch.zeros_like(weights), min(BATCH, len(x))
    each = len(x) // size
    for update in range(UPDATES):
        epoch, turn = divmod(update, each)
        chosen = torch.tensor(epoch_order(len(x), seed, epoch)[turn * size : (turn + 1) * size])
        batch = F.pad(x[chosen], (0, 1), value=1.0)
        errors = (batch @ weights).softmax(dim=2) - F.one_hot(labels[chosen].long(), classes)
        momentum = 0.9 * momentum + batch.T @ errors / size
        weights = weights - steps * 0.5 * (1 + np.cos(np.pi * update / UPDATES)) * momentum
    return Linear(mean, spread, weights)


def linear(train: Labelled, test: Labelled, classes: int, shots: Sequence[int], seed: int) -> Judged:
    """The share of images that the best linear classifier on the training part's features tells apart.

    Penalty, rate and kind (logistic regression or SGD) are chosen by a fifth of the training part, drawn by `seed`, and
    the classifier is then taught on all of it; the images that it is judged by choose nothing.
    """
    rows = _held_out(train.labels, classes, seed)
    kept, asked = train.vectors[~rows], train.vectors[rows]
    kinds = {
        "logistic": (STRENGTHS, lambda x, y, values: logistic(x, y, classes, values)),
        "sgd": (RATES, lambda x, y, values: sgd(x, y, classes, values, seed)),
    }
    metrics, details, shares = {}, {}, {}
    for name, (values, fit) in kinds.items():
        guesses = fit(kept, train.labels[~rows], values)(asked).argmax(dim=2) if len(asked) else None
        tried = (
            [0.0] * len(values) if guesses is None else (guesses == train.labels[rows]).double().mean(dim=1).tolist()
        )
        best = int(np.argmax(tried)) if guesses is not None else len(values) // 2
        answers = fit(train.vectors, train.labels, (values[best],))(test.vectors)[0].argmax(dim=1)
        metrics[f"linear_{name}_top1"] = test.share(int((answers == test.labels).sum()))
        details[name], shares[name] = {"chosen": values[best], "held_out": tried[best]}, tried[best]
    chosen = max(shares, key=lambda name: shares[name])
    metrics = {"linear_top1": metrics[f"linear_{chosen}_top1"], **metrics}
    count = len(test.labels) + test.refused
    return Judged(
        metrics, {name: wilson(share, count) for name, share in metrics.items()}, {"chosen": chosen, **details}
    )


def _moments(features: Float[Tensor, "n d"], standardise: bool) -> tuple[Float64[Tensor, " d"], Float64[Tensor, " d"]]:
    exact = features.double()
    if not standardise:
        return torch.zeros_like(exact[0]), torch.ones_like(exact[0])
    return exact.mean(dim=0), exact.std(dim=0, correction=0) + 1e-5


def _held_out(labels: Int[Tensor, " n"], classes: int, seed: int) -> Tensor:
    """Which images of the training part choose: a share of each class, none of a class with a single image."""
    random, chosen = np.random.default_rng(seed), torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        rows = random.permutation(np.flatnonzero(labels.numpy() == label))
        if len(rows) > 1:
            chosen[rows[: max(int(len(rows) * HELD_OUT + 0.5), 1)]] = True
    return chosen


PROTOCOLS = {"linear": linear}
