"""SIGKILL at random moments of short trainings, `--resume` after each: every run has to end with the same bits.

    python proofs/kills.py [--kills 200] [--length 1] [--quick] [--seed 0]

Every training is the command itself, in a process forked from this one so that no time goes into importing, with its
reading processes in one group that is killed as a whole. The moment is drawn evenly over the life of an undisturbed
run, its start and its report included; a little later each time, so that a run ends also where the machine has become
slower. Compared with the undisturbed run: the weights, everything in the last checkpoint (weights, their average, the
optimiser's moments, the place in the plan, the best score, images that could not be read), `metrics.jsonl`, the record,
and predictions. The status is 1 where anything differs.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import sightline
from sightline.checkpoints.sealed import SEAL
from sightline.cli.main import main as command
from sightline.recipes import train  # noqa: F401  (imported here, so that no forked process has to)

SMALL = ("--embed-dim", 32, "--depth", 3, "--num-heads", 2, "--drop-path-rate", 0.2, "--save-seconds", 0.2)
SMALL += ("--lr", 0.003, "--threads", 1, "--horizontal-flip", 0, "--vertical-flip", 0)
HARD = ("--mixup", 0.3, "--cutmix", 0.5, "--smoothing", 0.1, "--ema", 0.95)


class Case(NamedTuple):
    """One training: its name, and the words of its command but for `--out` and `--resume`."""

    name: str
    words: tuple


def cases(data: Path, length: float) -> list[Case]:
    """The trainings; `length` stretches them."""
    digits = ("builtin:digits", "--workers", 0, "--batch-size", 64, *HARD)
    files = (data, "--workers", 2, "--batch-size", 16, "--refused-limit", 0.1)
    native = ("--resize", "native", "--micro-batch", 10, "--ema", 0.9)
    early = ("--optimizer", "sgd", "--patience", 9)
    return [
        Case("digits, repeats, 0 workers", (*digits, "--repeats", 2, "--epochs", 12 * length)),
        Case("files, one unreadable, 2 workers", (*files, *HARD, "--epochs", 40 * length)),
        Case("files of own shapes, micro-batches, 2 workers", (*files, *native, "--epochs", 24 * length)),
        Case("digits, patience, SGD, 0 workers", (*digits, *early, "--epochs", 10 * length)),
    ]


def draw(folder: Path) -> None:
    """96 small pictures of three classes, of unlike shapes, one of them damaged."""
    random = np.random.default_rng(0)
    for i in range(96):
        height, width = random.integers(20, 40, 2)
        pixels = random.integers(0, 120, (height, width, 3), dtype=np.uint8)
        pixels[height // 4 : height // 2, width // 4 : width // 2, i % 3] = 250
        file = folder / f"class {i % 3}" / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    damaged = folder / "class 0" / "00.png"
    damaged.write_bytes(damaged.read_bytes()[:200])


def begin(words: list[object], log: Path) -> int:
    """A forked process that runs the command and nothing else; its number, which is that of its group too."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 70
    try:
        command([str(word) for word in words])
    except SystemExit as left:
        status = int(left.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(process: int, after: float) -> int | None:
    """The exit status, or None where the process still runs after so many seconds."""
    latest = time.monotonic() + after
    while True:
        number, status = os.waitpid(process, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > latest:
            return None
        time.sleep(0.002)


def phase(out: Path) -> str:
    """What a killed process was about, by what it left behind."""
    if not (out / "run.json").exists():
        return "starting"
    if any(out.rglob(".partial-*")):
        return "writing a file"
    steps = sorted((out / "checkpoints").glob("step-*.json"))
    if not steps:
        return "before its first checkpoint"
    last = json.loads(steps[-1].read_bytes())["state"]
    return "reporting" if last["step"] >= last["plan"]["total"] else "training"


def evidence(out: Path, images: list[str]) -> dict[str, object]:
    """Everything about a finished run that has to be the same."""
    newest = sorted((out / "checkpoints").glob("step-*.json"))[-1]
    state = json.loads(newest.read_bytes())["state"]
    record = json.loads((out / "run.json").read_bytes())
    for clock in (state, record):
        del clock["seconds"]
    del record["recipe"]["reasons"]  # they tell of the machine's speed
    model = sightline.load(out)
    return {
        "weights": (out / "model.safetensors").read_bytes(),
        "last checkpoint": newest.with_suffix(".safetensors").read_bytes(),
        "state": state,
        "record": {name: value for name, value in record.items() if name != SEAL},
        "metrics.jsonl": (out / "metrics.jsonl").read_bytes(),
        "predictions": [answer.to_json() for answer in model.predict(images)],
    }


def main() -> int:
    """Kills, resumes, compares, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="12 kills of shorter runs")
    parser.add_argument("--length", type=float, default=1.0, help="stretches the trainings")
    parser.add_argument("--seed", type=int, default=0)
    request = parser.parse_args()
    kills, length = (12, 0.25) if request.quick else (request.kills, request.length)
    torch.set_num_threads(1)
    moments, began = random.Random(request.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root / "data")
        images = [str(file) for file in sorted((root / "data").glob("class 1/*.png"))[:5]]
        made, lives = {}, {}
        for number, case in enumerate(cases(root / "data", length)):
            out, start = root / f"undisturbed {number}", time.monotonic()
            status = ended(begin(["train", *case.words, *SMALL, "--out", out], root / "log"), 600)
            if status != 0:
                print((root / "log").read_text())
                return 1
            lives[case.name], made[case.name] = time.monotonic() - start, evidence(out, images)
            print(f"undisturbed: {case.name}: {lives[case.name]:.1f} s", file=sys.stderr, flush=True)
        killed, runs, phases, differing = Counter(), Counter(), Counter(), []
        while sum(killed.values()) < kills:
            case = cases(root / "data", length)[sum(runs.values()) % len(made)]
            out = root / f"run {sum(runs.values())}"
            for attempt in count():
                resume = ["--resume"] if (out / "run.json").exists() else []
                process = begin(["train", *case.words, *SMALL, "--out", out, *resume], root / "log")
                left = kills - sum(killed.values())
                status = ended(process, moments.uniform(0, lives[case.name] * 1.1**attempt) if left else 600)
                if status is not None:
                    break
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                killed[case.name] += 1
                phases[phase(out)] += 1
            runs[case.name] += 1
            found = evidence(out, images) if status == 0 else {}
            unlike = [name for name, value in made[case.name].items() if found.get(name) != value]
            if status != 0 or unlike:
                differing.append(f"{case.name}, run {sum(runs.values())}: status {status}, unlike in {unlike}")
                print((root / "log").read_text()[-3000:], file=sys.stderr)
            done = f"{sum(killed.values())} kills, {sum(runs.values())} runs, {len(differing)} unlike"
            print(f"{done}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        left_over = sum(1 for _ in root.rglob(".partial-*"))
    print(f"{'training':<48} {'seconds':>8} {'kills':>6} {'runs ended':>11}")
    for name, life in lives.items():
        print(f"{name:<48} {life:>8.1f} {killed[name]:>6} {runs[name]:>11}")
    print("\nkilled while: " + ", ".join(f"{name} {count}" for name, count in phases.most_common()))
    print(
        f"{sum(killed.values())} kills, {sum(runs.values())} runs ended, {len(differing)} unlike the undisturbed ones"
    )
    print(f"unfinished files left behind: {left_over}")
    print("\n".join(differing))
    return int(bool(differing or left_over))


if __name__ == "__main__":
    sys.exit(main())
