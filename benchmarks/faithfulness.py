"""Which map is right: deletion and insertion on trained models, for every map and random orders.

    python benchmarks/faithfulness.py [--data builtin:digits] [--models vit swin …] [--seeds 0 1 2] [--minutes 1]
                                      [--images 60]

For each seed a model is trained by `sightline.train` (a seed also draws the held-out images), or, with `--models`, a
small network of each of these registered kinds (the `SMALL` tables beside the families). Over the first of the held-out
images that it answers rightly, in an order drawn by the seed, patches are deleted and inserted in the order of each map
(`sightline.explanation.faithfulness`). Prints the areas, means over the images of each seed: deletion is good where it
is small, insertion where it is large.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import sightline
from sightline.datasets.open import open_dataset
from sightline.explanation.explain import explain
from sightline.explanation.files import judge_maps
from sightline.registry import table

Areas = dict[str, dict[str, float]]


def measure(model: Any, data: str, seed: int, images: int) -> Areas:
    """The mean areas of each map over the held-out images that the model answers rightly."""
    held_out = open_dataset(data, seed=seed).val
    network, areas = model.network, defaultdict(lambda: defaultdict(list))
    counted = 0
    for row in np.random.default_rng(seed).permutation(len(held_out)):
        sample = held_out.samples[int(row)]
        pixels = model.preprocess(sample.image)
        if model.predict([sample.image])[0].index != sample.target:
            continue
        view = explain(network, pixels, layers=[], gradients=True)
        for name, one in judge_maps(network, pixels, view).items():
            areas[name]["deletion"].append(one.deletion_area)
            areas[name]["insertion"].append(one.insertion_area)
        counted += 1
        if counted == images:
            break
    means = {name: {part: float(np.mean(found)) for part, found in parts.items()} for name, parts in areas.items()}
    return {name: {**parts, "score": parts["insertion"] - parts["deletion"]} for name, parts in means.items()}


def main() -> None:
    """Trains, measures, and prints a line of JSON for each run and then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="builtin:digits")
    parser.add_argument("--models", nargs="+", default=["as chosen"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=60)
    request = parser.parse_args()
    kinds = {**table("backbones", "SMALL"), **table("tokenizers", "SMALL")}
    found: dict[str, list[Areas]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for kind in request.models:
            for seed in request.seeds:
                out = Path(folder) / f"{kind}-{seed}"
                asked: dict[str, Any] = {}
                if kind in kinds:
                    name, overrides = kinds[kind]
                    asked = {"model": name, "network": dict(overrides)}
                run = sightline.train(
                    request.data, out=out, seed=seed, minutes=request.minutes, device="cpu", quiet=True, **asked
                )
                areas = measure(run.model, request.data, seed, request.images)
                found[kind].append(areas)
                print(
                    json.dumps({"model": kind, "seed": seed, "top1": run.metrics["top1"], "areas": areas}), flush=True
                )
    print("| model | map | deletion | insertion | insertion less deletion |\n|---|---|---|---|---|")
    for kind, seeds in found.items():
        for name in seeds[0]:
            cells = [_cell([areas[name][part] for areas in seeds]) for part in ("deletion", "insertion", "score")]
            print(f"| {kind} | {name} | {' | '.join(cells)} |")


def _cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


if __name__ == "__main__":
    main()
