"""Collapses planted into small runs without labels, the step at which each is named, and what healthy runs are told.

    python proofs/collapse.py [--only WORD]

Every run is a whole `sightline.pretrain` on the digits, of some seconds. Exits with status 1 where a collapse is not
named within the steps that docs/guides/pretrain.md states, or a healthy run gets a finding.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sightline.errors import UserError, WorkError
from sightline.network import create_model
from sightline.recipes.pretrain import pretrain
from sightline.training.journal import read

EPOCHS = 10.0
COLLAPSE = {"feature-collapse", "teacher-collapse", "codebook-collapse"}
FAULTY = {"divergence", "learning-rate-too-high", "loss-at-chance", "not-finite", "collapsed-heads", "dead-heads"}


def blank_codebook(folder: Path) -> Path:
    """A codebook that calls every patch by its first word."""
    import sightline
    from sightline.images.preprocess import Preprocess

    network = create_model("dvae_small_4_32", 0, 24)
    torch.nn.init.constant_(network.backbone.output.bias[:1].data, 1e6)
    model = sightline.Model(network, Preprocess((24, 24), mean=(-0.125,) * 3, std=(1.25,) * 3), ())
    return model.save(folder)


def planted(home: Path) -> dict[str, tuple[set[str], int, dict[str, Any]]]:
    """Names of runs: what has to be named (one of these), within how many steps, and how the run is made."""
    return {
        "dino, no centring": (COLLAPSE, 200, {"objective": "dino", "options": {"centring": "none", "koleo": 0.0}}),
        "dino, rate × 100": (COLLAPSE | FAULTY, 200, {"objective": "dino", "lr": 0.2}),
        "mae, rate × 100": (COLLAPSE | FAULTY, 200, {"objective": "mae", "lr": 0.2}),
        "masked-patch, rate × 100": (COLLAPSE | FAULTY, 200, {"objective": "masked-patch", "lr": 0.2}),
        "beit, codebook of one": (
            {"codebook-collapse"},
            100,
            {"objective": "beit", "options": {"codebook": str(blank_codebook(home / "one"))}},
        ),
        "codebook of one entry": (
            {"codebook-collapse"},
            100,
            {"objective": "codebook", "network": {"vocab_size": 1}},
        ),
        **{
            f"{name}, healthy": (set(), 0, {"objective": name})
            for name in ("mae", "dino", "masked-patch", "simmim", "beit", "codebook")
        },
    }


def main() -> int:
    """Runs them and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name holds this")
    request = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for name, (wanted, within, told) in planted(home).items():
            if request.only not in name:
                continue
            began, out = time.monotonic(), home / name.replace(" ", "-").replace(",", "")
            try:
                found = list(pretrain("builtin:digits", out=out, epochs=EPOCHS, workers=0, **told).findings)
            except (WorkError, UserError) as fault:
                found = []
                print(f"{name}: {fault}")
            named = [f for f in found if f.kind in wanted]
            good = bool(named) and min(f.step for f in named) <= within if wanted else not found
            failed += not good
            steps = max((r["step"] for r in read(out / "metrics.jsonl")), default=0)
            said = ", ".join(f"{f.kind} at step {f.step}" for f in found) or "nothing"
            seconds = time.monotonic() - began
            print(f"{'ok  ' if good else 'FAIL'} {name:28} {said} (of {steps} steps, {seconds:.0f} s)", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
