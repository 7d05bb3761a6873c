"""How well objects were found: COCO's average precision, by faster-coco-eval."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from sightline.errors import UserError, printable
from sightline.evaluation.measure import Measure
from sightline.heads.detect import Detected, found, original
from sightline.images.preprocess import Preprocess
from sightline.types import Batch

WORST = 12
"""Images that are remembered as the worst."""

FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
AR = ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # areas in pixels, both ends included

Found = tuple[Int64[np.ndarray, " q"], Float32[np.ndarray, " q"], Float32[np.ndarray, "q 4"]]
"""Class indices, scores, and boxes (left, top, right, bottom) in pixels of the original image."""


class Boxes(Measure):
    """COCO's average precision and recall of boxes (cocodataset.org/#detection-eval), in pixels of the originals.

    `truth` has for every image its size, class indices, boxes, whether each is a crowd, and its area. Images that could
    not be read got no answer: all their objects are missed.
    """

    def __init__(self, classes: int, truth: Sequence[Any], names: Sequence[str], preprocess: Preprocess):
        self.classes, self.truth, self.names, self.preprocess = classes, truth, names, preprocess
        self.refused: list[tuple[str, str]] = []
        self.found: dict[int, Found] = {}
        self._summed: tuple[int, dict[str, Any]] | None = None

    def take(self, output: Detected, batch: Batch) -> None:
        scores, labels, boxes = found(output)
        for row, index in enumerate(batch.index.tolist()):
            place = self.preprocess.placement(*self.truth[index].size)
            own = original(boxes[row].cpu(), place).numpy()
            self.found[index] = (labels[row].cpu().numpy(), scores[row].cpu().numpy(), own)

    def merge(self, others: Iterable["Boxes"]) -> "Boxes":
        for other in others:
            self.found |= other.found
            self.refused.extend(other.refused)
        return self

    @property
    def evaluated(self) -> int:
        return len(self.found)

    def _figures(self) -> dict[str, Any]:
        """What COCO's evaluation says, computed once for each state of the counts."""
        state = len(self.found) + len(self.refused)
        if self._summed is None or self._summed[0] != state:
            refused = {name for name, _ in self.refused}
            images = [i for i in range(len(self.truth)) if i in self.found or self.names[i] in refused]
            self._summed = state, average_precision(self.classes, {i: self.truth[i] for i in images}, self.found)
        return self._summed[1]

    def metrics(self) -> dict[str, float]:
        figures = self._figures()
        return {name: figures[name] for name in (*FIGURES, "ar100") if name in figures}

    def headline(self) -> str:
        figures = self._figures()
        return f"AP {figures['ap']:.2%}  AP50 {figures['ap50']:.2%}  AP75 {figures['ap75']:.2%}"

    def per_class(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """For each class: its objects, AP and AP50; None where it has no object."""
        figures = self._figures()
        every = zip(labels, figures["objects"], figures["class_ap"], figures["class_ap50"], strict=True)
        return [{"label": label, "objects": n, "ap": ap, "ap50": ap50} for label, n, ap, ap50 in every]

    def lines(self, labels: Sequence[str]) -> list[str]:
        rows = [f"{'class':24} {'objects':>8} {'AP':>8} {'AP50':>8}"]
        for row in self.per_class(labels):
            shown = (f"{row[key]:8.1%}" if row[key] is not None else f"{'none':>8}" for key in ("ap", "ap50"))
            rows.append(f"{printable(row['label'], 24):24} {row['objects']:8,} {' '.join(shown)}")
        return rows

    def details(self, labels: Sequence[str]) -> Mapping[str, Any]:
        figures = self._figures()
        recall = {name: figures[name] for name in AR if name in figures}
        return {"labels": list(labels), "per_class": self.per_class(labels), "average_recall": recall}

    def worst(self) -> list[int]:
        """The images with most objects missed or made up, by boxes that overlap by half and have a score of a half."""
        wrong = {i: mistakes(self.truth[i], found) for i, found in self.found.items()}
        return [i for i in sorted(wrong, key=lambda i: (-wrong[i], i)) if wrong[i]][:WORST]


def mistakes(truth: Any, found: Found) -> int:
    """Objects that were missed, and answers with a score of at least a half that fit no object."""
    labels, scores, boxes = (part[found[1] >= 0.5] for part in found)
    open_ = [j for j in range(len(truth.labels)) if not truth.crowd[j]]
    made_up = 0
    for i in np.argsort(-scores, kind="stable"):
        fits = [j for j in open_ if truth.labels[j] == labels[i] and _iou(truth.boxes[j], boxes[i]) >= 0.5]
        if fits:
            open_.remove(max(fits, key=lambda j: _iou(truth.boxes[j], boxes[i])))
        else:
            made_up += 1
    return len(open_) + made_up


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inner = float(np.maximum(sides, 0).prod())
    return inner / max(float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - inner, 1e-9)


def average_precision(classes: int, truth: Mapping[int, Any], found: Mapping[int, Found]) -> dict[str, Any]:
    """COCO's twelve figures, and for every class its objects, AP and AP50; -1, COCO's "none", becomes 0 or None.

    Figures of a size of which there are no objects are left out. Raises UserError where faster-coco-eval
    is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise UserError('weighing detection needs faster-coco-eval: pip install "sightline[dense]"') from error
    annotations, images = [], []
    objects, absent = [0] * classes, set(SIZES)
    for i, marks in truth.items():
        images.append({"id": i, "height": marks.size[0], "width": marks.size[1]})
        for label, box, crowd, area in zip(marks.labels, marks.boxes, marks.crowd, marks.area, strict=True):
            objects[int(label)] += not crowd
            absent -= {size for size, (least, most) in SIZES.items() if not crowd and least <= area <= most}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(label),
                    "bbox": _xywh(box),
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    answers = [
        {"image_id": i, "category_id": int(label), "bbox": _xywh(box), "score": float(score)}
        for i, (labels, scores, boxes) in found.items()
        for label, score, box in zip(labels, scores, boxes, strict=True)
    ]
    told = [name for name in (*FIGURES, *AR) if name.partition("_")[2] not in absent]
    nothing: list[float | None] = [0.0 if n else None for n in objects]
    if not answers or not any(objects):
        return {**dict.fromkeys(told, 0.0), "objects": objects, "class_ap": nothing, "class_ap50": nothing}
    categories = [{"id": i, "name": str(i)} for i in range(classes)]
    whole = COCO({"images": images, "annotations": annotations, "categories": categories})
    run = COCOeval_faster(whole, whole.loadRes(answers), "bbox", print_function=lambda *words: None)
    run.evaluate()
    run.accumulate()
    run.summarize()
    figures = dict(zip((*FIGURES, *AR), (max(float(value), 0.0) for value in run.stats[:12]), strict=True))
    figures = {name: figures[name] for name in told}
    precision = run.eval["precision"]  # overlaps, recalls, classes, areas, most answers
    every = [
        [_mean(part[:, :, k]) if objects[k] else None for k in range(classes)]
        for part in (precision[:, :, :, 0, -1], precision[:1, :, :, 0, -1])
    ]
    return {**figures, "objects": objects, "class_ap": every[0], "class_ap50": every[1]}


def _mean(values: Float[np.ndarray, "overlaps recalls"]) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else 0.0


def _xywh(box: np.ndarray) -> list[float]:
    left, top, right, bottom = (float(side) for side in box)
    return [left, top, right - left, bottom - top]
