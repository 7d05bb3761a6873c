"""Every kind of network on the same little task: `sightline train builtin:digits --model NAME --minutes M`.

    python benchmarks/families.py [--minutes 1] [--kinds swin resnet …] [--seeds 0]

Each kind is a small network of a registered one (the `SMALL` tables beside the families) and is taught from random
weights for the given wall-clock, told nothing but its name, its size and the minutes. Prints a line of JSON for each
run and then a table: parameters, top-1 of the 359 held-out digits beside chance, and the worst loss of the run as a
multiple of the first, which stays near 1 unless training diverges.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import sightline
from sightline.network import count_parameters, describe
from sightline.registry import table
from sightline.training.journal import read

CHANCE = 0.1


def teach(kind: str, minutes: float, seed: int, out: Path) -> dict[str, Any]:
    """One run, and what came of it."""
    name, overrides = kinds()[kind]
    trained = sightline.train(
        "builtin:digits", model=name, minutes=minutes, seed=seed, out=out, network=dict(overrides)
    )
    losses = [record["loss"] for record in read(out / "metrics.jsonl") if "loss" in record]
    record = json.loads((out / "run.json").read_text())
    return {
        "kind": kind,
        "seed": seed,
        "parameters": count_parameters(describe(name, 10, **overrides).lay_out()),
        "optimizer": record["recipe"]["settings"]["optimizer"],
        "steps": record["steps"],
        "top1": trained.metrics["top1"],
        "worst": max(losses) / losses[0] if all(map(math.isfinite, losses)) else math.inf,
        "findings": [finding.kind for finding in trained.findings],
    }


def kinds() -> dict[str, tuple[str, dict[str, Any]]]:
    """A registered name and the overrides that make it small, by kind."""
    return {**table("backbones", "SMALL"), **table("tokenizers", "SMALL")}


def main() -> None:
    """Runs everything, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--kinds", nargs="+", default=list(kinds()), choices=list(kinds()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    request = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in request.kinds:
            for seed in request.seeds:
                found.append(teach(kind, request.minutes, seed, Path(folder) / f"{kind}-{seed}"))
                print(json.dumps(found[-1]), flush=True)
    print(
        f"| kind | parameters | taught by | top-1 % (chance {CHANCE:.0%}) | worst loss / first |\n|---|---|---|---|---|"
    )
    for kind in request.kinds:
        runs = [run for run in found if run["kind"] == kind]
        tops = [100 * run["top1"] for run in runs]
        each = f" ({', '.join(f'{top:.1f}' for top in tops)})" if len(tops) > 1 else ""
        worst = max(run["worst"] for run in runs)
        print(
            f"| {kind} | {runs[0]['parameters']:,} | {runs[0]['optimizer']} | {statistics.mean(tops):.1f}{each} "
            f"| {worst:.2f} |"
        )


if __name__ == "__main__":
    main()
