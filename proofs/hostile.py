"""Runs hostile and awkward inputs through every entry point, and holds what happens against the promises.

    python proofs/hostile.py [DIR] [--families image,fs,archive,dataset,ckpt,config] [--keep]

DIR holds inputs with their `manifest.json` as `tests/badinputs.py` makes them; without it the public ones are made.
Each run is a forked process in an empty folder, with at most 4 GB of address space (or half a gigabyte more than the
libraries map by themselves) and, for the superuser, without the right to read what is closed. Images and odd files go
through `predict` one by one, and together through `check`, `train` (0 and 2 worker processes) and `evaluate`, where
every file's seconds and memory are measured inside the reader. An item is met if its `expect` and `check` hold, within
`max_s` and `max_mb`. No socket is opened, no module of an input imported, nothing written elsewhere, no canary left.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["SIGHTLINE_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from bench import Bench, shown  # the programs beside this one
from entries import NETWORK, datasets, models, predict, together
from PIL import Image

import badinputs
from sightline.checkpoints import convert as _convert  # noqa: F401  (whatever a child needs is there before it forks)
from sightline.recipes import check as _check  # noqa: F401
from sightline.recipes import evaluate as _evaluate  # noqa: F401
from sightline.recipes import train as _train  # noqa: F401

FAMILIES = ("image", "fs", "archive", "dataset", "ckpt", "config")
CANARY = "BADINPUT_CANARY_"

torch.set_num_threads(1)


def tree(root: Path) -> dict[str, str]:
    """What lies below a folder, with the digests of what can be read."""
    found = {}
    for here, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(here) / name
            mode = path.lstat().st_mode
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else ""
            found[str(path)] = f"{mode:o} {digest}"
    return found


def roots() -> set[str]:
    """Names in the root and the temporary folder, where whatever escapes would turn up."""
    return {str(path) for root in ("/", tempfile.gettempdir()) for path in Path(root).iterdir()}


def main_proof() -> int:
    """Runs the proof; 1 where anything was not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "kit", nargs="?", help="inputs with a manifest.json; left out (or none), the public ones are made"
    )
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--keep", action="store_true", help="leave the folder of the runs")
    request = parser.parse_args()
    began = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="hostile-")).resolve()
    kit = Path(request.kit).resolve() if request.kit not in (None, "none") else place / "kit"
    if not (kit / "manifest.json").exists():
        badinputs.public(str(kit))
    families = request.families.split(",")
    items = [item for item in json.loads((kit / "manifest.json").read_text())["items"] if item["family"] in families]
    bench = Bench(kit, place, items)
    warnings.simplefilter("ignore")
    platform.platform()  # asks a program once, and remembers
    photos = bench.place / "photos"
    for part in ("train", "val"):
        for label in "abcd":
            (photos / part / label).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((24, 32, 3), 40 * i + ord(label), np.uint8)).save(
                    photos / part / label / f"{i}.jpg"
                )
    two = bench.place / "two"
    for part in ("train", "val"):
        for label in "ab":
            shutil.copytree(photos / part / label, two / part / label)
    base = ("--model", "vit_tiny_patch16_224", *NETWORK, "--epochs", 2, "--workers", 0, "--batch-size", 4, "--json")
    before = {name: tree(folder) for name, folder in (("kit", kit), ("photos", photos))}
    outside = roots()
    said = bench.command("train", two, *base, "--out", "run")
    assert said.status == 0, said.text
    model = bench.place / "run1" / "run"
    if {"image", "fs"} & set(families):
        predict(bench, model)
        together(bench, model)
    if {"archive", "dataset"} & set(families):
        datasets(bench)
    if {"ckpt", "config"} & set(families):
        said = bench.command("train", photos, *base, "--out", "run", "--save-seconds", 0.000001)
        assert said.status == 0, said.text
        models(bench, bench.place / f"run{bench.runs}" / "run", photos)
    after = {name: tree(folder) for name, folder in (("kit", kit), ("photos", photos))}
    changed = [name for name in before if before[name] != after[name]]
    canaries = [name for name in (*tree(place), *roots()) if CANARY in name]
    strangers = roots() - outside
    report(bench)
    print(
        f"canaries: {len(canaries)} {canaries[:3]}; inputs changed: {changed or 'none'}; runs: {bench.runs}; "
        f"new names in / and the temporary folder (of others, perhaps): {len(strangers)}; "
        f"{time.monotonic() - began:.0f} s"
    )
    if not request.keep:
        shutil.rmtree(place, ignore_errors=True)
    return 1 if bench.failures or canaries or changed else 0


def report(bench: Bench) -> None:
    """The table, and every failure."""
    print(f"{'family':10} {'entry point':18} {'met':>9}   {'slowest':>8} {'largest':>8}")
    for (family, entry), total in bench.total.items():
        seconds, megabytes = bench.slowest[family, entry]
        cost = f"{seconds:7.2f}s {megabytes:6.0f}MB" if seconds else ""
        print(f"{family:10} {entry:18} {bench.met[family, entry]:4}/{total:<4}   {cost}")
    for failure in bench.failures:
        print(f"  {shown(failure)[:400]}")


if __name__ == "__main__":
    sys.exit(main_proof())
