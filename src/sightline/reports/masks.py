"""The page about a run that taught a class for every pixel: classes, confusions and the worst images, painted."""

from collections.abc import Mapping
from html import escape
from typing import ClassVar

import torch

from sightline.errors import UserError, printable
from sightline.evaluation.segmentation import PixelCounts
from sightline.explanation.masks import legend, painted
from sightline.explanation.render import fitted
from sightline.images.decode import decode
from sightline.reports.card import Card
from sightline.reports.report import Report, inline

PICTURE = 240
"""Longer side of the pictures, in pixels."""


class MasksReport(Report):
    """What semantic segmentation shows."""

    counts: PixelCounts

    figures: ClassVar[Mapping[str, str]] = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}
    short = "mIoU"
    card = Card(
        "image-segmentation",
        "A network for semantic segmentation",
        "mask",
        "It knows these classes and no others, and gives one of them to every pixel of any image",
        figures,
    )

    def findings(self) -> list[str]:
        return [self._classes(), self._worst()]

    def _classes(self) -> str:
        rows = (
            f"<tr><th>{escape(printable(row['label']))}</th><td>{row['share']:.1%}</td><td>{_share(row['iou'])}</td>"
            f"<td>{_share(row['recall'])}</td></tr>"
            for row in self.counts.per_class(self.labels)
        )
        head = "<tr><th>class</th><th>share of the pixels</th><th>IoU</th><th>recall</th></tr>"
        return f'<h2>Classes</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'

    def _worst(self) -> str:
        figures = "".join(self._pair(*worst) for worst in self.counts.worst)
        named = legend([printable(label, 30) for label in self.labels], range(min(len(self.labels), 40)))
        return (
            "<h2>Worst images</h2><p>The held-out images with the smallest share of right pixels: the image, what is "
            f'true, and what the network says.</p><p>{named}</p><div class="row">{figures}</div>'
        )

    def _pair(self, share: float, index: int) -> str:
        sample = self.images.samples[index]
        try:
            image = decode(sample.image)
            truth = sample.target.mask(image.shape[0], image.shape[1])
        except UserError as fault:
            return f"<figure><figcaption>{escape(printable(sample.name))}: {escape(str(fault))}</figcaption></figure>"
        pixels, place = self.preprocess.placed(sample.image)
        with torch.inference_mode():
            (reply,) = self.network.head.read(self.network(pixels[None]), self.labels, places=[place])
        shown = [image, *(painted(image, mask, len(self.labels)) for mask in (truth, reply.mask))]
        box = (0, 0, image.shape[1], image.shape[0])
        pictures = "".join(inline(fitted(picture, box, PICTURE // 2, PICTURE)[0]) for picture in shown)
        words = f"{escape(printable(sample.name))}: {share:.1%} of the pixels right"
        return f'<figure class="three">{pictures}<figcaption>{words}</figcaption></figure>'


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
