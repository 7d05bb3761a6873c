"""What saving costs a training: the state of a ViT-S/16 with AdamW and an average of weights, on a CPU.

    python benchmarks/saving.py [--batch 16] [--rounds 3]

Measured: steps of a training with the command's own parts, alone and while a checkpoint is being written beside them,
and how long the training stands still to copy the tensors. Computed: the share of the time at one save per 100 steps,
which is the standstill plus whatever the steps beside the writing take longer.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import sightline
from sightline.objectives.supervised import Supervised
from sightline.training.average import Average
from sightline.training.distributed import World
from sightline.training.saver import Saver
from sightline.training.schedule import Plan
from sightline.training.settings import Settings
from sightline.training.snapshot import expected_size, snapshot
from sightline.training.state import State, Store
from sightline.training.update import Updater
from sightline.types import Batch

EVERY = 100


def main() -> None:
    """Measures and prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images per step; a smaller one makes saving look dearer")
    parser.add_argument("--rounds", type=int, default=3)
    request = parser.parse_args()
    torch.manual_seed(0)
    settings, network = Settings(ema=0.999), sightline.create_model("vit_small_patch16_224", 1000)
    objective, average = Supervised(network).train(), Average(network, 0.999)
    updater = Updater(objective, settings, World(0, 1, torch.device("cpu")), torch.float32)
    count = request.batch
    index = torch.arange(count)
    batch = Batch(torch.randn(count, 3, 224, 224), index % 1000, index, index)
    step, state = 0, State(Plan(10**6))

    def one() -> float:
        nonlocal step
        began = time.perf_counter()
        updater(batch, step, 1e-4)
        average.update(network, step)
        step += 1
        return time.perf_counter() - began

    alone, standing, slower, writing = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Store(Path(folder)))
        for _ in range(2):
            one()
        for _ in range(request.rounds):
            before = [one(), one()]
            began = time.perf_counter()
            state.step = step
            saver.start(state, snapshot(objective, average, updater))
            standing.append(time.perf_counter() - began)
            beside = []
            while saver.busy:
                beside.append(one())
            writing.append(time.perf_counter() - began)
            saver.wait()
            usual = statistics.mean([*before, one(), one()])
            alone.append(usual)
            slower.append(sum(beside) - len(beside) * usual)
    usual = statistics.median(alone)
    cost = statistics.median(standing) + statistics.median(slower)
    document = {
        "state, MB": round(expected_size(objective, average, settings) / 1e6),
        "images per step": request.batch,
        "step alone, s": round(usual, 3),
        "standing still to copy, s": round(statistics.median(standing), 4),
        "steps beside the writing longer by, s": round(statistics.median(slower), 3),
        "save done after at most, s": round(statistics.median(writing), 2),
        f"share of the time at one save per {EVERY} steps": f"{cost / (EVERY * usual):.2%}",
        "share of one step": f"{cost / usual:.1%}",
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
