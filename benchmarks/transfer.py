"""What the weights that ship are worth: `train --weights builtin:tiny` beside `--weights none`, and frozen features.

    python benchmarks/transfer.py [--minutes 0.5] [--sets digits shapes letters] [--seeds 0 1]
        [--labels 10 0] [--weights builtin:tiny] [--recipes fine-tune-small fine-tune] [--frozen]

Each set is taught with so many labelled images of each class (0: all) for the same wall-clock, from random weights (the
autopilot's own choice of network) and from the weights by each recipe. `--frozen` judges features instead: nearest
neighbours and ten examples of each class, by raw pixels, by the same network with random weights, and by the weights.
Prints every run as a line of JSON, then a table.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import small_sets
import torch
from torch import nn

import sightline
from sightline.datasets.open import open_dataset
from sightline.evaluation.features import Embedding
from sightline.evaluation.few_shot import few_shot
from sightline.evaluation.knn import knn
from sightline.evaluation.protocol import Labelled

PIXELS = 16
"""The side of the pictures whose pixels are compared."""


def few(data: Path, labels: int, seed: int) -> Path:
    """A copy of a set with so many training images of each class; the set itself for 0."""
    if not labels:
        return data
    copy, random = data.with_name(f"{data.name}-{labels}"), np.random.default_rng(seed)
    if copy.exists():
        return copy
    shutil.copytree(data / "val", copy / "val")
    for folder in sorted((data / "train").iterdir()):
        (copy / "train" / folder.name).mkdir(parents=True)
        for file in random.permutation(sorted(folder.iterdir()))[:labels]:
            shutil.copy(file, copy / "train" / folder.name)
    return copy


def taught(data: Path, out: Path, minutes: float, seed: int, weights: str, recipe: str | None) -> dict[str, Any]:
    """One run by the clock."""
    shutil.rmtree(out, ignore_errors=True)
    run = sightline.train(data, out=out, minutes=minutes, seed=seed, weights=weights, recipe=recipe, device="cpu")
    record = json.loads((out / "run.json").read_text())
    return {"top1": run.metrics["top1"], "steps": record["steps"], "network": record["recipe"]["architecture"]["name"]}


class Pixels(nn.Module):
    """Stands where a network would: the pixels of a small copy are the features."""

    def __init__(self, architecture: Any):
        super().__init__()
        self.architecture = architecture

    def embed(self, pixels: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
        """The pixels of a small copy."""
        return nn.functional.interpolate(pixels, (PIXELS, PIXELS), mode="area").flatten(1)


def frozen(data: Path, weights: str, seed: int) -> list[dict[str, Any]]:
    """What features are worth: by pixels, by random weights, and by the weights."""
    model, splits, found = sightline.load(weights), open_dataset(data), []
    torch.manual_seed(seed)
    random = model.network.architecture.build()
    for start, network in (("pixels", Pixels(random.architecture)), ("random", random), (weights, model.network)):
        embedding = Embedding(network, model.preprocess, torch.device("cpu"))  # ty: ignore[invalid-argument-type]
        parts = []
        for images in (splits.train, splits.val):
            features = embedding(images)
            parts.append(Labelled(features.vectors, torch.from_numpy(images.targets[features.rows])))
        classes = len(splits.train.classes)
        top1 = {**knn(*parts, classes, (), seed).metrics, **few_shot(*parts, classes, (10,), seed).metrics}
        found.append({"start": start, **top1})
    return found


def main() -> None:
    """Runs everything, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--sets", nargs="+", default=["digits", "shapes", "letters"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 0])
    parser.add_argument("--weights", default="builtin:tiny")
    parser.add_argument("--recipes", nargs="+", default=["fine-tune-small", "fine-tune"])
    parser.add_argument("--frozen", action="store_true")
    request = parser.parse_args()
    torch.set_num_threads(1)
    cells: dict[tuple[str, ...], list[float]] = {}

    def note(row: dict[str, Any], *place: str, value: float) -> None:
        print(json.dumps(row), flush=True)
        cells.setdefault(place, []).append(100 * value)

    with tempfile.TemporaryDirectory() as folder:
        for name in request.sets:
            for seed in request.seeds:
                data = small_sets.write(name, Path(folder) / f"{seed}" / name, seed)
                if request.frozen:
                    for row in frozen(data, request.weights, seed):
                        row = {"set": name, "seed": seed, **row}
                        note(row, f"{name}, neighbours", row["start"], value=row["knn_top1"])
                        cells.setdefault((f"{name}, 10 examples", row["start"]), []).append(100 * row["few_shot_top1"])
                    continue
                for labels in request.labels:
                    part = few(data, labels, seed)
                    for start, recipe in (("none", None), *((request.weights, recipe) for recipe in request.recipes)):
                        run = taught(part, Path(folder) / "run", request.minutes, seed, start, recipe)
                        how = recipe or "none"
                        row = {"set": name, "labels": labels, "seed": seed, "start": start, "recipe": recipe, **run}
                        note(row, f"{name}, {labels or 'all'} labels", how, value=run["top1"])
    columns = list(dict.fromkeys(column for _, column in cells))
    print(f"| set | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for place in dict.fromkeys(place for place, _ in cells):
        values = [cells[place, column] for column in columns]
        told = [f"{statistics.mean(one):.1f} ({', '.join(f'{value:.1f}' for value in one)})" for one in values]
        print(f"| {place} | {' | '.join(told)} |")


if __name__ == "__main__":
    main()
