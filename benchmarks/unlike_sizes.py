"""Images of unlike sizes in one batch: one behind the other in a sequence, or filled up on a canvas.

    python benchmarks/unlike_sizes.py [--models vit_tiny_patch16_224 vit_small_patch16_224] [--rounds 7]

Both ways take turns in every round; what counts is the ratio of their times in the same round: more than 1, the
sequence is faster. `training` is a step forward and back. Answers of both are compared. Prints a row for each mixture
of sizes.
"""

import argparse
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sightline.backbones.vit import ViT
from sightline.benching.rounds import Contender, take_turns
from sightline.network import create_model

MIXTURES = {
    "photographs, 3:4 either way": [(224, 168), (168, 224)] * 4,
    "1:2, 2:1, squares": [(224, 112), (112, 224), (224, 224), (160, 160)] * 2,
    "96 to 224": [(96, 96), (128, 128), (160, 160), (224, 224)] * 2,
    "nearly alike": [(224, 224), (208, 224)] * 4,
    "alike": [(224, 224)] * 8,
}


def forward(network: Any, canvas: Tensor, sizes: Tensor, joins: bool) -> Tensor:
    with patch.object(ViT, "joins", joins), torch.inference_mode():
        return network.eval()(canvas, sizes)


def learn(network: Any, canvas: Tensor, sizes: Tensor, joins: bool) -> None:
    network.zero_grad()
    with patch.object(ViT, "joins", joins):
        network.train()(canvas, sizes).square().sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "vit_small_patch16_224"])
    parser.add_argument("--rounds", type=int, default=7)
    told = parser.parse_args()
    torch.manual_seed(0)
    print(f"{'model':24} {'sizes':28} {'filled':>6}  {'forward':22} {'training':22} difference")
    for name in told.models:
        network = create_model(name, num_classes=10)
        torch.nn.init.normal_(network.head.classifier.weight, std=0.1)
        for mixture, pairs in MIXTURES.items():
            sizes = torch.tensor(pairs)
            canvas = torch.randn(len(pairs), 3, *sizes.max(dim=0).values.tolist())
            filled = 1 - sizes.prod(dim=1).float().mean().item() / canvas[0, 0].numel()
            cells = []
            for work in (forward, learn):
                ways = [Contender(str(joins), partial(work, network, canvas, sizes, joins)) for joins in (True, False)]
                joined, apart = take_turns(ways, told.rounds)
                cells.append(str(apart.over(joined)))
            answers = [forward(network, canvas, sizes, joins) for joins in (True, False)]
            difference = (answers[0] - answers[1]).abs().max().item()
            print(f"{name:24} {mixture:28} {filled:6.0%}  {cells[0]:22} {cells[1]:22} {difference:.1e}", flush=True)


if __name__ == "__main__":
    main()
