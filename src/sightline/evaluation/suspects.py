"""Labels that a model's features contradict: most of an image's nearest neighbours have another."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sightline.evaluation.knn import neighbour_votes


class Suspect(NamedTuple):
    """An image whose label is doubted: its row, its label, that of its neighbours, and how sure they are, 0 to 1."""

    row: int
    given: int
    believed: int
    score: float


def suspects(
    features: Float[Tensor, "n d"],
    labels: Int64[np.ndarray, " n"],
    *,
    neighbours: int = 10,
    answers: Int64[np.ndarray, " n"] | None = None,
    least: float = 0.7,
) -> list[Suspect]:
    """The images whose label their nearest neighbours contradict, the surest first.

    The `neighbours` nearest others by cosine, from the mean of all features, vote, the nearer the more, and none for
    itself; an image is suspect where another label than its own gets at least the share `least` of the votes, and its
    own at most half of the rest. Where the model's own `answers` are given, suspects to which it gives their own label
    come last: it may have learned them by heart.
    """
    if min(neighbours, len(features) - 1) < 3:
        return []
    centred, given = features - features.mean(dim=0), torch.as_tensor(labels)
    found = []
    for start, votes in neighbour_votes(centred, given, centred, k=neighbours, temperature=0.1, themselves=True):
        shares = votes / votes.sum(dim=1, keepdim=True).clamp(min=1e-300)
        share, believed = shares.max(dim=1)
        own = given[start : start + len(votes)]
        mine = shares.gather(1, own[:, None])[:, 0]
        doubted = (believed != own) & (share >= least) & (mine <= (1 - least) / 2)
        found += [
            Suspect(start + i, int(own[i]), int(believed[i]), float(share[i] - mine[i]))
            for i in doubted.nonzero()[:, 0].tolist()
        ]
    agrees = np.zeros(len(features), dtype=bool) if answers is None else answers == labels
    return sorted(found, key=lambda suspect: (agrees[suspect.row], -suspect.score, suspect.row))
