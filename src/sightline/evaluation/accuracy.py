"""How often a classifier is right, by every count that a person would ask for."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.device import free_memory, out_of_memory
from sightline.errors import WorkError
from sightline.types import Batch

WORST = 12
"""Wrong answers that are remembered."""


@dataclass
class Accuracy:
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
        """Images that got an answer."""
        return int(self.confusion.sum())

    def metrics(self) -> dict[str, float]:
        """`top1` and `top5` as fractions of all images, and the mean cross-entropy of those that could be read."""
        total = self.evaluated + len(self.refused)
        return {
            "top1": float(np.trace(self.confusion)) / total if total else 0.0,
            "top5": self.top5 / total if total else 0.0,
            "loss": self.loss / max(self.evaluated, 1),
        }

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


@torch.inference_mode()
def accuracy(
    network: nn.Module,
    batches: Iterable,
    classes: int,
    *,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    heed: Callable[[], None] = lambda: None,
) -> Accuracy:
    """The counts of a network over batches of (step, Batch, refused); the network is left in the mode it was in.

    Where memory does not suffice for a batch, it is computed in halves, and so are those after it. `heed` is called
    after every batch, and may raise to end it all. Raises WorkError where memory does not even suffice for one image.
    """
    counts, training, most = Accuracy(classes), network.training, 2**62
    network.eval()
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        for _, batch, refused in batches:
            counts.refused.extend(refused)
            if batch is not None:
                logits, most = computed(network, batch, device, most)
                counts.add(logits, batch.targets, batch.index)
            heed()
    network.train(training)
    return counts


def computed(
    compute: Callable[..., Tensor], batch: Batch, device: torch.device, most: int
) -> tuple[Float[Tensor, "b k"], int]:
    """What `compute` makes of the pixels and sizes of a batch, and how many images at a time memory sufficed for.

    It is tried with `most` first, and then with half of them, again and again. Raises WorkError where memory does not
    even suffice for one image.
    """
    count = len(batch.index)
    while True:
        size = min(most, count)
        try:
            parts = [batch.part(begin, begin + size) for begin in range(0, count, size)]
            return torch.cat([compute(part.pixels.to(device), part.sizes) for part in parts]), most
        except (RuntimeError, MemoryError) as fault:
            if not out_of_memory(fault):
                raise
        free_memory(device)
        if size == 1:
            raise WorkError("memory does not suffice to evaluate one image: take smaller images or a smaller model")
        most = size // 2
