"""The page about a run that brought images and texts together: what was found, and what was said of some images."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, ClassVar

import numpy as np
import torch

from sightline.datasets.captions import captions_of
from sightline.errors import UserError, printable
from sightline.evaluation.retrieval import RANKS, Retrieval
from sightline.explanation.render import fitted
from sightline.images.decode import decode
from sightline.reports.card import Card
from sightline.reports.report import Report, inline

SHOWN = 12
"""Images that are shown with the captions that were found for them."""

PICTURE = 160
"""Longer side of these pictures, in pixels."""


class CaptionsReport(Report):
    """What retrieval shows."""

    counts: Retrieval

    figures: ClassVar[Mapping[str, str]] = {
        "image_to_text_r1": "image to text, recall@1",
        "text_to_image_r1": "text to image, recall@1",
    }
    short = "recall@1"
    card = Card(
        "zero-shot-image-classification",
        "A model of images and texts",
        "label",
        "It compares images with texts like the captions it learned from, and knows nothing that they never speak of",
        figures,
        '["image.jpg"], labels=["a cat", "a dog"]',
    )

    def findings(self) -> list[str]:
        return [self._recall(), self._found()]

    def _recall(self) -> str:
        metrics = self.counts.metrics()
        head = "".join(f"<th>recall@{k}</th>" for k in RANKS)
        rows = "".join(
            f"<tr><th>{way.replace('_', ' ')}</th>"
            + "".join(f"<td>{metrics[f'{way}_r{k}']:.1%}</td>" for k in RANKS)
            + "</tr>"
            for way in ("image_to_text", "text_to_image")
        )
        told = f"<p>{len(self.counts.texts):,} different captions; equal ones count as one.</p>"
        return f"<h2>Retrieval</h2>{told}<table><tr><th></th>{head}</tr>{rows}</table>"

    def _found(self) -> str:
        if not self.counts.images:
            return ""
        marks = self.images.samples.marks or ()
        texts = torch.nn.functional.normalize(torch.stack(list(self.counts.texts.values())), dim=-1)
        said = {row: caption for i in self.counts.pairs for row, caption in self._captions(i, marks)}
        names = [said.get(row, "") for row in self.counts.texts]
        chosen = [sorted(self.counts.images)[i] for i in _evenly(len(self.counts.images))]
        figures = []
        for index in chosen:
            cosines = texts @ torch.nn.functional.normalize(self.counts.images[index], dim=-1)
            best = int(cosines.argmax())
            right = names[best] in [caption for _, caption in self._captions(index, marks)]
            try:
                image = decode(self.images.samples[index].image)
            except UserError as fault:
                figures.append(f"<figure><figcaption>{escape(printable(str(fault)))}</figcaption></figure>")
                continue
            picture, _ = fitted(image, (0, 0, image.shape[1], image.shape[0]), PICTURE // 2, PICTURE)
            verdict = "its own" if right else f"its own: {escape(printable(captions_of(marks[index])[0]))}"
            words = f"found: {escape(printable(names[best]))} ({float(cosines[best]):.2f}); {verdict}"
            figures.append(f"<figure>{inline(np.asarray(picture))}<figcaption>{words}</figcaption></figure>")
        return f'<h2>The caption found for some held-out images</h2><div class="row">{"".join(figures)}</div>'

    def _captions(self, index: int, marks: Sequence[Any]) -> list[tuple[tuple[int, ...], str]]:
        return list(zip(self.counts.pairs[index], captions_of(marks[index]), strict=True))


def _evenly(count: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(SHOWN, count)).astype(int)).tolist()
