"""A fresh process to its first answer: a saved ViT-B/16 here, beside transformers' pipeline and timm, same weights.

    python benchmarks/first_answer.py [--rounds 5]

All read the same image file, in turns, so that a busy machine disturbs them alike; the ratios of medians are what
counts. The measure is a process that does nothing but import torch, and the time of one forward pass; for memory, what
that import needs, and the weights. Needs timm and transformers, and bytecode compiled for every package (`make setup`
does so).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

CODE = {
    "sightline": """
import sys, sightline
print(sightline.load(sys.argv[1] + "/ours").predict([sys.argv[2]])[0].label)
""",
    "transformers": """
import sys
from transformers import pipeline
print(pipeline("image-classification", sys.argv[1] + "/theirs")(sys.argv[2])[0]["label"])
""",
    "timm": """
import sys, timm, torch
from PIL import Image
network = timm.create_model("vit_base_patch16_224", checkpoint_path=sys.argv[1] + "/timm.safetensors").eval()
half = (0.5, 0.5, 0.5)
how = {"interpolation": "bilinear", "crop_mode": "squash", "crop_pct": 1, "mean": half, "std": half}
change = timm.data.create_transform((3, 224, 224), **how)
with torch.inference_mode():
    print("class", network(change(Image.open(sys.argv[2]).convert("RGB"))[None]).argmax().item())
""",
    "import torch": "import torch",
}


def measured(code: str, *arguments: str) -> tuple[float, float, str]:
    """How many seconds a fresh process takes, how many megabytes at most, and what it prints."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    said = process.stdout.read().decode().strip()
    process.stdout.close()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, code
    return time.perf_counter() - began, used.ru_maxrss / 1e3, said


def main() -> None:
    """Measures and prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.jpg"
        # In another process: the kernel counts what this one has as memory of those that it starts.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            forward, weights = pool.submit(_save, Path(folder)).result()
        noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image, quality=90)
        found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in CODE}
        for _ in range(rounds):
            for name, code in CODE.items():
                found[name].append(measured(code, folder, str(image)))
    seconds = {name: statistics.median(one[0] for one in all_) for name, all_ in found.items()}
    memory = {name: statistics.median(one[1] for one in all_) for name, all_ in found.items()}
    least, room = seconds["import torch"] + forward, memory["import torch"] + weights
    contenders = [name for name in CODE if name != "import torch"]
    print(
        json.dumps(
            {
                "seconds": {name: round(value, 2) for name, value in seconds.items()},
                "spread": {
                    name: [round(min(one[0] for one in all_), 2), round(max(one[0] for one in all_), 2)]
                    for name, all_ in found.items()
                },
                "one forward": round(forward, 3),
                "over import torch and one forward": {name: round(seconds[name] / least, 2) for name in contenders},
                "megabytes": {name: round(value) for name, value in memory.items()},
                "megabytes of the weights": round(weights),
                "over import torch and the weights": {name: round(memory[name] / room, 2) for name in contenders},
                "answers": sorted({one[2] for name in contenders for one in found[name]}),
            },
            indent=1,
        )
    )


def _save(folder: Path) -> tuple[float, float]:
    """One ViT-B/16 of random weights in three layouts; the seconds of a forward pass, and the weights' megabytes."""
    import torch

    import sightline
    from sightline.checkpoints.convert import convert
    from sightline.images.preprocess import Preprocess

    torch.manual_seed(0)
    network = sightline.create_model("vit_base_patch16_224").eval()
    torch.nn.init.normal_(network.head.classifier.weight, std=0.05)
    half = (0.5, 0.5, 0.5)
    preprocess = Preprocess((224, 224), resize="squash", interpolation="bilinear", mean=half, std=half)
    sightline.Model(network, preprocess, tuple(f"class {i}" for i in range(1000))).save(folder / "ours")
    convert(str(folder / "ours"), "transformers", folder / "theirs")
    convert(str(folder / "ours"), "timm", folder / "timm.safetensors")
    pixels = torch.zeros(1, 3, 224, 224)
    times = []
    with torch.inference_mode():
        for _ in range(6):
            began = time.perf_counter()
            network(pixels)
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), sum(values.nbytes for values in network.state_dict().values()) / 1e6


if __name__ == "__main__":
    main()
