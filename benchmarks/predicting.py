"""A folder of JPEGs to answers: `predict --runtime auto` beside transformers' pipeline and timm with a DataLoader.

    python benchmarks/predicting.py                                     # everything: about two hours on two cores
    python benchmarks/predicting.py --models vit_base_patch16_224 --folders small --images 32 --rounds 5

All contenders take turns in every round, so that a busy machine disturbs them alike; what counts are ratios of medians,
with the least and the most that one round gave. Models are loaded beforehand, and every round begins with paths. The
weights are random, the same for Sightline and transformers. Needs timm and transformers. Prints JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch.utils.data import DataLoader
from transformers import pipeline

import sightline
from sightline.checkpoints.convert import convert
from sightline.device import INT8
from sightline.evaluation.cache import Cache
from sightline.images.decode import decode
from sightline.images.preprocess import Preprocess
from sightline.inference.choose import choose
from sightline.inference.quantised import calibrated, multiplies_int8
from sightline.model import Model, load

MODELS = ("vit_base_patch16_224", "vit_small_patch16_224", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
FOLDERS = {"small": (375, 500, 200), "large": (3000, 4000, 50)}
"""Height, width and number of the JPEGs."""
BASE = "transformers"
"""The contender that the others are compared with: its pipeline as it is called by default."""
EPS = {"vit": 1e-12, "swin": 1e-5}

Contender = Callable[[list[str]], list[str]]
"""Paths to the label of each."""


def draw(folder: Path, height: int, width: int, count: int) -> list[str]:
    """JPEGs of quality 90 with waves and grain: about as many bytes as photographs have."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [np.sin(y / rng.uniform(9, 90) + x / rng.uniform(9, 90) + rng.uniform(0, 6)) for _ in range(3)]
    grain = rng.normal(0, 6, (height, width, 1)).astype(np.float32)
    picture = np.clip(128 + 80 * np.stack(waves, axis=-1) + grain, 0, 255).astype(np.uint8)
    paths = []
    for i in range(count):
        paths.append(str(folder / f"{i}.jpg"))
        Image.fromarray(np.roll(picture, (37 * i, 53 * i), axis=(0, 1))).save(paths[-1], quality=90)
    return paths


def save(name: str, room: Path) -> tuple[Path, Path]:
    """A network with random weights as a directory of ours and as one of transformers."""
    torch.manual_seed(0)
    network = sightline.create_model(name, norm_eps=EPS[name.split("_")[0]])
    for parameter in network.head.classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    half = (0.5, 0.5, 0.5)
    contract = Preprocess((224, 224), resize="squash", interpolation="bilinear", mean=half, std=half)
    ours, theirs = room / "ours", room / "theirs"
    Model(network.eval(), contract, tuple(f"class {i}" for i in range(1000))).save(ours)
    convert(str(ours), "transformers", theirs)
    return ours, theirs


def ours(model: Model, cache: Cache, **settings: Any) -> Contender:
    """What `sightline predict` does, from paths to labels."""

    def run(paths: list[str]) -> list[str]:
        precision = settings.get("precision", "auto")
        predictor = model.predictor(device="cpu", top=1, precision="fp32" if precision == INT8 else precision)
        chosen = choose(predictor, paths, cache=cache, **settings)
        run.why = chosen.why
        return [answer.prediction.label for answer in chosen.predictor.predict(chosen.sources)]

    return run


def of_transformers(folder: Path, **settings: Any) -> Contender:
    """The pipeline, called with a list of paths."""
    batch = {key: settings.pop(key) for key in ("batch_size",) if key in settings}
    pipe = pipeline("image-classification", str(folder), device="cpu", **settings)
    return lambda paths: [answer[0]["label"] for answer in pipe(paths, **batch)]


def of_timm(name: str, dtype: torch.dtype, batch_size: int, workers: int) -> Contender:
    """Timm's transform and dataset, torch's DataLoader, and the network in a loop."""
    network = timm.create_model(name).eval().to(dtype)
    transform = create_transform(**resolve_data_config({}, model=network))

    def run(paths: list[str]) -> list[str]:
        dataset = ImageDataset(str(Path(paths[0]).parent), transform=transform)
        found = []
        with torch.inference_mode():
            for pixels, _ in DataLoader(dataset, batch_size=batch_size, num_workers=workers):
                found += [f"class {i}" for i in network(pixels.to(dtype)).argmax(dim=1).tolist()]
        return found

    return run


def contenders(name: str, ours_at: Path, theirs_at: Path, room: Path) -> Iterator[tuple[str, Contender]]:
    """Everybody by name."""
    model, cache = load(ours_at), Cache(room / "speeds", 2**20)
    drafted = replace(model, preprocess=model.preprocess.replace(draft=True))
    low = torch.bfloat16
    yield BASE, of_transformers(theirs_at)
    yield "transformers, batches of 8", of_transformers(theirs_at, batch_size=8)
    yield "transformers, batches of 8, bf16", of_transformers(theirs_at, batch_size=8, dtype=low)
    for workers in (0, 2):
        yield f"timm, batches of 16, {workers} workers", of_timm(name, torch.float32, 16, workers)
        yield f"timm, batches of 16, {workers} workers, bf16", of_timm(name, low, 16, workers)
    yield "sightline, fp32", ours(model, cache, precision="fp32")
    yield "sightline", ours(model, cache)
    # Random weights have answers that nearly tie: what 8 bits do to answers is measured on trained ones (docs/log.md).
    yield "sightline, int8", ours(model, cache, precision=INT8, agreement=0.001)
    yield "sightline, draft", ours(drafted, cache)


def shares(model: Model, path: str) -> dict[str, float]:
    """Milliseconds of one thread for decoding and for resizing one image, exactly and drafted, and of the network."""
    image = decode(path)
    rough = model.preprocess.replace(draft=True)
    predictor = model.predictor(device="cpu")
    batch = [predictor.prepare(path)] * 8
    parts: dict[str, Callable[[], Any]] = {
        "decode": lambda: decode(path),
        "resize": lambda: model.preprocess.normalise(model.preprocess.fit(image)),
        "decode and resize, draft": lambda: rough(path),
    }
    ways = {"plain fp32": {}, "packed fp32": {"pack": True}, "bf16": {"precision": torch.bfloat16}}
    for way, changes in ways.items():
        other = predictor.altered(cores=1, **changes)
        parts[f"network, {way}"] = lambda other=other: other.compute(batch, features=False)
    if multiplies_int8():
        grids = calibrated(model.network, [torch.stack([item.pixels for item in batch])])
        eight = predictor.altered(cores=1, precision=torch.int8, grids=grids)
        parts["network, int8"] = lambda: eight.compute(batch, features=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {part: _best(run) * 1000 / (8 if "network" in part else 1) for part, run in parts.items()}
    finally:
        torch.set_num_threads(before)


def _best(run: Callable[[], Any], times: int = 5) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def compare(everybody: dict[str, Contender], paths: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    first: dict[str, float] = {}
    answers: dict[str, list[str]] = {}
    times: dict[str, list[float]] = {who: [] for who in everybody}
    for number in range(rounds + 1):
        for who, run in everybody.items():
            began = time.perf_counter()
            answers[who] = run(paths)
            took = time.perf_counter() - began
            if number:
                times[who].append(took)
            else:
                first[who] = took  # it warms up and, here, measures
    rows = []
    for who, taken in times.items():
        ratios = [base / own for base, own in zip(times[BASE], taken, strict=True)]
        same = sum(a == b for a, b in zip(answers[who], answers[BASE], strict=True)) / len(paths)
        row = {
            "who": who,
            "images_per_second": round(len(paths) / statistics.median(taken), 2),
            "faster": round(statistics.median(times[BASE]) / statistics.median(taken), 2),
            "least": round(min(ratios), 2),
            "most": round(max(ratios), 2),
            "seconds_of_first_round": round(first[who], 2),
        }
        if "timm" not in who:  # which has weights of its own
            row["same_answers_as_transformers"] = same
        if why := getattr(everybody[who], "why", ""):
            row["why"] = why
        rows.append(row)
    return rows


def main() -> None:
    """Measures and prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--folders", nargs="+", default=list(FOLDERS), choices=FOLDERS)
    parser.add_argument("--images", type=int, metavar="N", help="images of each folder (default: 200 small, 50 large)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="WHO", help="contenders whose names begin so, beside the base")
    request = parser.parse_args()
    document: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "results": []}
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        paths = {}
        for kind in request.folders:
            height, width, count = FOLDERS[kind]
            paths[kind] = draw(room / kind, height, width, request.images or count)
        for name in request.models:
            at = save(name, room / name)
            wanted = tuple(request.only or ("",))
            everybody = {
                who: run for who, run in contenders(name, *at, room / name) if who == BASE or who.startswith(wanted)
            }
            for kind in request.folders:
                rows = compare(everybody, paths[kind], request.rounds)
                parts = {part: round(value, 2) for part, value in shares(load(at[0]), paths[kind][0]).items()}
                document["results"].append({"model": name, "folder": kind, "milliseconds": parts, "rows": rows})
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
