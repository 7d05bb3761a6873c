"""How fast `builtin:fractals` is drawn, beside how fast small networks learn from it; and a sheet to look at.

    python benchmarks/fractals.py [--rounds 5] [--sheet FILE.jpg]

One process, one thread. Drawing and learning take turns within each round, so that whatever else the machine does falls
on both; the table has the median over rounds of the pictures a second of each, and of their ratio.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sightline.datasets.fractals import Artist
from sightline.network import describe
from sightline.recipes.pace import measure
from sightline.training.settings import Settings

LEARNERS = {
    32: ("vit_pico_patch4_32", {"tokenizer": "convolution"}),
    64: ("vit_pico_patch4_32", {"tokenizer": "convolution", "patch_size": 8, "image_size": 64}),
    224: ("vit_tiny_patch16_224", {}),
}
KINDS = ("ifs", "ifs3d", "contour", "one")


def drawn(kind: str, size: int, seconds: float = 1.0) -> float:
    """Pictures a second: of 50 classes in turn, whose formulas are known, as they are after the first epoch."""
    artist, count = Artist(0, kind, size), 0
    for chosen in range(50):
        artist(chosen << 32)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        artist((count % 50 << 32) | count)
        count += 1
    return count / (time.perf_counter() - began)


def learned(size: int) -> float:
    """Pictures a second that a network learns from."""
    name, settings = LEARNERS[size]
    batch = Settings(batch_size=64, optimizer="muon")
    network = describe(name, 400, **settings).build()
    return batch.batch_size / measure(network, batch, torch.device("cpu"), torch.float32)


def sheet(file: Path, size: int = 96, instances: int = 2) -> None:
    """Ten classes of each kind, a column for each, in a few instances."""
    rows = [
        np.concatenate([Artist(0, kind, size)((chosen << 32) | i) for chosen in range(10)], axis=1)
        for kind in KINDS
        for i in range(instances)
    ]
    Image.fromarray(np.concatenate(rows)).save(file, quality=88)


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sheet", type=Path)
    request = parser.parse_args()
    torch.set_num_threads(1)
    if request.sheet:
        sheet(request.sheet)
    print(f"| side | {' | '.join(KINDS)} | learning | ifs / learning |\n|---|{'---|' * (len(KINDS) + 2)}")
    for size in LEARNERS:
        rounds = [([drawn(kind, size) for kind in KINDS], learned(size)) for _ in range(request.rounds)]
        rates = [statistics.median(rates) for rates in zip(*(draws for draws, _ in rounds), strict=True)]
        pace, ratio = (statistics.median(v) for v in zip(*((p, d[0] / p) for d, p in rounds), strict=True))
        print(f"| {size} | {' | '.join(f'{rate:.0f}' for rate in rates)} | {pace:.0f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
