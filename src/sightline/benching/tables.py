"""What a run of `sightline bench` is told, and the tables that it gives."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from sightline.benching.rounds import Ratio, Timed
from sightline.network import Architecture, describe

OURS = "sightline"
CLASSES = 1000


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    `image_size` and `patch_size` are pixels along the side, in place of the architecture's own. `sides` are those of
    the squares of the cost curve. `runtimes` are names of `PROGRAMS` that compute the same network. `images` of each
    folder are answered in the case `predict`, as many as usual where None.
    """

    model: str
    device: torch.device
    peers: Sequence[str] = ()
    precisions: Sequence[str] = ("fp32",)
    batch_sizes: Sequence[int] = (1, 8)
    sides: Sequence[int] = (224, 320, 448, 640, 896, 1024)
    rounds: int = 5
    compiled: bool = False
    runtimes: Sequence[str] = ()
    image_size: int | None = None
    patch_size: int | None = None
    images: int | None = None

    def architecture(self, side: int | None = None) -> Architecture:
        """What is measured, for squares of `side` pixels where that is given."""
        patch: dict[str, Any] = {} if self.patch_size is None else {"patch_size": self.patch_size}
        return describe(self.model, CLASSES, side or self.image_size, **patch)


class Row(NamedTuple):
    """One contender: seconds for each image, images a second, the share of the peak, and the time over Sightline's.

    `share_of_peak` is None where the work is more than products of matrices; `megabytes` are the most that the work
    holds beyond what lay there before, None where that was not measured.
    """

    name: str
    seconds: float
    images_per_second: float
    share_of_peak: float | None
    ratio: Ratio
    parameters: int
    megabytes: float | None = None


class Point(NamedTuple):
    """One size of the cost curve; `megabytes` are those above the network's own, None where it cannot be told."""

    side: int
    tokens: int
    seconds: float
    megabytes: float | None


@dataclass(frozen=True)
class Table:
    """The figures of one case; `points` and `exponents` (of time and memory over the side) are a cost curve's."""

    case: str
    title: str
    batch: int
    precision: str
    rows: Sequence[Row] = ()
    points: Sequence[Point] = ()
    exponents: dict[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


def rows_of(
    timed: Sequence[Timed],
    sizes: Sequence[int],
    batch: int,
    *,
    flops: float | None = None,
    peak: float = 0.0,
    megabytes: Sequence[float | None] | None = None,
) -> list[Row]:
    """Rows for contenders that took turns, the first of which is Sightline.

    `flops` are those of one image, None where nobody counts them, and `peak` is in 1e9 a second.
    """
    return [
        Row(
            one.name,
            one.median / batch,
            batch / one.median,
            None if flops is None else flops * batch / one.median / (peak * 1e9),
            one.over(timed[0]),
            size,
            held,
        )
        for one, size, held in zip(timed, sizes, megabytes or [None] * len(timed), strict=True)
    ]
