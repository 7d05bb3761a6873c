"""The moving average of a network's weights."""

import copy

import torch
from torch import nn


class Average:
    """A copy of a network whose weights follow it with exponential decay (arXiv 1703.01780, equation 2).

    Early in a run the decay is (1 + t) / (10 + t) where that is smaller, so that the first, random weights are soon
    forgotten.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Moves the average towards the network after update number `step`, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        kept, new = list(self.network.parameters()), [p.detach() for p in network.parameters()]
        torch._foreach_lerp_(kept, new, weight)
        for ours, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            ours.copy_(theirs)
