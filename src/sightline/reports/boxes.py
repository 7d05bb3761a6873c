"""The page about a run that taught detection: classes, and the worst images with what is there and what was found."""

from collections.abc import Mapping
from html import escape
from typing import ClassVar

import torch

from sightline.errors import UserError, printable
from sightline.evaluation.detection import Boxes
from sightline.explanation.boxes import boxed
from sightline.explanation.render import fitted
from sightline.images.decode import decode
from sightline.reports.card import Card
from sightline.reports.report import Report, inline

PICTURE = 300
"""Longer side of the pictures, in pixels."""


class BoxesReport(Report):
    """What detection shows."""

    counts: Boxes

    figures: ClassVar[Mapping[str, str]] = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}
    short = "AP"
    card = Card(
        "object-detection",
        "An object detector",
        "boxes",
        "It finds objects of these classes and of no others",
        figures,
    )

    def findings(self) -> list[str]:
        return [self._classes(), self._worst()]

    def _classes(self) -> str:
        rows = (
            f"<tr><th>{escape(printable(row['label']))}</th><td>{row['objects']:,}</td><td>{_share(row['ap'])}</td>"
            f"<td>{_share(row['ap50'])}</td></tr>"
            for row in self.counts.per_class(self.labels)
        )
        head = "<tr><th>class</th><th>objects</th><th>AP</th><th>AP50</th></tr>"
        return f'<h2>Classes</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'

    def _worst(self) -> str:
        figures = "".join(self._pair(index) for index in self.counts.worst())
        if not figures:
            return "<h2>Worst images</h2><p>No object was missed and none made up.</p>"
        return (
            "<h2>Worst images</h2><p>The held-out images with most objects missed or made up, counted at a score of "
            f'0.5 and an overlap of 0.5: what is there, and what was found.</p><div class="row">{figures}</div>'
        )

    def _pair(self, index: int) -> str:
        sample = self.images.samples[index]
        try:
            image = decode(sample.image)
            pixels, place = self.preprocess.placed(sample.image)
        except UserError as fault:
            return f"<figure><figcaption>{escape(printable(sample.name))}: {escape(str(fault))}</figcaption></figure>"
        with torch.inference_mode():
            (reply,) = self.network.head.read(self.network(pixels[None]), self.labels, places=[place])
        whole = (0, 0, image.shape[1], image.shape[0])
        large, (_, _, right, _) = fitted(image, whole, PICTURE, PICTURE)
        scale, count = right / image.shape[1], len(self.labels)
        truth = sample.target.objects
        names = [printable(self.labels[int(i)], 20) for i in truth.labels]
        there = boxed(large, (truth.boxes * scale).tolist(), truth.labels.tolist(), names, count)
        boxes = [[side * scale for side in found.box] for found in reply.boxes]
        words = [f"{printable(found.label, 20)} {found.score:.0%}" for found in reply.boxes]
        called = boxed(large, boxes, [found.index for found in reply.boxes], words, count)
        pictures = inline(there) + inline(called)
        return f'<figure class="pair">{pictures}<figcaption>{escape(printable(sample.name))}</figcaption></figure>'


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
