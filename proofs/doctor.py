"""Faults planted into small trainings, the step at which the doctor names each, and what it says of healthy ones.

    python proofs/doctor.py [--quick] [--only WORD]

Every run is a whole `sightline.train` on this machine's processor, of some seconds; healthy ones take longer. Exits
with status 1 where a fault is not named or a healthy run gets a finding.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import sightline
from sightline.datasets.digits import digits
from sightline.datasets.folder import write_images
from sightline.errors import UserError, WorkError
from sightline.objectives.supervised import Supervised
from sightline.types import Batch, Step

SMALL: dict[str, Any] = {"workers": 0, "network": {"embed_dim": 32, "depth": 2, "num_heads": 2}}
STILL = {"degrees": 0.0, "translate": 0.0, "shear": 0.0, "zoom": (1.0, 1.0)}
PLAIN: dict[str, Any] = {"mixup": 0.0, "smoothing": 0.0, "augment": STILL, "lr": 1e-3}

Run = Callable[[Path], Any]


def drawn(root: Path, counts: dict[str, int], *, val: float = 0.25, noise: int = 60) -> Path:
    """Gratings whose direction and period are the class, in noise: learnable, and not at a glance."""
    random, size = np.random.default_rng(0), 16
    y, x = np.mgrid[:size, :size]
    for number, (name, count) in enumerate(counts.items()):
        angle, period = np.pi * number / len(counts), 4 + 2 * (number % 3)
        held = max(round(count * val), 2)
        for i in range(count + held):
            wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + random.uniform(0, 6.3))
            picture = 128 + 60 * wave[:, :, None] + random.normal(0, noise, (size, size, 3))
            _write(root, "train" if i < count else "val", name, i, picture)
    return root


def blank(root: Path, classes: int, count: int) -> Path:
    """Grey pictures that say nothing of their class."""
    for part, number in (("train", count), ("val", count // 3)):
        for name in range(classes):
            for i in range(number):
                _write(root, part, f"class-{name}", i, np.full((16, 16, 3), 120 + i % 16))
    return root


def shuffled(root: Path, source: Path) -> Path:
    """The training images of a folder with their labels exchanged at random; the held-out part stays as it is."""
    paths = sorted((source / "train").glob("*/*.png"))
    names = np.random.default_rng(1).permutation([path.parent.name for path in paths])
    held = sorted((source / "val").glob("*/*.png"))
    parts = {"train": zip(paths, names, strict=True), "val": ((path, path.parent.name) for path in held)}
    for part, chosen in parts.items():
        for i, (path, name) in enumerate(chosen):
            target = root / part / name / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return root


def large(root: Path) -> Path:
    """Smooth pictures of nine million pixels: slow to decode, and read at 24 pixels."""
    ramp = np.linspace(0, 255, 3000).astype(np.uint8)
    for part, count in (("train", 8), ("val", 2)):
        for number, name in enumerate(("along", "across")):
            for i in range(count):
                plane = np.broadcast_to(ramp[:, None] if number else ramp[None, :], (3000, 3000))
                _write(root, part, name, i, np.stack([plane, plane, plane + np.uint8(i)], axis=-1))
    return root


def _write(root: Path, part: str, name: str, number: int, picture: np.ndarray) -> None:
    path = root / part / name / f"{number:04}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path, compress_level=1)


def planted_heads(source: Path, target: Path, fault: str) -> Path:
    """A model whose second layer's first head is collapsed or dead."""
    model = sightline.load(source)
    attention = model.network.backbone.encoder.blocks[1].attention
    width = attention.qkv.weight.shape[1]
    head = slice(0, width // attention.heads)
    with torch.no_grad():
        if fault == "collapsed":
            # Queries are a constant and keys grow with one coordinate of the token: the largest takes everything.
            attention.qkv.weight[head] = 0.0
            attention.qkv.bias[head] = 1e3
            attention.qkv.weight[width : 2 * width][head] *= 1e3
        else:
            attention.qkv.weight[2 * width :][head] = 0.0
            attention.qkv.bias[2 * width :][head] = 0.0
            attention.out.weight[:, head] = 0.0
    model.save(target)
    return target


@contextmanager
def poisoned() -> Generator[None]:
    """The loss of batches that hold one of ten images is NaN."""
    plain = Supervised.forward

    def forward(self: Supervised, batch: Batch) -> Step:
        step = plain(self, batch)
        return step._replace(loss=step.loss * float("nan")) if bool((batch.index < 10).any()) else step

    Supervised.forward = forward
    try:
        yield
    finally:
        Supervised.forward = plain


def train(data: str | Path, out: Path, **settings: Any) -> dict[str, Any]:
    """The record of a run, finished or given up."""
    try:
        sightline.train(data, out=out, **settings)
    except (WorkError, UserError) as fault:
        if not (out / "run.json").exists():
            return {"findings": [], "refusal": str(fault)}
    return json.loads((out / "run.json").read_text())


def faults(home: Path) -> dict[str, tuple[str, Callable[[Path], dict[str, Any]]]]:
    """Planted faults: in words, the finding that has to come, and the run."""
    settings = {**SMALL, "epochs": 20}
    coarse = {**SMALL, "network": {**SMALL["network"], "patch_size": 12}}

    def four() -> Path:
        return drawn(home / "four", dict.fromkeys("abcd", 60))

    def poisonous(out: Path) -> dict[str, Any]:
        with poisoned():
            return train(four(), out, **settings)

    def started(fault: str) -> Path:
        if not (home / "start").exists():
            sightline.train(four(), out=home / "start", **SMALL, epochs=3)
        return planted_heads(home / "start", home / fault, fault)

    def alone(out: Path) -> dict[str, Any]:
        for part in ("train", "val"):
            _write(home / "one", part, "only", 0, np.zeros((16, 16, 3)))
        return train(home / "one", out, **SMALL)

    def tuned(fault: str, out: Path) -> dict[str, Any]:
        return train(four(), out, workers=0, weights=started(fault), epochs=6, batch_size=30)

    def noisy() -> Path:
        return drawn(home / "noisy", dict.fromkeys("abcd", 15), val=3, noise=160)

    def skewed() -> Path:
        return drawn(home / "skewed", {"common": 380, "rare": 12}, noise=200)

    return {
        "images without content": (
            "loss-at-chance",
            lambda out: train(blank(home / "blank", 4, 48), out, **SMALL, epochs=25),
        ),
        "rate rises to 0.3 after learning": (
            "divergence",
            lambda out: train(four(), out, **settings, lr=0.3, warmup=0.9, clip_grad=1e9),
        ),
        "SGD at rate 3, gradients not clipped": (
            "not-finite",
            lambda out: train(four(), out, **settings, optimizer="sgd", lr=3.0, clip_grad=1e9, warmup=0.0),
        ),
        "NaN in one image of 24": ("not-finite", poisonous),
        "60 images in much noise, 80 epochs": (
            "over-fitting",
            lambda out: train(noisy(), out, **SMALL | PLAIN, epochs=80, batch_size=20),
        ),
        "a head that sees one token": ("collapsed-heads", lambda out: tuned("collapsed", out)),
        "a head without values": ("dead-heads", lambda out: tuned("dead", out)),
        "patches of 12 in 24 pixels": ("patch-too-large", lambda out: train(four(), out, **coarse, epochs=1)),
        "AdamW at rate 1": ("learning-rate-too-high", lambda out: train(four(), out, **settings, lr=1.0)),
        "AdamW at rate 0.1": ("learning-rate-too-high", lambda out: train(four(), out, **settings, lr=0.1)),
        "AdamW at rate 1e-7": ("learning-rate-too-low", lambda out: train(four(), out, **settings, lr=1e-7)),
        "SGD at rate 1e-5": (
            "learning-rate-too-low",
            lambda out: train(four(), out, **settings, optimizer="sgd", lr=1e-5),
        ),
        "shuffled labels, learned by heart": (
            "shuffled-labels",
            lambda out: train(
                shuffled(home / "heart", drawn(home / "fewer", dict.fromkeys("abcd", 30), val=2)),
                out,
                **SMALL | PLAIN,
                epochs=40,
                batch_size=20,
            ),
        ),
        "shuffled labels, never learned": (
            "shuffled-labels",
            lambda out: train(shuffled(home / "strays", files(home / "digits")), out, **SMALL, epochs=16),
        ),
        "all labels alike": ("constant-labels", alone),
        "97 of 100 images in one class": ("class-imbalance", lambda out: train(skewed(), out, **SMALL, epochs=1)),
        "the same, and nothing else is learned": (
            "majority-collapse",
            lambda out: train(skewed(), out, **SMALL, epochs=12),
        ),
        "pictures of 9 million pixels": (
            "slow-input",
            lambda out: train(large(home / "large"), out, **SMALL, epochs=12),
        ),
    }


def files(root: Path) -> Path:
    """Digits as files."""
    images = digits()
    write_images(images.select(np.arange(1000)), root / "train")
    write_images(images.select(np.arange(1000, 1300)), root / "val")
    return root


def healthy(home: Path) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Runs with nothing wrong."""
    four = drawn(home / "four", dict.fromkeys("abcd", 60))

    def base() -> Path:
        if not (home / "base").exists():
            sightline.train("builtin:digits", out=home / "base", **SMALL, epochs=5)
        return home / "base"

    return {
        "digits, shipped recipe, 1 epoch": lambda out: train("builtin:digits", out, epochs=1),
        "digits, shipped recipe, 3 epochs": lambda out: train("builtin:digits", out, epochs=3),
        "digits, mixup 1, CutMix 1, smoothing 0.2": lambda out: train(
            "builtin:digits", out, **SMALL, epochs=10, mixup=1.0, cutmix=1.0, smoothing=0.2
        ),
        "digits, half of the run warm-up": lambda out: train("builtin:digits", out, **SMALL, epochs=10, warmup=0.5),
        "digits, SGD": lambda out: train("builtin:digits", out, **SMALL, epochs=30, optimizer="sgd", lr=0.02),
        "digits, average of weights": lambda out: train("builtin:digits", out, **SMALL, epochs=8, ema=0.99),
        "four classes, recipe but 40 epochs": lambda out: train(four, out, workers=0, epochs=40),
        "four classes, 2 epochs": lambda out: train(four, out, **SMALL, epochs=2),
        "four classes, batches of 2": lambda out: train(four, out, **SMALL, epochs=5, batch_size=2, lr=1e-3),
        "two classes": lambda out: train(drawn(home / "two", {"a": 80, "b": 80}), out, **SMALL, epochs=30),
        "two classes of 10 images": lambda out: train(
            drawn(home / "tiny", {"a": 10, "b": 10}), out, **SMALL, epochs=30
        ),
        "40 classes": lambda out: train(
            drawn(home / "many", {f"{i}": 20 for i in range(40)}, noise=20), out, **SMALL, epochs=30
        ),
        "classes of 200, 60 and 25 images": lambda out: train(
            drawn(home / "uneven", {"a": 200, "b": 60, "c": 25}), out, **SMALL, epochs=25
        ),
        "fine-tuned from weights": lambda out: train(four, out, workers=0, epochs=12, weights=base()),
        "fine-tuned as published": lambda out: train(
            four, out, workers=0, weights=base(), recipe="fine-tune-as-published", epochs=40
        ),
        "digits, shipped recipe, whole": lambda out: train("builtin:digits", out),
    }


def main() -> int:
    """Runs what was asked for and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the long healthy run")
    parser.add_argument("--only", default="", metavar="WORD", help="runs with this word in their name")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs in this folder")
    request = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = request.keep or Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        return int(_faults(home, request.only) + _healthy(home, request.only, request.quick) > 0)


def _faults(home: Path, only: str) -> int:
    missed = 0
    print("| planted fault | has to be named | named at step | of | also named | seconds |\n|---|---|---|---|---|---|")
    for number, (name, (kind, run)) in enumerate(faults(home).items()):
        if only in name:
            began = time.monotonic()
            record = run(home / f"fault-{number}")
            steps = {f["kind"]: f["step"] for f in record["findings"]}
            named = steps.pop(kind, None)
            if kind == "constant-labels" and "only one class" in record.get("refusal", ""):
                named = "refused"
            missed += named is None
            others = ", ".join(f"{other} ({step})" for other, step in steps.items()) or "–"
            shown, seconds = "MISSED" if named is None else named, time.monotonic() - began
            print(f"| {name} | {kind} | {shown} | {record.get('steps', '–')} | {others} | {seconds:.0f} |", flush=True)
    return missed


def _healthy(home: Path, only: str, quick: bool) -> int:
    alarms = 0
    print("\n| healthy run | steps | top-1 (%) | findings | seconds |\n|---|---|---|---|---|")
    for number, (name, run) in enumerate(healthy(home).items()):
        if only in name and not (quick and "whole" in name):
            began = time.monotonic()
            record = run(home / f"healthy-{number}")
            found = ", ".join(f"{f['kind']} ({f['step']})" for f in record["findings"]) or "none"
            alarms += bool(record["findings"])
            top1, seconds = 100 * record["metrics"]["top1"], time.monotonic() - began
            print(f"| {name} | {record['steps']} | {top1:.1f} | {found} | {seconds:.0f} |", flush=True)
    return alarms


if __name__ == "__main__":
    sys.exit(main())
