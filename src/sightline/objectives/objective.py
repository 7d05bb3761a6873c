"""What every objective offers to the loop that runs it."""

from abc import ABC, abstractmethod

from torch import nn

from sightline.network import Network
from sightline.types import Batch, Step


class Objective(nn.Module, ABC):
    """Batch to `Step`. The loop knows nothing else of what it trains.

    Decoders, projectors and teachers belong to the objective; only `network` is kept when training ends.
    """

    network: Network

    @abstractmethod
    def forward(self, batch: Batch) -> Step:
        """The loss of a batch and figures to report."""

    def after_update(self, progress: float) -> None:
        """Called after every update with the share of the run that is done, for teachers that follow a student."""
