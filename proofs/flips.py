"""Damages a run's checkpoint and a model directory, bit by bit and block by block, and counts what goes unnoticed.

    python proofs/flips.py [--quick] [--seed N]

Noticed means refused with a message that names the file. Every single file whose bits change what a run continues
with or what a model answers takes part: the tensors and the sealed manifest of a checkpoint, the record of the run,
the weights and the configuration of a model. Which bit, cut or pair of blocks is drawn evenly over their bytes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sightline.checkpoints.directory import write_model
from sightline.checkpoints.load import load_bundle
from sightline.errors import UserError
from sightline.images.preprocess import Preprocess
from sightline.network import create_model
from sightline.training.run import RunFolder
from sightline.training.schedule import Plan
from sightline.training.state import State, Store

BLOCK = 512

Damage = Callable[[bytes, np.random.Generator], bytes]


def flip(data: bytes, random: np.random.Generator) -> bytes:
    """One bit the other way."""
    at = int(random.integers(len(data)))
    return data[:at] + bytes([data[at] ^ 1 << int(random.integers(8))]) + data[at + 1 :]


def cut(data: bytes, random: np.random.Generator) -> bytes:
    """Only the beginning."""
    return data[: int(random.integers(len(data)))]


def swap(data: bytes, random: np.random.Generator) -> bytes:
    """Two blocks of a file (or halves, of a short one) in each other's place; drawn again where they are equal."""
    block = min(BLOCK, len(data) // 2)
    for _ in range(1000):
        first, second = sorted(block * int(n) for n in random.choice(len(data) // block, 2, replace=False))
        parts = data[first : first + block], data[second : second + block]
        if parts[0] != parts[1]:
            break
    return data[:first] + parts[1] + data[first + block : second] + parts[0] + data[second + block :]


def checkpoint(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    """The full state of a small run, and what reads it."""
    network = create_model("vit_tiny_patch16_224", 10, 32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    tensors = {f"objective.network.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"optimizer.{i}.exp_avg": torch.randn_like(p) for i, p in enumerate(network.parameters())}
    store, run = Store(folder / "checkpoints"), RunFolder(folder)
    store.save(State(Plan(1000), step=120, seconds=3.5, best=0.91, metrics={"top1": 0.9, "loss": 0.31}), tensors)
    data = {"source": "data/pets", "fingerprint": {"train": "0" * 64, "val": "1" * 64}}
    run.write({"status": "begun", "seed": 0, "data": data, "recipe": {"settings": {"lr": 1e-3, "epochs": 20}}})
    files = [run.record_file, *(folder / "checkpoints").glob("step-*")]
    return files, lambda: (run.read(), store.newest())


def model(folder: Path) -> tuple[list[Path], Callable[[], object]]:
    """A small model directory, and what reads it."""
    network = create_model("vit_tiny_patch16_224", 10, 32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    labels = [f"class {i}" for i in range(10)]
    write_model(folder, network, Preprocess((32, 32), resize="squash"), labels)
    return [folder / "config.json", folder / "model.safetensors"], lambda: load_bundle(folder)


def unnoticed(files: list[Path], read: Callable[[], object], damage: Damage, times: int, seed: int) -> list[str]:
    """Which of so many damages passed: the names of the files, and the trial."""
    random, whole = np.random.default_rng(seed), {path: path.read_bytes() for path in files}
    shares = np.array([len(data) for data in whole.values()], dtype=float)
    passed = []
    for trial in range(times):
        path = files[random.choice(len(files), p=shares / shares.sum())]
        path.write_bytes(damage(whole[path], random))
        try:
            read()
            passed.append(f"{path.name} ({trial})")
        except UserError as refusal:
            if path.stem not in str(refusal):
                passed.append(f"{path.name} ({trial}) is not named: {refusal}")
        path.write_bytes(whole[path])
    read()
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage that must be noticed.")
    parser.add_argument("--quick", action="store_true", help="one in fifty of the trials")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    missed = 0
    print(f"{'what':<16} {'damage':<14} {'trials':>7} {'noticed':>9} {'seconds':>8}")
    for make in (checkpoint, model):
        for damage, times in ((flip, 10_000), (cut, 1_000), (swap, 1_000)):
            times = times // 50 if asked.quick else times
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                passed = unnoticed(*make(Path(folder)), damage, times, asked.seed)
            share = f"{100 * (times - len(passed)) / times:.6g} %"
            took = time.monotonic() - began
            print(f"{make.__name__:<16} {damage.__name__:<14} {times:>7} {share:>9} {took:>8.1f}", flush=True)
            for line in passed[:10]:
                print(f"  unnoticed: {line}")
            missed += len(passed)
    raise SystemExit(int(missed > 0))


if __name__ == "__main__":
    main()
