"""The few values that travel between rooms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Tokens(NamedTuple):
    """A sequence that remembers its geometry, so that nobody guesses a grid with a square root.

    `x` holds the prefix tokens (class, distillation, registers) first, then the patches row by row; `grid` counts rows
    and columns of patches. `mask` is True at real tokens, and None where all are; it appears only in batches of unlike
    image sizes.
    """

    x: Float[Tensor, "b n d"]
    grid: tuple[int, int]
    prefix: int = 0
    mask: Bool[Tensor, "b n"] | None = None

    @property
    def patches(self) -> Float[Tensor, "b patches d"]:
        """The patch tokens alone, [batch, rows*columns, width]."""
        return self.x[:, self.prefix :]

    def mean(self) -> Float[Tensor, "b d"]:
        """The mean of the real patch tokens, [batch, width]."""
        if self.mask is None:
            return self.patches.mean(dim=1)
        real = self.mask[:, self.prefix :, None].to(self.x.dtype)
        return (self.patches * real).sum(dim=1) / real.sum(dim=1)


class Step(NamedTuple):
    """What an objective or a head says of one batch: the loss to minimise and figures to report (scalars)."""

    loss: Float[Tensor, ""]
    metrics: Mapping[str, Tensor]


class Batch(NamedTuple):
    """Samples as the loader hands them to an objective.

    `pixels` [b, c, h, w] are normalised; `targets` are class indices; `index` says which samples of the dataset they
    are; `key` is a number per sample drawn from (seed, epoch, sample) that seeds whatever else is random about it.
    `sizes` holds each image's (height, width) where they differ; they are then padded below and to the right.
    """

    pixels: Float[Tensor, "b c h w"]
    targets: Int[Tensor, " b"]
    index: Int[Tensor, " b"]
    key: Int[Tensor, " b"]
    sizes: Int[Tensor, "b 2"] | None = None

    def part(self, start: int, stop: int) -> "Batch":
        """The samples from `start` to before `stop`."""
        return self._each(lambda values: values[start:stop])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; asynchronous where the memory is pinned."""
        return self._each(lambda values: values.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        sizes = None if self.sizes is None else change(self.sizes)
        return Batch(change(self.pixels), change(self.targets), change(self.index), change(self.key), sizes)


@dataclass(frozen=True)
class Score:
    """One class with its probability, 0 to 1."""

    label: str
    index: int
    score: float


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: the best class, and the best few in falling order in `top`."""

    top: Sequence[Score]

    @property
    def label(self) -> str:
        """Name of the most probable class."""
        return self.top[0].label

    @property
    def index(self) -> int:
        """Index of the most probable class in the model's label list."""
        return self.top[0].index

    @property
    def score(self) -> float:
        """Probability of the most probable class, 0 to 1."""
        return self.top[0].score

    def to_json(self) -> dict[str, object]:
        """The answer's part of `predict --json`."""
        return {"predictions": [{"label": s.label, "index": s.index, "score": s.score} for s in self.top]}

    def _repr_html_(self) -> str:
        """What a notebook shows: a row for each class, with a bar as long as its probability."""
        bar = "display:inline-block;height:.7em;background:#b3261e"
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(s.label)}</th><td style='text-align:right'>{s.score:.1%}</td>"
            f"<td style='text-align:left;width:8em'><span style='{bar};width:{100 * s.score:.1f}%'></span></td></tr>"
            for s in self.top
        )
        return f"<table>{rows}</table>"
