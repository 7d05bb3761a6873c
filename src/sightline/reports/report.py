"""The page about a run: settings, curves, confusions, the worst mistakes and what the network looked at in them."""

import base64
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from sightline.checkpoints.atomic import write_atomic
from sightline.datasets.image_set import ImageSet
from sightline.errors import printable
from sightline.explanation.page import document
from sightline.explanation.render import png
from sightline.images.preprocess import Preprocess
from sightline.network import Network
from sightline.reports.card import Card
from sightline.reports.charts import line_chart
from sightline.reports.sections import curves, doctor, settings, summary
from sightline.training.journal import read


@dataclass(frozen=True)
class Report(ABC):
    """`report.html` of one run, which holds everything it shows; each task has its own kind.

    `figures` are the metrics that head the page, by their public names, with what people call them: the first has its
    curve, whose axis says `short`. `card` is what a model card says of the task.
    """

    figures: ClassVar[Mapping[str, str]]
    short: ClassVar[str]
    card: ClassVar[Card]

    folder: Path
    network: Network
    preprocess: Preprocess
    labels: Sequence[str]
    images: ImageSet
    counts: Any
    record: Mapping[str, Any]

    def write(self) -> Path:
        """Writes the page, whole or not at all, and returns its path."""
        path = self.folder / "report.html"
        write_atomic(path, self.html().encode())
        return path

    @abstractmethod
    def findings(self) -> list[str]:
        """The parts of the page that tell what the network can and cannot do, as HTML."""

    def html(self) -> str:
        """The page: pictures inside, nothing loaded from elsewhere."""
        sections = [
            self._summary(),
            doctor(self.record),
            self._curves(),
            *self.findings(),
            self._refused(),
            settings(self.record),
        ]
        return document(f"{printable(self.record['data']['source'])}: what was learned", "\n".join(sections))

    def _summary(self) -> str:
        metrics, data = self.counts.metrics(), self.record["data"]
        refused = f", {len(self.counts.refused)} could not be read" if self.counts.refused else ""
        rows = {
            **{name: f"{metrics[key]:.2%}" for key, name in self.figures.items()},
            "held-out images": f"{self.counts.evaluated:,} answered{refused}",
            "training images": f"{data['train']:,}" + (f" of {data['classes']} classes" if data["classes"] else ""),
        }
        return summary(rows, self.network, self.preprocess, self.record)

    def _curves(self) -> str:
        records = read(self.folder / "metrics.jsonl")
        loss = [(r["epoch"], r["loss"]) for r in records if "loss" in r]
        key, name = next(iter(self.figures.items()))
        score = [(r["epoch"], r[f"val_{key}"]) for r in records if f"val_{key}" in r]
        rate = [(r["epoch"], r["lr"]) for r in records if "lr" in r]
        charts = [
            ("Training loss", line_chart(loss, "epoch", "training loss", zero=True, smooth=True)),
            (f"Held-out {name}", line_chart(score, "epoch", self.short)),
            ("Learning rate", line_chart(rate, "epoch", "learning rate", zero=True)),
        ]
        return curves(charts)

    def _refused(self) -> str:
        refused = [*self.record["refused"]["train"], *self.record["refused"]["val"]]
        if not refused:
            return ""
        rows = (f"<tr><th>{escape(printable(n))}</th><td>{escape(printable(why))}</td></tr>" for n, why in refused)
        return f"<h2>Images that could not be read</h2><table>{''.join(rows)}</table>"


def inline(picture: np.ndarray) -> str:
    """A picture as an element of the page."""
    data = base64.b64encode(png(Image.fromarray(picture))).decode()
    return f'<img src="data:image/png;base64,{data}" alt="">'
