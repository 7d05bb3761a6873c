"""How often a classifier is right, by every count that a person would ask for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.errors import printable
from sightline.evaluation.measure import Measure, weigh
from sightline.types import Batch

WORST = 12
"""Wrong answers that are remembered."""


@dataclass
class Accuracy(Measure):
    """Counts over a labelled set; sums of parts are the counts of the whole.

    `confusion[i, j]` counts images of class i that were called j. Images that could not be read are `refused`: they
    stand in the denominator of every metric, as answers that were not given. `mistakes` are the worst wrong answers,
    as (score of the wrong class, index of the image, the wrong class), the surest first.
    """

    classes: int
    confusion: np.ndarray = field(init=False)
    top5: int = 0
    loss: float = 0.0
    loss_squares: float = 0.0
    refused: list[tuple[str, str]] = field(default_factory=list)
    mistakes: list[tuple[float, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.confusion = np.zeros((self.classes, self.classes), dtype=np.int64)

    def add(self, logits: Float[Tensor, "b k"], targets: Int[Tensor, " b"], index: Int[Tensor, " b"]) -> None:
        """Counts one batch; `index` says which images they are."""
        logits, targets = logits.float().cpu(), targets.cpu()
        scores, called = logits.softmax(dim=1).max(dim=1)
        np.add.at(self.confusion, (targets.numpy(), called.numpy()), 1)
        wrong = (called != targets).nonzero()[:, 0].tolist()
        self._keep_worst([(float(scores[i]), int(index[i]), int(called[i])) for i in wrong])
        best = logits.topk(min(5, self.classes), dim=1).indices
        self.top5 += int((best == targets[:, None]).sum())
        losses = nn.functional.cross_entropy(logits, targets, reduction="none").double()
        self.loss, self.loss_squares = self.loss + float(losses.sum()), self.loss_squares + float(losses.square().sum())

    def take(self, output: Float[Tensor, "b k"], batch: Batch) -> None:
        self.add(output, batch.targets, batch.index)

    def merge(self, others: Iterable["Accuracy"]) -> "Accuracy":
        """The counts of this part and others together."""
        for other in others:
            self.confusion += other.confusion
            self.top5, self.loss = self.top5 + other.top5, self.loss + other.loss
            self.loss_squares += other.loss_squares
            self.refused.extend(other.refused)
            self._keep_worst(other.mistakes)
        return self

    def _keep_worst(self, more: list[tuple[float, int, int]]) -> None:
        self.mistakes = sorted([*self.mistakes, *more], reverse=True)[:WORST]

    @property
    def evaluated(self) -> int:
        return int(self.confusion.sum())

    def metrics(self) -> dict[str, float]:
        """`top1` and `top5` as fractions of all images, and the mean cross-entropy of those that could be read."""
        total = self.evaluated + len(self.refused)
        return {
            "top1": float(np.trace(self.confusion)) / total if total else 0.0,
            "top5": self.top5 / total if total else 0.0,
            "loss": self.loss / max(self.evaluated, 1),
        }

    def told(self) -> dict[str, float]:
        return {"balanced": self.balanced(), "commonest": self.commonest(), "loss_error": self.loss_error()}

    def headline(self) -> str:
        metrics = self.metrics()
        return f"top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}"

    def lines(self, labels: Sequence[str]) -> list[str]:
        rows = [f"{'class':24} {'images':>7} {'recall':>8} {'precision':>10} {'F1':>8}"]
        for row in self.per_class(labels):
            label = printable(row["label"], 24)
            rows.append(f"{label:24} {row['images']:7,} {row['recall']:8.1%} {row['precision']:10.1%} {row['f1']:8.1%}")
        return rows

    def details(self, labels: Sequence[str]) -> Mapping[str, Any]:
        rows = [dict(row) for row in self.per_class(labels)]
        return {"labels": list(labels), "per_class": rows, "confusion": self.confusion.tolist()}

    def balanced(self) -> float:
        """The mean over classes of the share of their images that were recognised; classes without images do not count.

        A classifier that does not look gets 1 / classes, however unlike the classes are in size.
        """
        actual = self.confusion.sum(1)
        return float((np.diag(self.confusion)[actual > 0] / actual[actual > 0]).mean()) if actual.any() else 0.0

    def commonest(self) -> float:
        """The share of the answers that are one class, the most frequent one."""
        return float(self.confusion.sum(0).max()) / max(self.evaluated, 1)

    def loss_error(self) -> float:
        """The standard error of the mean cross-entropy."""
        count = max(self.evaluated, 1)
        return (max(self.loss_squares / count - (self.loss / count) ** 2, 0.0) / count) ** 0.5

    def per_class(self, labels: Sequence[str]) -> list[dict[str, float | int | str]]:
        """For each class: images, recall, precision and F1, fractions between 0 and 1."""
        hits, actual, called = np.diag(self.confusion), self.confusion.sum(1), self.confusion.sum(0)
        recall, precision = hits / np.maximum(actual, 1), hits / np.maximum(called, 1)
        f1 = 2 * hits / np.maximum(actual + called, 1)
        return [
            {"label": label, "images": int(n), "recall": float(r), "precision": float(p), "f1": float(f)}
            for label, n, r, p, f in zip(labels, actual, recall, precision, f1, strict=True)
        ]


def accuracy(
    network: nn.Module,
    batches: Iterable,
    classes: int,
    *,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    heed: Callable[[], None] = lambda: None,
) -> Accuracy:
    """The counts of a classifier over batches of (step, Batch, refused); see `weigh`."""
    return weigh(network, batches, Accuracy(classes), device=device, precision=precision, heed=heed)
