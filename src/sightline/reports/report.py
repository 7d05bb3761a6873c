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
from sightline.network import Network, count_parameters
from sightline.reports.card import Card
from sightline.reports.charts import line_chart
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
            self._doctor(),
            self._curves(),
            *self.findings(),
            self._refused(),
            self._settings(),
        ]
        return document(f"{printable(self.record['data']['source'])}: what was learned", "\n".join(sections))

    def _summary(self) -> str:
        metrics, data = self.counts.metrics(), self.record["data"]
        refused = f", {len(self.counts.refused)} could not be read" if self.counts.refused else ""
        rows = {
            **{name: f"{metrics[key]:.2%}" for key, name in self.figures.items()},
            "held-out images": f"{self.counts.evaluated:,} answered{refused}",
            "training images": f"{data['train']:,}" + (f" of {data['classes']} classes" if data["classes"] else ""),
            "network": f"{self.network.architecture.name}, {count_parameters(self.network):,} parameters",
            "pixels": self.preprocess.describe(),
            "time in training": f"{self.record['seconds']['train']:.0f} s",
        }
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in self.record["recipe"]["reasons"])
        return f"{_table(rows)}<h2>Why this recipe</h2><ul>{reasons}</ul>"

    def _doctor(self) -> str:
        if not (findings := self.record.get("findings")):
            return "<h2>Doctor</h2><p>Nothing stood out in the training.</p>"
        rows = (
            f"<tr><th>{escape(f['kind'])}</th><td>{f['step']:,}</td><td>{escape(f['severity'])}</td>"
            f"<td>{escape(f['words'])}.</td><td>{escape(f['advice'])}</td></tr>"
            for f in findings
        )
        head = "<tr><th>finding</th><th>step</th><th>weight</th><th>what was seen</th><th>what helps</th></tr>"
        return f'<h2>Doctor</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'

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
        figures = (f"<figure>{chart}<figcaption>{name}</figcaption></figure>" for name, chart in charts if chart)
        return f'<h2>Curves</h2><div class="row charts">{"".join(figures)}</div>'

    def _refused(self) -> str:
        refused = [*self.record["refused"]["train"], *self.record["refused"]["val"]]
        if not refused:
            return ""
        rows = (f"<tr><th>{escape(printable(n))}</th><td>{escape(printable(why))}</td></tr>" for n, why in refused)
        return f"<h2>Images that could not be read</h2><table>{''.join(rows)}</table>"

    def _settings(self) -> str:
        parts = {
            "Training": self.record["recipe"]["settings"],
            "Variation of the images": self.record["recipe"]["augment"],
            "Network": self.record["recipe"]["architecture"]["backbone"],
            "Machine": self.record["environment"],
        }
        details = "".join(
            f"<details><summary>{name}</summary>{_table(values)}</details>" for name, values in parts.items()
        )
        return f"<h2>Settings</h2>{details}"


def _table(rows: Mapping[str, Any]) -> str:
    cells = (f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def inline(picture: np.ndarray) -> str:
    """A picture as an element of the page."""
    data = base64.b64encode(png(Image.fromarray(picture))).decode()
    return f'<img src="data:image/png;base64,{data}" alt="">'
