"""A fresh process to its first answer: a saved ViT-B/16 here, beside transformers' pipeline on the same weights.

    python benchmarks/first_answer.py [--rounds 5]

Both read the same image file, in turns, so that a busy machine disturbs both alike; the ratio of medians is what
counts. Needs transformers, and bytecode compiled for every package (`make setup` does so).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

OURS = """
import sys, sightline
print(sightline.load(sys.argv[1]).predict([sys.argv[2]])[0].label)
"""
THEIRS = """
import sys
from transformers import pipeline
print(pipeline("image-classification", sys.argv[1])(sys.argv[2])[0]["label"])
"""
IMPORT = "import torch"


def seconds(code: str, *arguments: str) -> tuple[float, str]:
    """How long a fresh process takes, and what it prints."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout.strip()


def main() -> None:
    """Measures and prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, image = Path(folder) / "ours", Path(folder) / "theirs", Path(folder) / "image.jpg"
        _save(ours, theirs)
        noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image, quality=90)
        times: dict[str, list[float]] = {"sightline": [], "transformers": [], "import torch": []}
        answers = set()
        for _ in range(rounds):
            for name, code, model in (("sightline", OURS, ours), ("transformers", THEIRS, theirs)):
                spent, answer = seconds(code, str(model), str(image))
                times[name].append(spent)
                answers.add(answer)
            times["import torch"].append(seconds(IMPORT)[0])
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "seconds": {name: round(value, 2) for name, value in medians.items()},
                "spread": {name: [round(min(v), 2), round(max(v), 2)] for name, v in times.items()},
                "transformers / sightline": round(medians["transformers"] / medians["sightline"], 2),
                "sightline / import torch": round(medians["sightline"] / medians["import torch"], 2),
                "same answer": len(answers) == 1,
            },
            indent=1,
        )
    )


def _save(ours: Path, theirs: Path) -> None:
    """One ViT-B/16 of random weights, in both layouts."""
    import torch

    import sightline
    from sightline.checkpoints.convert import convert
    from sightline.images.preprocess import Preprocess

    torch.manual_seed(0)
    network = sightline.create_model("vit_base_patch16_224", norm_eps=1e-12)
    torch.nn.init.normal_(network.head.classifier.weight, std=0.05)
    half = (0.5, 0.5, 0.5)
    preprocess = Preprocess((224, 224), resize="squash", interpolation="bilinear", mean=half, std=half)
    sightline.Model(network.eval(), preprocess, tuple(f"class {i}" for i in range(1000))).save(ours)
    convert(str(ours), "transformers", theirs)


if __name__ == "__main__":
    main()
