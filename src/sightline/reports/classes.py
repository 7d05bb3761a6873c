"""The page about a run that taught classes: confusions, the worst mistakes and what the network looked at in them."""

from collections.abc import Mapping
from html import escape
from typing import ClassVar

import numpy as np

from sightline.errors import UserError, printable
from sightline.evaluation.accuracy import Accuracy
from sightline.explanation.explain import explain
from sightline.explanation.files import seen_box
from sightline.explanation.render import fitted
from sightline.images.decode import decode
from sightline.reports.card import Card
from sightline.reports.report import Report, inline

MATRIX = 40
"""Most classes of which the whole confusion matrix is shown."""

PICTURE = 240
"""Longer side of the pictures of mistakes, in pixels."""


class ClassesReport(Report):
    """What classification shows."""

    counts: Accuracy

    figures: ClassVar[Mapping[str, str]] = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}
    short = "top-1"
    card = Card(
        "image-classification",
        "An image classifier",
        "label",
        "It knows these classes and no others, and answers with one of them for any image",
        figures,
    )

    def findings(self) -> list[str]:
        return [self._confusion(), self._classes(), self._mistakes()]

    def _confusion(self) -> str:
        if len(self.labels) > MATRIX:
            return f"<h2>Most frequent confusions</h2>{self._pairs()}"
        matrix = self.counts.confusion
        head = "".join(f"<th>{escape(printable(label, 20))}</th>" for label in self.labels)
        rows = []
        for label, row in zip(self.labels, matrix, strict=True):
            share = row / max(row.sum(), 1)
            cells = (
                f'<td style="--share:{s:.3f}" class="{"hit" if i == j else "miss"}">{n or ""}</td>'
                for j, (n, s) in enumerate(zip(row, share, strict=True))
                for i in [self.labels.index(label)]
            )
            rows.append(f"<tr><th>{escape(printable(label, 20))}</th>{''.join(cells)}</tr>")
        return (
            "<h2>Confusion matrix</h2><p>Rows: the true class. Columns: what the model said.</p>"
            f'<div class="wide"><table class="matrix"><tr><td></td>{head}</tr>{"".join(rows)}</table></div>'
        )

    def _pairs(self) -> str:
        off = self.counts.confusion * (1 - np.eye(len(self.labels), dtype=np.int64))
        worst = np.argsort(off, axis=None, kind="stable")[::-1][:20]
        pairs = [(i, j) for i, j in zip(*np.unravel_index(worst, off.shape), strict=True) if off[i, j]]
        rows = (
            f"<tr><td>{escape(printable(self.labels[i]))}</td><td>{escape(printable(self.labels[j]))}</td>"
            f"<td>{off[i, j]}</td></tr>"
            for i, j in pairs
        )
        return f"<table><tr><th>true class</th><th>answer</th><th>images</th></tr>{''.join(rows)}</table>"

    def _classes(self) -> str:
        rows = (
            f"<tr><th>{escape(printable(row['label']))}</th><td>{row['images']}</td><td>{row['recall']:.1%}</td>"
            f"<td>{row['precision']:.1%}</td><td>{row['f1']:.1%}</td></tr>"
            for row in self.counts.per_class(self.labels)
        )
        head = "<tr><th>class</th><th>images</th><th>recall</th><th>precision</th><th>F1</th></tr>"
        return f'<h2>Classes</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'

    def _mistakes(self) -> str:
        if not self.counts.mistakes:
            return "<h2>Worst mistakes</h2><p>No held-out image got a wrong answer.</p>"
        figures = "".join(self._mistake(*mistake) for mistake in self.counts.mistakes)
        return (
            "<h2>Worst mistakes</h2><p>Wrong answers that the model was surest of, and beside each where it looked: "
            "the attention rollout, which says where the information that its head read came from, or for a network "
            f'without attention the places that spoke for the answer.</p><div class="row">{figures}</div>'
        )

    def _mistake(self, score: float, index: int, called: int) -> str:
        sample = self.images.samples[index]
        try:
            image = decode(sample.image)
            view = explain(self.network, self.preprocess(sample.image), layers=())
        except UserError as fault:  # a family may not say how its maps lie side by side
            return f"<figure><figcaption>{escape(printable(sample.name))}: {escape(str(fault))}</figcaption></figure>"
        image, box = fitted(image, seen_box(self.preprocess, *image.shape[:2]), PICTURE // 2, PICTURE)
        seen = view.overlay(image, box=box)
        pictures = "".join(inline(picture) for picture in (image, seen))
        words = (
            f"{escape(printable(sample.name))}: called {escape(printable(self.labels[called]))} ({score:.1%}), "
            f"is {escape(printable(self.labels[sample.target]))}"
        )
        return f'<figure class="pair">{pictures}<figcaption>{words}</figcaption></figure>'
