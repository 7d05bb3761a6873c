"""What the frozen-feature protocols have in common: labelled features in, shares with their uncertainty out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantiles of Student's t distribution for 1 to 9 degrees of freedom."""

Interval = tuple[float, float]


class Labelled(NamedTuple):
    """Features of images with their class indices, and how many more images could not be read."""

    vectors: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    refused: int = 0

    def share(self, right: float) -> float:
        """So many right answers as a share of all images, those that could not be read among them."""
        return right / max(len(self.labels) + self.refused, 1)


@dataclass(frozen=True)
class Judged:
    """What a protocol found: shares by their names, their 95 % intervals, and whatever else explains them."""

    metrics: Mapping[str, float]
    intervals: Mapping[str, Interval]
    details: Mapping[str, Any] = field(default_factory=dict)


Protocol = Callable[..., Judged]
"""What the `PROTOCOLS` tables hold: (training part, part to judge by, classes, shots, seed) to what was found.

No `shots` means as many as the protocol finds usual; one that needs neither shots nor seed passes over them.
"""


def wilson(share: float, count: int) -> Interval:
    """The 95 % interval of a share that was found on `count` images (Wilson's score interval)."""
    z = 1.959964
    middle, spread = share + z * z / (2 * count), z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    low, high = ((middle + side * spread) / (1 + z * z / count) for side in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def of_seeds(values: Sequence[float]) -> tuple[float, Interval]:
    """The mean of the values of 2 to 10 seeds, and its 95 % interval (Student's t)."""
    count = len(values)
    assert 2 <= count <= len(STUDENT) + 1
    mean = sum(values) / count
    deviation = (sum((value - mean) ** 2 for value in values) / (count - 1)) ** 0.5
    reach = STUDENT[count - 2] * deviation / count**0.5
    return mean, (max(mean - reach, 0.0), min(mean + reach, 1.0))
