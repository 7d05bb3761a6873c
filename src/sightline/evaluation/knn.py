"""How well images are known by their nearest neighbours: the cheapest judge of features."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sightline.evaluation.protocol import Judged, Labelled, wilson
from sightline.schema import require

BLOCK = 1024
"""Images that are compared with all known ones at a time."""


def knn_accuracy(
    train_features: Float[Any, "n d"],
    train_labels: Int[Any, " n"],
    test_features: Float[Any, "m d"],
    test_labels: Int[Any, " m"],
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """The share of test images, 0 to 1, that their `k` nearest training images call by their name (DINO's protocol).

    Neighbours are the nearest by cosine, all of them where there are fewer than `k`; each votes for its class with the
    weight exp(cosine / temperature); of classes with equal votes the first wins (arXiv 2104.14294, section 4.1, and
    1805.01978, section 3.4). Features and class indices are tensors or arrays, and stay on their device. Raises
    UserError where there is nothing to compare, and for a `k` or a temperature that is not positive.
    """
    known, asked = (torch.as_tensor(features).float() for features in (train_features, test_features))
    labels, wanted = (torch.as_tensor(classes).to(known.device) for classes in (train_labels, test_labels))
    require(len(known) > 0 and len(asked) > 0, "nearest neighbours need images to know and images to ask for")
    right = 0
    for start, votes in neighbour_votes(known, labels, asked, k=k, temperature=temperature):
        right += int((votes.argmax(dim=1) == wanted[start : start + len(votes)]).sum())
    return right / len(asked)


def neighbour_votes(
    known: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    asked: Float[Tensor, "m d"],
    *,
    k: int,
    temperature: float,
    themselves: bool = False,
) -> Iterator[tuple[int, Float[Tensor, "block classes"]]]:
    """The votes of the nearest known images for each class, in blocks: the first image of the block, and its votes.

    A vote weighs exp((cosine - 1) / temperature), which is 1 for an equal image. With `themselves` the images asked
    for are the known ones, and none has a vote on itself. Raises UserError for a `k` or a temperature that is not
    positive.
    """
    require(k > 0, f"the number of neighbours must be positive, not {k}")
    require(temperature > 0, f"the temperature of the votes must be positive, not {temperature}")
    known, asked = F.normalize(known, dim=1), F.normalize(asked, dim=1)
    classes, nearest = int(labels.max()) + 1, min(k, len(known) - themselves)
    for start in range(0, len(asked), BLOCK):
        alike = asked[start : start + BLOCK] @ known.T
        if themselves:
            alike.diagonal(offset=start).fill_(-torch.inf)
        cosine, near = alike.topk(nearest, dim=1)
        votes = torch.zeros(len(alike), classes, dtype=torch.float64, device=alike.device)
        votes.scatter_add_(1, labels[near].long(), ((cosine - 1).double() / temperature).exp())
        yield start, votes


def knn(train: Labelled, test: Labelled, classes: int, shots: Sequence[int], seed: int) -> Judged:
    """DINO's protocol on a training part and a part to judge by; `shots` and `seed` change nothing."""
    right = knn_accuracy(train.vectors, train.labels, test.vectors, test.labels) * len(test.labels)
    share = test.share(right)
    interval = wilson(share, len(test.labels) + test.refused)
    return Judged({"knn_top1": share}, {"knn_top1": interval}, {"k": 20, "temperature": 0.07})


PROTOCOLS = {"knn": knn}
