"""What is learned from scenes in a few minutes: boxes, pixels, and words for what was never shown.

    python benchmarks/scenes.py [--minutes 15] [--tasks detect segment clip] [--seed 0] [--out runs/scenes-benchmark]

Each task is learned by `sightline train builtin:scenes:images=20000 --task TASK --minutes M`, told nothing else, and
judged on the 500 scenes that it has not seen. `clip` learns from scenes of one or two objects, and is also judged on
single ones, asked for by colour and shape: those that were shown, the six pairs that were not, and these again among
all thirty. Prints every answer as JSON; models and reports stay in the folder.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPTS = "a large {}|a middle-sized {}|a small {}"


def sightline(*words: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "sightline", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--tasks", nargs="+", default=["detect", "segment", "clip"])
    parser.add_argument("--images", type=int, default=20_000, help="scenes to learn from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes-benchmark"))
    told = parser.parse_args()
    for task in told.tasks:
        out = told.out / task
        words = ("--task", task, "--minutes", told.minutes, "--seed", told.seed, "--out", out)
        few = ",objects=2" if task == "clip" else ""
        found = sightline("train", f"builtin:scenes:images={told.images}{few}", *words)
        print(json.dumps({"task": task, "minutes": told.minutes, "metrics": found["metrics"]}), flush=True)
        for pairs in ("seen", "unseen", "unseen,choices=all") if task == "clip" else ():
            found = sightline("evaluate", out, f"builtin:objects:pairs={pairs}", "--prompts", PROMPTS)
            print(json.dumps({"pairs": pairs, "metrics": found["metrics"]}), flush=True)


if __name__ == "__main__":
    main()
