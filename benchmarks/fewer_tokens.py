"""Token merging: accuracy and images per second against the number of patches merged in each layer.

    python benchmarks/fewer_tokens.py MODEL DATA [--merge 0 1 2 4] [--rounds 5]
    python benchmarks/fewer_tokens.py vit_small_patch16_224 [--merge 0 4 8 13 16]   # random weights: speed alone

The model alone is timed, on prepared pixels. All values of R take turns in every round, so that a busy machine disturbs
them alike; what counts is the ratio to R = 0 in the same round (median, and the least and the most). Prints JSON.
"""

import argparse
import json
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from sightline.model import load
from sightline.network import create_model, list_models
from sightline.recipes.evaluate import evaluate


def networks(name: str, merges: list[int]) -> dict[int, torch.nn.Module]:
    """The network for each R; all share their weights."""
    network = create_model(name) if name in list_models() else load(name).network
    return {r: network.merged(r).eval() for r in merges}


def seconds(network: torch.nn.Module, pixels: torch.Tensor) -> float:
    """How long one batch takes."""
    began = time.perf_counter()
    with torch.inference_mode():
        network(pixels)
    return time.perf_counter() - began


def main() -> None:
    """Measures and prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="what sightline.load takes, or a name of list_models")
    parser.add_argument("data", metavar="DATA", nargs="?", help="labelled images; without them speed alone is measured")
    parser.add_argument("--merge", type=int, nargs="+", default=[0, 4, 8, 13, 16], metavar="R")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    request = parser.parse_args()
    merges = sorted({0, *request.merge})
    ready = networks(request.model, merges)
    backbone = ready[0].architecture.backbone
    pixels = torch.randn(request.batch_size, backbone.in_chans, *backbone.image_size)
    operations = {}
    for r, network in ready.items():  # which warms up, too
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(pixels)
        operations[r] = counter.get_total_flops()
    times: dict[int, list[float]] = {r: [] for r in merges}
    for _ in range(request.rounds):
        for r, network in ready.items():
            times[r].append(seconds(network, pixels))
    rows = []
    for r in merges:
        ratios = [whole / own for whole, own in zip(times[0], times[r], strict=True)]
        row = {
            "merge": r,
            "images_per_second": round(request.batch_size / statistics.median(times[r]), 2),
            "faster": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
            "operations": operations[r] / operations[0],
        }
        if request.data:
            row["metrics"] = evaluate(request.model, request.data, merge=r).metrics
        rows.append(row)
    print(json.dumps({"model": request.model, "data": request.data, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
