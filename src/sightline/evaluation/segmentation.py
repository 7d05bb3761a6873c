"""How well pixels got their classes: one confusion matrix over all of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Integer, UInt8
from torch import Tensor

from sightline.errors import UserError, printable
from sightline.evaluation.measure import Measure
from sightline.heads.segment import IGNORE, classes_at
from sightline.images.preprocess import Preprocess
from sightline.types import Batch

WORST = 12
"""Images that are remembered as the worst."""


class Masks(ABC):
    """The true masks of a set of images."""

    @abstractmethod
    def truth(self, image: int | str) -> UInt8[np.ndarray, "h w"]:
        """The mask of an image, by its number in the set or its name. Raises UserError where it cannot be read."""


class PixelCounts(Measure):
    """`confusion[i, j]` counts pixels of class i that were called j, at the size of the original images.

    Pixels of the class `IGNORE` do not count. Images that could not be read are missed wholly: their pixels count as
    called nothing (the last column), where their mask can be read. `worst` are the images with the smallest share of
    right pixels, as (share, number), the worst first.
    """

    def __init__(self, classes: int, masks: Masks, preprocess: Preprocess):
        self.classes, self.masks, self.preprocess = classes, masks, preprocess
        self.confusion = np.zeros((classes, classes + 1), dtype=np.int64)
        self.refused: list[tuple[str, str]] = []
        self.images = 0
        self.worst: list[tuple[float, int]] = []

    def take(self, output: Float[Tensor, "b k h w"], batch: Batch) -> None:
        for row, index in enumerate(batch.index.tolist()):
            maps = output[row].float()
            if batch.sizes is not None:
                height, width = batch.sizes[row].tolist()
                maps = maps[:, :height, :width]
            truth = self.masks.truth(index)
            called = classes_at(maps, self.preprocess.placement(*truth.shape)).cpu().numpy()
            counts = confusion(truth, called, self.classes)
            self.confusion[:, :-1] += counts
            self.images += 1
            self._remember([(float(np.trace(counts) / max(counts.sum(), 1)), index)])

    def _remember(self, more: Iterable[tuple[float, int]]) -> None:
        self.worst = sorted([*self.worst, *more])[:WORST]

    def merge(self, others: Iterable["PixelCounts"]) -> "PixelCounts":
        for other in others:
            self.confusion += other.confusion
            self.images += other.images
            self.refused.extend(other.refused)
            self._remember(other.worst)
        return self

    @property
    def evaluated(self) -> int:
        return self.images

    def _whole(self) -> Int64[np.ndarray, "k called"]:
        """The counts with the pixels of images that could not be read, as called nothing."""
        whole = self.confusion.copy()
        for name, _ in self.refused:
            try:
                truth = self.masks.truth(name)
            except UserError:
                continue  # it is the mask that cannot be read
            whole[:, -1] += np.bincount(truth[truth != IGNORE], minlength=self.classes)
        return whole

    def metrics(self) -> dict[str, float]:
        whole = self._whole()
        iou = intersection_over_union(whole)
        known = ~np.isnan(iou)
        return {
            "miou": float(iou[known].mean()) if known.any() else 0.0,
            "pixel_accuracy": float(np.trace(whole) / max(whole.sum(), 1)),
        }

    def headline(self) -> str:
        metrics = self.metrics()
        return f"mIoU {metrics['miou']:.2%}  pixel accuracy {metrics['pixel_accuracy']:.2%}"

    def per_class(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """For each class: its share of the pixels, its IoU (None where it is nowhere), how much of it was found."""
        whole = self._whole()
        iou, there = intersection_over_union(whole), whole.sum(axis=1)
        return [
            {
                "label": label,
                "share": float(there[i] / max(there.sum(), 1)),
                "iou": None if np.isnan(iou[i]) else float(iou[i]),
                "recall": float(whole[i, i] / there[i]) if there[i] else None,
            }
            for i, label in enumerate(labels)
        ]

    def lines(self, labels: Sequence[str]) -> list[str]:
        rows = [f"{'class':24} {'pixels':>8} {'IoU':>8} {'recall':>8}"]
        for row in self.per_class(labels):
            iou, recall = (f"{row[key]:8.1%}" if row[key] is not None else f"{'none':>8}" for key in ("iou", "recall"))
            rows.append(f"{printable(row['label'], 24):24} {row['share']:8.1%} {iou} {recall}")
        return rows

    def details(self, labels: Sequence[str]) -> Mapping[str, Any]:
        rows = self.per_class(labels)
        return {"labels": list(labels), "per_class": rows, "confusion": self.confusion[:, :-1].tolist()}


def confusion(
    truth: UInt8[np.ndarray, "h w"], called: Integer[np.ndarray, "h w"], classes: int
) -> Int64[np.ndarray, "k k"]:
    """Pixels of each class (rows) by what they were called (columns); those of the class `IGNORE` are left out."""
    real = truth != IGNORE
    pairs = truth[real].astype(np.int64) * classes + called[real]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def intersection_over_union(counts: Int64[np.ndarray, "k called"]) -> Float[np.ndarray, " k"]:
    """Of each class, of a confusion matrix over a whole set; NaN for classes that are neither there nor called."""
    hits = np.diag(counts)
    union = counts.sum(axis=1) + counts[:, : len(counts)].sum(axis=0) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)
