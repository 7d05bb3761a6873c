"""Labels that a model's features contradict: most of an image's nearest neighbours have another."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

BLOCK = 512


class Suspect(NamedTuple):
    """An image whose label is doubted: its row, its label, that of its neighbours, and how sure they are, 0 to 1."""

    row: int
    given: int
    believed: int
    score: float


def suspects(
    features: Float32[np.ndarray, "n d"],
    labels: Int64[np.ndarray, " n"],
    *,
    neighbours: int = 10,
    answers: Int64[np.ndarray, " n"] | None = None,
    least: float = 0.7,
) -> list[Suspect]:
    """The images whose label their nearest neighbours contradict, the surest first.

    The `neighbours` nearest others by cosine vote, the nearer the more, and none for itself; an image is suspect where
    another label than its own gets at least the share `least` of the votes, and its own at most half of the rest. Where
    the model's own `answers` are given, suspects to which it gives their own label come last: it may have learned them
    by heart.
    """
    count = len(features)
    nearest = min(neighbours, count - 1)
    if nearest < 3:
        return []
    units = features - features.mean(axis=0)
    units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
    found = []
    for start in range(0, count, BLOCK):
        rows = np.arange(start, min(start + BLOCK, count))
        alike = units[rows] @ units.T
        alike[np.arange(len(rows)), rows] = -np.inf
        near = np.argpartition(-alike, nearest - 1, axis=1)[:, :nearest]
        weight = np.exp((np.take_along_axis(alike, near, axis=1) - 1) / 0.1)
        votes = np.zeros((len(rows), int(labels.max()) + 1))
        np.add.at(votes, (np.arange(len(rows))[:, None], labels[near]), weight)
        votes /= np.maximum(votes.sum(axis=1, keepdims=True), 1e-300)
        believed, mine = votes.argmax(axis=1), votes[np.arange(len(rows)), labels[rows]]
        share = votes.max(axis=1)
        doubted = (believed != labels[rows]) & (share >= least) & (mine <= (1 - least) / 2)
        found += [
            Suspect(int(rows[i]), int(labels[rows[i]]), int(believed[i]), float(share[i] - mine[i]))
            for i in np.flatnonzero(doubted)
        ]
    agrees = np.zeros(count, dtype=bool) if answers is None else answers == labels
    return sorted(found, key=lambda suspect: (agrees[suspect.row], -suspect.score, suspect.row))
