"""The few values that travel between rooms."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

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


class Area(NamedTuple):
    """The pixels that tokens were made of: canvas (height, width), step of the grid, each image's own size if unlike.

    The last cells may reach beyond the canvas.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    sizes: Int[Tensor, "b 2"] | None = None


class Step(NamedTuple):
    """What an objective or a head says of one batch: the loss to minimise and figures to report (scalars)."""

    loss: Float[Tensor, ""]
    metrics: Mapping[str, Tensor]


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor changed, or the same structure of tuples with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    parts = (each(part, change) for part in value)
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def finite(output: Any) -> Bool[Tensor, " b"]:
    """Of each image of a batch, whether all numbers of a network's output for it are finite."""
    if isinstance(output, Tensor):
        return output.flatten(1).isfinite().all(dim=1)
    return torch.stack([finite(part) for part in output]).all(dim=0)


class Batch(NamedTuple):
    """Samples as the loader hands them to an objective.

    `pixels` [b, c, h, w] are normalised; `targets` are what the task's head learns from: a tensor whose first axis is
    the batch (class indices [b], a class for every pixel [b, h, w]) or a tuple with an entry for each image; `index`
    says which samples of the dataset they are; `key` is a number per sample drawn from (seed, epoch, sample) that seeds
    whatever else is random about it. `sizes` holds each image's (height, width) where they differ; they are then padded
    below and to the right. `views` are further pictures of the same images, or what else an objective reads of them,
    each with the batch as first axis.
    """

    pixels: Float[Tensor, "b c h w"]
    targets: Any
    index: Int[Tensor, " b"]
    key: Int[Tensor, " b"]
    sizes: Int[Tensor, "b 2"] | None = None
    views: tuple[Tensor, ...] = ()

    def part(self, start: int, stop: int) -> "Batch":
        """The samples from `start` to before `stop`."""
        sizes = None if self.sizes is None else self.sizes[start:stop]
        pixels, targets, index, key = (
            values[start:stop] for values in (self.pixels, self.targets, self.index, self.key)
        )
        return Batch(pixels, targets, index, key, sizes, tuple(view[start:stop] for view in self.views))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; asynchronous where the memory is pinned."""

        def change(values: Tensor) -> Tensor:
            return values.to(device, non_blocking=True)

        sizes = None if self.sizes is None else change(self.sizes)
        return Batch(*(each(values, change) for values in self[:4]), sizes, tuple(change(view) for view in self.views))


class Placement(NamedTuple):
    """Where an upright image of `size` (height, width) lies in what a network reads of it.

    A point (y, x) of the image, in pixels from its upper left corner, lies at `scale * (y, x) + offset` in the input,
    which is as large as `input` says (rows, columns).
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]
    input: tuple[int, int]


class Gaze(NamedTuple):
    """What is to be shown of a head's own attention: in the layer `layer`, what the tokens `rows` ask of the patches.

    The patches are the tokens from `first` on; `words` say what each of the rows stands for.
    """

    layer: str
    rows: list[int]
    first: int
    words: list[str]


@dataclass(frozen=True)
class Score:
    """One class with its probability, 0 to 1."""

    label: str
    index: int
    score: float


class Reply(ABC):
    """What a head has to say of one image: `Prediction` for classes; boxes, masks and others for other tasks."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The answer's part of `predict --json`."""

    @abstractmethod
    def rows(self) -> Sequence[Score]:
        """Classes with their scores, one for each row of a table."""

    def cut(self, top: int) -> "Reply":
        """The same with no more than `top` classes, where the answer is a list of them."""
        return self

    def save(self, write: Callable[[str, bytes], str]) -> "Reply":
        """The answer after what does not fit into JSON was given to `write`: an ending and bytes, for a file's path."""
        return self

    def line(self) -> str:
        """The answer in one line, with labels as they are: whoever prints them makes them fit to print."""
        return "  ".join(f"{s.label} {s.score:.1%}" for s in self.rows()) or "nothing found"


@dataclass(frozen=True)
class Prediction(Reply):
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

    def rows(self) -> Sequence[Score]:
        return self.top

    def cut(self, top: int) -> "Prediction":
        return Prediction(self.top[:top])

    def to_json(self) -> dict[str, Any]:
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
