"""Classes told apart from a few examples each, by least squares in closed form."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from sightline.evaluation.protocol import Judged, Labelled, of_seeds
from sightline.schema import require

SHOTS = (1, 5, 10, 25)
"""Examples of each class, where nothing else is asked for."""

USUAL = 10
"""The number of shots whose accuracy stands for all, where several are asked for."""

SEEDS = 5
"""Choices of the examples."""

L2 = 2.0**10
SWEEP = tuple(2.0**power for power in range(-10, 20))
"""The regularisation of big_vision's recipe, and those that its predecessors tried."""

BIAS = 100.0
"""The constant column that stands for the bias: so large that the penalty on its weights is as good as none."""


class Standard(NamedTuple):
    """The mean and spread [width] by which features are standardised."""

    mean: Float64[Tensor, " d"]
    spread: Float64[Tensor, " d"]

    def __call__(self, features: Float[Tensor, "n d"]) -> Float64[Tensor, "n e"]:
        """Standardised features with the constant column behind them."""
        return F.pad((features.double() - self.mean) / self.spread, (0, 1), value=BIAS)


def choose(labels: Int[Tensor, " n"], classes: int, shots: int, seed: int) -> Int64[Tensor, " chosen"]:
    """The examples, as rows: of each class in turn the first `shots` of a permutation, or all where it has fewer.

    One generator, NumPy's default of `seed`, serves all classes, as in big_vision.
    """
    random, numbers = np.random.default_rng(seed), labels.numpy()
    chosen = [random.permutation(np.flatnonzero(numbers == label))[:shots] for label in range(classes)]
    return torch.from_numpy(np.concatenate(chosen))


def solve(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, l2: Sequence[float] = (L2,)
) -> tuple[Standard, Float64[Tensor, "penalties e classes"]]:
    """The weights that least squares to targets of ±1 finds, for each penalty `l2` on their squares.

    (X'X + l2 I) W = X'Y, where X are the features, standardised by their own mean and deviation + 1e-5, with a column
    of `BIAS` that is penalised too, in float64 (arXiv 2010.11929, section 4.1; big_vision's fewshot_lsr). One
    eigendecomposition, of X'X or of XX', whichever is smaller, serves all penalties.
    """
    exact = features.double()
    standard = Standard(exact.mean(dim=0), exact.std(dim=0, correction=0) + 1e-5)
    x, y = standard(features), 2 * F.one_hot(labels.long(), classes).double() - 1
    wide = x.shape[0] < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    penalties = torch.tensor(l2, dtype=torch.float64)[:, None, None]
    turned = vectors.T @ (y if wide else x.T @ y) / (values.clamp(min=0)[:, None] + penalties)
    return standard, (x.T @ vectors if wide else vectors) @ turned


def few_shot(train: Labelled, test: Labelled, classes: int, shots: Sequence[int], seed: int) -> Judged:
    """The share of images that a linear map from so many examples of each class tells apart, over `SEEDS` choices.

    `few_shot_top1` is the mean at the penalty `L2`; of several `shots` it speaks of `USUAL`, or else of the last. For
    each number of shots the details have every choice's share and the mean for each penalty of `SWEEP`; the best of
    these is known only from the images that it is judged by, so that it is no result.
    """
    shots = tuple(shots) or SHOTS
    require(min(shots) > 0, f"shots must be positive, not {min(shots)}")
    wanted, rows = test.labels, []
    for count in shots:
        found = []
        for choice in range(seed, seed + SEEDS):
            chosen = choose(train.labels, classes, count, choice)
            standard, weights = solve(train.vectors[chosen], train.labels[chosen], classes, (L2, *SWEEP))
            x = standard(test.vectors)
            found.append([test.share(int(((x @ one).argmax(dim=1) == wanted).sum())) for one in weights])
        each, *sweep = zip(*found, strict=True)
        mean, interval = of_seeds(each)
        rows.append(
            {
                "shots": count,
                "examples": len(chosen),
                "top1": mean,
                "interval": interval,
                "each": list(each),
                "sweep": {f"{l2:g}": sum(values) / SEEDS for l2, values in zip(SWEEP, sweep, strict=True)},
            }
        )
    main = next((row for row in rows if row["shots"] == USUAL), rows[-1])
    return Judged(
        {"few_shot_top1": main["top1"]},
        {"few_shot_top1": main["interval"]},
        {"shots": main["shots"], "seeds": list(range(seed, seed + SEEDS)), "l2": L2, "few_shot": rows},
    )


PROTOCOLS = {"few-shot": few_shot}
