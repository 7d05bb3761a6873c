"""Weighted nearest neighbours against values by hand and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from sightline.errors import UserError
from sightline.evaluation import knn
from sightline.evaluation.knn import knn_accuracy, neighbour_votes


def drawn(count: int, seed: int, width: int = 7, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds, one for each class."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(count, width, generator=random), labels


def test_votes_by_hand():
    known = torch.tensor([[3.0, 0.0], [0.0, 0.5], [6.0, 8.0]])  # cosines to (1, 0): 1, 0, 0.6
    ((start, votes),) = neighbour_votes(
        known, torch.tensor([2, 0, 0]), torch.tensor([[2.0, 0.0]]), k=2, temperature=0.5
    )
    assert start == 0
    assert votes.tolist() == [pytest.approx([np.exp(-0.8), 0, 1])]


@pytest.mark.parametrize("k", [1, 11, 20])
def test_as_sklearn_votes(k):
    train, test = drawn(311, 1), drawn(1500, 2)
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    theirs.fit(*(x.double().numpy() for x in train))
    assert knn_accuracy(*train, *test, k=k) == pytest.approx(
        theirs.score(*(x.double().numpy() for x in test)), abs=1e-9
    )


def test_temperature_counts():
    train, test = drawn(311, 1), drawn(500, 2)
    assert knn_accuracy(*train, *test, temperature=0.01) != knn_accuracy(*train, *test, temperature=10)


def test_blocks_and_lengths_change_nothing(monkeypatch):
    train, test = drawn(100, 1), drawn(97, 2)
    whole = knn_accuracy(*train, *test)
    monkeypatch.setattr(knn, "BLOCK", 13)
    scaled = train[0] * torch.rand(100, 1).add(0.1)
    assert knn_accuracy(scaled.numpy(), train[1].numpy(), test[0].numpy() * 3, test[1].numpy()) == whole


def test_fewer_images_than_neighbours_all_vote():
    train = torch.eye(3), torch.arange(3)
    assert knn_accuracy(*train, *train, k=20) == 1


def test_nobody_votes_on_himself(monkeypatch):
    monkeypatch.setattr(knn, "BLOCK", 2)
    points, labels = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 1, 2, 3])
    blocks = list(neighbour_votes(points, labels, points, k=1, temperature=1.0, themselves=True))
    assert [start for start, _ in blocks] == [0, 2]
    assert torch.cat([votes for _, votes in blocks]).argmax(dim=1).tolist() == [1, 0, 3, 2]


def test_refusals():
    points, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(UserError, match="neighbours must be positive, not 0"):
        knn_accuracy(points, labels, points, labels, k=0)
    with pytest.raises(UserError, match="temperature"):
        knn_accuracy(points, labels, points, labels, temperature=0.0)
    with pytest.raises(UserError, match="images to know"):
        knn_accuracy(points[:0], labels[:0], points, labels)
