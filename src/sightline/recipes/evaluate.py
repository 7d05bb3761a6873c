"""A model weighed on labelled images."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sightline.checkpoints.files import read_json
from sightline.datasets.image_set import ImageSet
from sightline.datasets.loader import OrderedLoader
from sightline.datasets.split import Splits
from sightline.device import pick_device, pick_precision
from sightline.evaluation.measure import weigh
from sightline.model import load
from sightline.recipes.task import task_of
from sightline.schema import require


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found. Refused images stand in the denominator of every metric.

    `details` are what the task tells beside its metrics, `headline` and `lines` the same for people. `report` is the
    page about the model's own training, where there is one.
    """

    model: str
    task: str
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    seconds: Mapping[str, float]
    details: Mapping[str, Any]
    headline: str
    lines: Sequence[str]
    refused: Sequence[tuple[str, str]]
    notes: Sequence[str]
    report: str | None

    def to_json(self) -> dict[str, Any]:
        """The document of `evaluate --json`."""
        return {
            "model": self.model,
            "task": self.task,
            "metrics": dict(self.metrics),
            "counts": dict(self.counts),
            "seconds": dict(self.seconds),
            "report": self.report,
            **self.details,
            "refused": [{"path": name, "error": reason} for name, reason in self.refused],
        }


def evaluate(
    source: str | Path,
    data: str | Path,
    *,
    seed: int | None = None,
    batch_size: int = 64,
    workers: int = 1,
    device: str = "auto",
    precision: str = "auto",
    architecture: str | None = None,
    prompts: Sequence[str] | None = None,
    vocabulary: str | Path | None = None,
) -> Evaluated:
    """Measures a model on the validation part of `data`, or on all of it where it has none.

    Data that the model was trained on, and the built-in sets, are held out as in its training: by its seed, or by
    `seed`. The classes of the data must be those of the model, by name; their order on disk does not matter. Raises
    UserError otherwise. A model that reads texts is asked for any classes, by name, in the sentences of `prompts`.
    """
    require(batch_size > 0, f"batch_size must be positive, not {batch_size}")
    require(workers >= 0, f"workers must not be negative, and is {workers}")
    model = load(source, architecture=architecture, vocabulary=vocabulary)
    where = pick_device(device)
    folder = Path(source)
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    task = task_of(model.task).for_model(model, prompts)
    splits = task.open(data, int(record.get("seed", 0)) if seed is None else seed)
    chosen, notes = _part(splits, record, seed)
    images = task.aligned(model.labels, chosen, str(data))
    loader = OrderedLoader(
        images,
        task.prepared(model.preprocess),
        batch_size=batch_size,
        workers=workers if images.samples.arrays is None else 0,
    )
    began = time.monotonic()
    counts = weigh(
        model.network.to(where),
        loader,
        task.measure(images, model.preprocess),
        device=where,
        precision=pick_precision(precision, where),
    )
    return Evaluated(
        str(source),
        model.task,
        counts.metrics(),
        {"evaluated": counts.evaluated, "refused": len(counts.refused)},
        {"evaluate": round(time.monotonic() - began, 2)},
        counts.details(images.classes),
        counts.headline(),
        counts.lines(images.classes),
        counts.refused,
        notes,
        str(folder / "report.html") if (folder / "report.html").is_file() else None,
    )


def _part(splits: Splits, record: Mapping[str, Any], seed: int | None) -> tuple[ImageSet, list[str]]:
    """The images to judge by, and remarks: strangers to the model are all judged, what it learned from is not."""
    builtin = splits.source.startswith("builtin:")
    known = record.get("data", {}).get("fingerprint", {}).get("train") == splits.train.fingerprint()
    if not splits.drawn or builtin or known or seed is not None:
        return splits.val, splits.notes
    images = splits.together()
    return images, [f"all {len(images):,} images are judged: the data has no validation part of its own"]
