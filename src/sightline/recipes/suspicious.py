"""Labels of a dataset that the features of a trained model contradict."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sightline.datasets.check import Checked, Progress
from sightline.datasets.findings import Finding
from sightline.datasets.image_set import ImageSet
from sightline.device import pick_device, pick_precision
from sightline.evaluation.cache import Cache
from sightline.evaluation.features import Embedding
from sightline.evaluation.suspects import suspects
from sightline.model import Model, load


def suspicious(checked: Checked, source: str, device: str, progress: Progress) -> list[Finding]:
    """The labels that the features of a model contradict."""
    model = load(source)
    pile = checked.pile
    rows = np.flatnonzero(checked.readable & (pile.samples.targets >= 0))
    if not len(rows):
        return []
    where = pick_device(device)
    embedding = Embedding(model.network, model.preprocess, where, pick_precision("auto", where), cache=Cache())
    images = ImageSet((), replace(pile.samples.select(rows), targets=np.full(len(rows), -1)))
    found = embedding(images, lambda done: progress("embedding", done, len(rows)))
    vectors, rows = found.vectors, rows[found.rows]
    if not len(rows):
        return []
    answers = _answers(model, vectors, pile.labels)
    return [
        Finding(
            "suspicious-label",
            f"labelled '{pile.labels[s.given]}', but like '{pile.labels[s.believed]}' to the model ({s.score:.0%})",
            pile.called([int(rows[s.row])]),
            [pile.labels[s.given], pile.labels[s.believed]],
        )
        for s in suspects(vectors, pile.label[rows], answers=answers)
    ]


def _answers(model: Model, features: Float[Tensor, "n d"], labels: Sequence[str]) -> Int64[np.ndarray, " n"] | None:
    """What the model itself answers, as the labels are numbered, -1 for others; None where it has no classifier."""
    classifier = model.network.head.classifier
    if classifier is None:
        return None
    number = {label: i for i, label in enumerate(labels)}
    known = np.array([number.get(label, -1) for label in model.labels])
    with torch.inference_mode():
        return known[classifier.cpu()(features).argmax(dim=1).numpy()]
