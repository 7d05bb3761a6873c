"""The moving average of a network's weights."""

import copy

import torch

from sightline.network import Network


class Average:
    """A copy of a network whose weights follow it with exponential decay (arXiv 1703.01780, equation 2).

    Early in a run the decay is (1 + t) / (10 + t) where that is smaller, so that the first, random weights are soon
    forgotten.
    """

    def __init__(self, network: Network, decay: float):
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: Network, step: int) -> None:
        """Moves the average towards the network after update number `step`, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for kept, new in zip(self.network.parameters(), network.parameters(), strict=True):
            kept.lerp_(new, weight)
        for ours, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            ours.copy_(theirs)
