"""What 8 bits are calibrated on: images of whatever the user names, with their classes where they are the model's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sightline.checkpoints.files import read_json
from sightline.datasets.unlabelled import open_images
from sightline.errors import UserError
from sightline.inference.eight_bits import MOST
from sightline.recipes.evaluate import part_to_judge
from sightline.recipes.task import task_of


class Named(NamedTuple):
    """Images to read, the class of each by the model's numbers (-1 for none), what they are called, and remarks."""

    sources: Sequence[Any]
    targets: Sequence[int]
    names: Sequence[str]
    notes: Sequence[str]


def calibration_images(source: str | Path, data: str | Path, labels: Sequence[str]) -> Named:
    """At most 2048 images of a folder or of any dataset, evenly over it, for a model that answers with `labels`.

    Of data with a part that was held out, from the model's own training too, only this part is taken, as `evaluate`
    does. Raises UserError for what is no data.
    """
    folder, notes = Path(source), []
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    splits = open_images(data, seed=int(record.get("seed", 0)))
    images, _ = part_to_judge(splits, record, None)
    if images.classes:
        try:
            images = task_of("classify").aligned(labels, images, str(data))
        except UserError as fault:
            notes.append(f"accuracy is not measured: {fault}")
            images = images.unlabelled()
    rows = np.unique(np.linspace(0, len(images) - 1, min(MOST, len(images))).round().astype(np.int64))
    samples = images.select(rows).samples
    chosen = [samples[i] for i in range(len(samples))]
    return Named([s.image for s in chosen], [s.target for s in chosen], [s.name for s in chosen], notes)
