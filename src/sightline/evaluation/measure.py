"""What is counted of a network's outputs over a labelled set, whatever the task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from sightline.device import free_memory, out_of_memory
from sightline.errors import WorkError
from sightline.layers.dense import fast_products
from sightline.types import Batch


class Measure(ABC):
    """Counts over a labelled set; merged parts give the counts of the whole.

    Images that could not be read are `refused`: they stand in the denominator of every metric, as answers that were
    not given.
    """

    refused: list[tuple[str, str]]

    def begin(self, network: Any) -> None:
        """What is to be computed with the network before its answers are counted; for most tasks, nothing."""
        assert not network.training, "a network is measured as it answers, not as it learns"

    @abstractmethod
    def take(self, output: Any, batch: Batch) -> None:
        """Counts one batch."""

    @abstractmethod
    def merge(self, others: Iterable[Any]) -> Any:
        """The counts of this part and others together."""

    @property
    @abstractmethod
    def evaluated(self) -> int:
        """Images that got an answer."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """The figures by their public names."""

    def told(self) -> dict[str, float]:
        """Further figures, for the doctor alone."""
        return {}

    @abstractmethod
    def headline(self) -> str:
        """The figures that matter most, in a few words."""

    @abstractmethod
    def lines(self, labels: Sequence[str]) -> list[str]:
        """A table for people: a line for each class."""

    @abstractmethod
    def details(self, labels: Sequence[str]) -> Mapping[str, Any]:
        """What `evaluate --json` says beside the metrics."""


M = TypeVar("M", bound=Measure)


@torch.inference_mode()
def weigh(
    network: nn.Module,
    batches: Iterable,
    measure: M,
    *,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    heed: Callable[[], None] = lambda: None,
) -> M:
    """`measure` filled with a network's answers to batches of (step, Batch, refused).

    The network is left in the mode it was in. Where memory does not suffice for a batch, it is computed in halves, and
    so are those after it. `heed` is called after every batch, and may raise to end it all. Raises WorkError where
    memory does not even suffice for one image.
    """
    training, most = network.training, 2**62
    network.eval()
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        measure.begin(network)
        for _, batch, refused in batches:
            measure.refused.extend(refused)
            if batch is not None:
                outputs, most = computed(network, batch, device, most)
                for part, output in outputs:
                    measure.take(output, part)
            heed()
    network.train(training)
    return measure


@fast_products()
def computed(
    compute: Callable[..., Any], batch: Batch, device: torch.device, most: int
) -> tuple[list[tuple[Batch, Any]], int]:
    """Parts of a batch with what `compute` makes of their pixels and sizes, and how many images at a time memory bore.

    It is tried with `most` first, and then with half of them, again and again. Raises WorkError where memory does not
    even suffice for one image.
    """
    count = len(batch.index)
    while True:
        size = min(most, count)
        try:
            parts = [batch.part(begin, begin + size) for begin in range(0, count, size)]
            return [(part, compute(part.pixels.to(device), sizes=part.sizes)) for part in parts], most
        except (RuntimeError, MemoryError) as fault:
            if not out_of_memory(fault):
                raise
        free_memory(device)
        if size == 1:
            raise WorkError("memory does not suffice to evaluate one image: take smaller images or a smaller model")
        most = size // 2
