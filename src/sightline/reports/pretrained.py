"""The page about a run without labels: curves of what was learned, and whether the features kept apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import printable
from sightline.explanation.page import document
from sightline.images.preprocess import Preprocess
from sightline.network import Network
from sightline.reports.charts import line_chart
from sightline.reports.sections import curves, doctor, settings, summary
from sightline.training.journal import read

_ALWAYS = ("step", "epoch", "loss", "lr", "grad_norm", "update_ratio", "rate")
_NAMES = {
    "knn_top1": "top-1 of the nearest neighbours",
    "effective_rank": "effective rank of the features: how many directions they use",
    "feature_std": "deviation of the features (1: even in all directions, 0: all the same)",
    "baseline": "loss of an answer that does not look at the image",
    "summary_loss": "loss of telling every patch from the features of the whole image alone (summary)",
    "ibot_loss": "loss of the hidden patches (iBOT)",
    "koleo_loss": "evenness of the features of a batch, less is more even (KoLeo)",
    "pixel_error": "error of the pixels that the words of the codebook give back",
    "agreement": "share of images to which student and teacher give the same class",
    "teacher_entropy": "entropy of the teacher, as a share of the largest",
    "prototype_perplexity": "prototypes in use, by the exponential of the entropy",
    "codebook_perplexity": "entries of the codebook in use, by the exponential of the entropy",
    "codebook_use": "entries of the codebook in use, as a share of all",
    "accuracy": "share of right answers in training",
}


@dataclass(frozen=True)
class PretrainedReport:
    """`report.html` of one run without labels, which holds everything it shows."""

    folder: Path
    network: Network
    preprocess: Preprocess
    record: Mapping[str, Any]

    def write(self) -> Path:
        """Writes the page, whole or not at all, and returns its path."""
        path = self.folder / "report.html"
        write_atomic(path, self.html().encode())
        return path

    def html(self) -> str:
        """The page: pictures inside, nothing loaded from elsewhere."""
        sections = [self._summary(), doctor(self.record), self._curves(), settings(self.record)]
        title = f"{printable(self.record['data']['source'])}: what {self.record['recipe']['objective']} taught"
        return document(title, "\n".join(sections))

    def _summary(self) -> str:
        metrics, data = self.record["metrics"], self.record["data"]
        rows = {
            "objective": self.record["recipe"]["objective"],
            **{_NAMES.get(name, name): f"{value:.4g}" for name, value in metrics.items()},
            "held-out images": f"{self.record['counts']['evaluated']:,}",
            "training images": f"{data['train']:,}",
        }
        return summary(rows, self.network, self.preprocess, self.record)

    def _curves(self) -> str:
        records = read(self.folder / "metrics.jsonl")
        loss = [(r["epoch"], r["loss"]) for r in records if "loss" in r]
        charts = [("Training loss", line_chart(loss, "epoch", "training loss", zero=True, smooth=True))]
        found = {name: None for r in records for name, value in r.items() if isinstance(value, int | float)}
        for name in (name for name in found if name not in _ALWAYS):
            points = [(r["epoch"], r[name]) for r in records if name in r and "epoch" in r]
            short = name.removeprefix("val_")
            caption = _NAMES.get(short, short) + (", held out" if name.startswith("val_") else "")
            charts.append((caption, line_chart(points, "epoch", short, smooth=not name.startswith("val_"))))
        rate = [(r["epoch"], r["lr"]) for r in records if "lr" in r]
        return curves([*charts, ("Learning rate", line_chart(rate, "epoch", "learning rate", zero=True))])
