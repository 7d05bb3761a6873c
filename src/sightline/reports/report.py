"""The page about a run: settings, curves, confusions, the worst mistakes and what the network looked at in them."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sightline.checkpoints.atomic import write_atomic
from sightline.datasets.image_set import ImageSet
from sightline.errors import UserError, printable
from sightline.evaluation.accuracy import Accuracy
from sightline.explanation.explain import explain
from sightline.explanation.files import seen_box
from sightline.explanation.page import document
from sightline.explanation.render import fitted, png
from sightline.images.decode import decode
from sightline.images.preprocess import Preprocess
from sightline.network import Network, count_parameters
from sightline.reports.charts import line_chart
from sightline.reports.sections import curves, doctor, settings, table
from sightline.training.journal import read

MATRIX = 40
"""Most classes of which the whole confusion matrix is shown."""

PICTURE = 240
"""Longer side of the pictures of mistakes, in pixels."""


@dataclass(frozen=True)
class Report:
    """`report.html` of one run, which holds everything it shows."""

    folder: Path
    network: Network
    preprocess: Preprocess
    labels: Sequence[str]
    images: ImageSet
    counts: Accuracy
    record: Mapping[str, Any]

    def write(self) -> Path:
        """Writes the page, whole or not at all, and returns its path."""
        path = self.folder / "report.html"
        write_atomic(path, self.html().encode())
        return path

    def html(self) -> str:
        """The page: pictures inside, nothing loaded from elsewhere."""
        sections = [
            self._summary(),
            doctor(self.record),
            self._curves(),
            self._confusion(),
            self._classes(),
            self._mistakes(),
            self._refused(),
            settings(self.record),
        ]
        return document(f"{printable(self.record['data']['source'])}: what was learned", "\n".join(sections))

    def _summary(self) -> str:
        metrics, data = self.counts.metrics(), self.record["data"]
        refused = f", {len(self.counts.refused)} could not be read" if self.counts.refused else ""
        rows = {
            "top-1 accuracy": f"{metrics['top1']:.2%}",
            "top-5 accuracy": f"{metrics['top5']:.2%}",
            "held-out images": f"{self.counts.evaluated:,} answered{refused}",
            "training images": f"{data['train']:,} of {data['classes']} classes",
            "network": f"{self.network.architecture.name}, {count_parameters(self.network):,} parameters",
            "pixels": self.preprocess.describe(),
            "time in training": f"{self.record['seconds']['train']:.0f} s",
        }
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in self.record["recipe"]["reasons"])
        return f"{table(rows)}<h2>Why this recipe</h2><ul>{reasons}</ul>"

    def _curves(self) -> str:
        records = read(self.folder / "metrics.jsonl")
        loss = [(r["epoch"], r["loss"]) for r in records if "loss" in r]
        top1 = [(r["epoch"], r["val_top1"]) for r in records if "val_top1" in r]
        rate = [(r["epoch"], r["lr"]) for r in records if "lr" in r]
        charts = [
            ("Training loss", line_chart(loss, "epoch", "training loss", zero=True, smooth=True)),
            ("Held-out top-1 accuracy", line_chart(top1, "epoch", "top-1")),
            ("Learning rate", line_chart(rate, "epoch", "learning rate", zero=True)),
        ]
        return curves(charts)

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
        pictures = "".join(_inline(picture) for picture in (image, seen))
        words = (
            f"{escape(printable(sample.name))}: called {escape(printable(self.labels[called]))} ({score:.1%}), "
            f"is {escape(printable(self.labels[sample.target]))}"
        )
        return f'<figure class="pair">{pictures}<figcaption>{words}</figcaption></figure>'

    def _refused(self) -> str:
        refused = [*self.record["refused"]["train"], *self.record["refused"]["val"]]
        if not refused:
            return ""
        rows = (f"<tr><th>{escape(printable(n))}</th><td>{escape(printable(why))}</td></tr>" for n, why in refused)
        return f"<h2>Images that could not be read</h2><table>{''.join(rows)}</table>"


def _inline(picture: np.ndarray) -> str:
    data = base64.b64encode(png(Image.fromarray(picture))).decode()
    return f'<img src="data:image/png;base64,{data}" alt="">'
