"""A model weighed on labelled images, by its answers or by its features."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sightline.checkpoints.files import read_json
from sightline.datasets.image_set import ImageSet
from sightline.datasets.loader import OrderedLoader
from sightline.datasets.open import open_dataset
from sightline.datasets.split import Splits
from sightline.device import keep_for_next, pick_device, pick_precision
from sightline.errors import UserError, printable, suggest
from sightline.evaluation.cache import Cache
from sightline.evaluation.features import Embedding
from sightline.evaluation.measure import weigh
from sightline.evaluation.protocol import Interval, Judged, Labelled, Protocol
from sightline.model import load
from sightline.recipes.task import task_of
from sightline.registry import table
from sightline.schema import require


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found. Refused images stand in the denominator of every metric.

    `details` are what the task or the protocol tells beside the metrics, `headline` and `lines` the same for people.
    `report` is the page about the model's own training, where there is one. `intervals` are the 95 % intervals of the
    metrics of a protocol of frozen features.
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
    protocol: str = "accuracy"
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The document of `evaluate --json`."""
        return {
            "model": self.model,
            "task": self.task,
            "protocol": self.protocol,
            "metrics": dict(self.metrics),
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
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
    protocol: str = "accuracy",
    shots: int | None = None,
    seed: int | None = None,
    cache: bool = True,
    batch_size: int = 64,
    workers: int = 1,
    device: str = "auto",
    precision: str = "auto",
    architecture: str | None = None,
    prompts: Sequence[str] | None = None,
    vocabulary: str | Path | None = None,
    merge: int = 0,
) -> Evaluated:
    """Measures a model on the validation part of `data`, or on all of it where it has none.

    Data that the model was trained on, and the built-in sets, are held out as in its training: by its seed, or by
    `seed`. With the `protocol` "accuracy" the classes of the data must be those of the model, by name; their order on
    disk does not matter. A model that reads texts is asked for any classes, by name, in the sentences of `prompts`. Any
    other protocol is a row of the `PROTOCOLS` of `sightline.evaluation` (knn, linear, few-shot): it learns the classes
    of the data from the features that the frozen model has of the training part, and is judged on the validation part.
    `shots` are examples of each class, `seed` draws them too, and features are kept in the user's cache unless `cache`
    is False. `merge` patches of each image go into others in each layer (`Model.merged`). Raises UserError for what
    does not fit.
    """
    require(batch_size > 0, f"batch_size must be positive, not {batch_size}")
    require(workers >= 0, f"workers must not be negative, and is {workers}")
    require(seed is None or 0 <= seed < 2**31, f"seed must lie in [0, 2147483648), not {seed}")
    require(shots is None or protocol == "few-shot", "shots are for the protocol few-shot")
    require(shots is None or shots > 0, f"shots must be positive, not {shots}")
    known = {"accuracy": None, **table("evaluation", "PROTOCOLS")}
    if protocol not in known:
        near = suggest(protocol, known)
        raise UserError(f"unknown protocol '{printable(protocol)}'.{near} There are {', '.join(known)}.")
    judge: Protocol | None = known[protocol]
    keep_for_next()
    model = load(source, architecture=architecture, vocabulary=vocabulary)
    require(merge == 0 or judge is None, "merge is for the protocol accuracy: features are kept for the whole network")
    if merge:
        model = model.merged(merge)
    where = pick_device(device)
    folder = Path(source)
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    drawn = int(record.get("seed", 0)) if seed is None else seed
    if judge is not None:
        embedding = Embedding(
            model.network,
            model.preprocess,
            where,
            pick_precision(precision, where),
            batch_size=batch_size,
            workers=workers,
            cache=Cache() if cache else None,
        )
        judged = partial(judge, shots=() if shots is None else (shots,), seed=seed or 0)
        return _of_features(protocol, judged, embedding, open_dataset(data, seed=drawn), str(source))
    task = task_of(model.task).for_model(model, prompts)
    splits = task.open(data, drawn)
    chosen, notes = part_to_judge(splits, record, seed)
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


def _of_features(
    name: str, judge: Callable[[Labelled, Labelled, int], Judged], embedding: Embedding, splits: Splits, source: str
) -> Evaluated:
    """What a protocol finds in the features of both parts of a set."""
    began = time.monotonic()
    parts, refused, cached = [], [], []
    for images in (splits.train, splits.val):
        found = embedding(images)
        names = images.samples.names
        refused.append([(names[row], reason) for row, reason in found.refused.items()])
        parts.append(Labelled(found.vectors, torch.from_numpy(images.targets[found.rows]), len(found.refused)))
        cached.append(found.cached)
        require(len(found.rows) > 0, f"none of the images of {splits.source} can be read")
    embedded = time.monotonic()
    train, val = parts
    judged = judge(train, val, len(splits.train.classes))
    notes = [f"learned from {len(train.labels):,} images, judged on {len(val.labels) + val.refused:,}", *splits.notes]
    notes += ["the features were in the cache (--no-cache computes them anew)"] if all(cached) else []
    if refused[0]:
        notes.append(f"{len(refused[0]):,} images of the training part could not be read and were left out")
    return Evaluated(
        source,
        embedding.network.architecture.task,
        judged.metrics,
        {"evaluated": len(val.labels), "refused": val.refused, "train": len(train.labels)},
        {"features": round(embedded - began, 2), "protocol": round(time.monotonic() - embedded, 2)},
        {"details": {**judged.details, "cached": all(cached)}},
        "",
        [],
        [*refused[1], *refused[0]],
        notes,
        None,
        name,
        judged.intervals,
    )


def part_to_judge(splits: Splits, record: Mapping[str, Any], seed: int | None) -> tuple[ImageSet, list[str]]:
    """The images to judge by, and remarks: strangers to the model are all judged, what it learned from is not."""
    builtin = splits.source.startswith("builtin:")
    known = record.get("data", {}).get("fingerprint", {}).get("train") == splits.train.fingerprint()
    if not splits.drawn or builtin or known or seed is not None:
        return splits.val, splits.notes
    images = splits.together()
    return images, [f"all {len(images):,} images are judged: the data has no validation part of its own"]
