"""Memory and time of `explain`, beside transformers with `output_attentions=True`, for ViT-B/16 at 224 and 384.

    python benchmarks/explain.py [--sizes 224 384] [--rounds 5]

Memory: each case in a process of its own, which loads the model, lets go of everything else, and then works once; what
counts is the most resident memory above that of the loaded model, beside the size of the weights (86 million numbers in
float32). Time: both models in one process, taking turns; the median of the rounds' ratios, with the smallest and the
largest. Weights are random, which changes neither.

`explain` gives the rollout, the mean distances, the last features and all heads' maps of the layers asked for;
transformers gives the maps of all layers and nothing else.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEBI = 2**20
MODEL = "vit_base_patch16_224"

Work = Callable[[], Any]


def ours(size: int, **settings: Any) -> tuple[Any, Work]:
    """The network of this package, and its explanation."""
    import torch

    from sightline.explanation.explain import explain
    from sightline.network import create_model

    network = create_model(MODEL, image_size=size).eval()
    pixels = torch.randn(3, size, size)
    return network, lambda: explain(network, pixels, **settings)


def theirs(size: int) -> tuple[Any, Work]:
    """The same network of transformers with all its attention maps."""
    import torch
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(image_size=size, attn_implementation="eager")
    network = ViTModel(config, add_pooling_layer=False).eval()
    pixels = torch.randn(1, 3, size, size)

    def work() -> Any:
        with torch.inference_mode():
            return network(pixels, output_attentions=True).attentions

    return network, work


CASES: dict[str, Callable[[int], tuple[Any, Work]]] = {
    "explain": ours,
    "explain, no heads kept": lambda size: ours(size, layers=[]),
    "explain, last layer's heads": lambda size: ours(size, layers=[-1]),
    "explain with relevance": lambda size: ours(size, gradients=True),
    "transformers, output_attentions": theirs,
}


def resident(field: str) -> int:
    """Bytes of this process's memory: `VmRSS` now, or `VmHWM`, the most since it was last set back."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def weigh(case: str, size: int) -> dict[str, float]:
    """The most memory that a case takes above its model, and the size of the model, in MiB; in a fresh process."""
    import torch

    torch.set_num_threads(1)
    for warm in ("explain with relevance", case):  # libraries that are loaded on first use belong to nobody
        CASES[warm](32)[1]()
    network, work = CASES[case](size)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = work()
    peak = resident("VmHWM") - before
    assert result is not None
    return {"peak": peak / MEBI, "model": weights / MEBI}


def race(size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, in turns, for each round; the first round is not counted."""
    import torch

    torch.set_num_threads(1)
    works = {name: make(size)[1] for name, make in CASES.items()}
    found: dict[str, list[float]] = {name: [] for name in works}
    for counted in range(rounds + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if counted:
                found[name].append(time.perf_counter() - begin)
    return found


def main() -> None:
    """Weighs every case, then races them, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weigh", nargs=2, metavar=("CASE", "SIZE"), help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.weigh:
        print(json.dumps(weigh(request.weigh[0], int(request.weigh[1]))))
        return
    print(
        "| pixels | case | peak above the model, MiB | of the model's size | time / transformers |\n"
        "|---|---|---|---|---|"
    )
    # Large blocks go back to the system when they are let go of, so that the peak is that of what is held.
    quiet = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for size in request.sizes:
        times = race(size, request.rounds)
        reference = times["transformers, output_attentions"]
        for case in CASES:
            command = [sys.executable, __file__, "--weigh", case, str(size)]
            said = subprocess.run(command, env=quiet, check=True, capture_output=True, text=True)
            found = json.loads(said.stdout.splitlines()[-1])
            ratios = [mine / other for mine, other in zip(times[case], reference, strict=True)]
            print(
                f"| {size} | {case} | {found['peak']:.0f} | {found['peak'] / found['model']:.2f} "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
