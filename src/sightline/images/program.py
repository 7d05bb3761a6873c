"""The pixel contract as tensor operations alone: what stands inside an exported program.

`Preprocess` calls Pillow or torch, which no other runtime has. Both resize in two passes with weights in fixed point,
and a pass is a product with a matrix that follows from the picture's size. The weights are computed in float64 by the
libraries' own formulas and rounded to their whole numbers; products and sums of these are exact in float64, so every
pixel is the library's to the bit, whatever the order of summation.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import PIL
import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sightline.errors import UserError
from sightline.images.preprocess import Preprocess

PILLOW_UNIT = 2.0**22
"""What the weight 1 is in Pillow's fixed point."""

TORCH_LARGEST = 2.0**15
"""Below this torch keeps its weights, with as many bits after the point (22 at most) as the largest allows."""

_PILLOW = int(PIL.__version__.split(".")[0])
_ENLARGED = 2.0**22  # from this many pixels on `Preprocess.resample` computes only what is cut


def bilinear(x: Tensor) -> Tensor:
    """A triangle of half width 1."""
    return (1 - x.abs()).clamp(min=0)


def bicubic(x: Tensor) -> Tensor:
    """Cubic convolution with a = -0.5, of half width 2 (Keys 1981)."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def lanczos(x: Tensor) -> Tensor:
    """A sinc windowed by a sinc three times as wide, of half width 3."""
    inside = (x >= -3) & (x < 3)
    return torch.where(inside, _sinc(x) * _sinc(x / 3), torch.zeros_like(x))


def _sinc(x: Tensor) -> Tensor:
    angle = torch.where(x == 0, torch.ones_like(x), x) * math.pi
    return torch.where(x == 0, torch.ones_like(x), torch.sin(angle) / angle)


FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "bilinear": (bilinear, 1.0),
    "bicubic": (bicubic, 2.0),
    "lanczos": (lanczos, 3.0),
}
"""Each interpolation's kernel and its half width."""


class Side(NamedTuple):
    """One side of a picture on its way to the final size; what follows from the picture is a scalar in float64.

    `length` pixels become `scaled`, of which `wanted` are cut from `begin` on (negative: how much is filled before).
    """

    length: Tensor
    scaled: Tensor
    begin: Tensor
    wanted: int


class PixelProgram(nn.Module):
    """The pixels of `Preprocess` for one decoded upright picture, to the bit, in operations that any runtime has.

    Raises UserError for a contract that cannot be computed so, and says which setting is at fault.
    """

    def __init__(self, preprocess: Preprocess):
        super().__init__()
        refused = None
        if preprocess.resize == "native":
            refused = "resize 'native' gives every picture a size of its own"
        elif preprocess.interpolation not in FILTERS:
            refused = f"interpolation '{preprocess.interpolation}' is no weighted mean"
        elif not preprocess.antialias:
            refused = "resizing without antialiasing is torch's alone"
        elif preprocess.draft:
            refused = "draft decoding happens before there is a decoded picture"
        if refused:
            raise UserError(
                f"these pixels cannot be prepared inside an exported program: {refused}; use --input pixels"
            )
        self.preprocess = preprocess
        self.filter, self.support = FILTERS[preprocess.interpolation]

    def forward(self, image: UInt8[Tensor, "h w 3"]) -> tuple[Float[Tensor, "1 3 rows columns"], tuple[Side, Side]]:
        """Normalised pixels as a batch of one, and what became of each side of the picture, height first."""
        pixels, sides = self.pixels(image)
        mean, std = (torch.tensor(colour)[:, None, None] for colour in (self.preprocess.mean, self.preprocess.std))
        return ((pixels.to(torch.float32) / 255 - mean) / std)[None], sides

    def pixels(self, image: UInt8[Tensor, "h w 3"]) -> tuple[Float[Tensor, "3 rows columns"], tuple[Side, Side]]:
        """The stage before normalisation, 0 to 255 in float64, and the sides."""
        down, across = (torch.arange(length, dtype=torch.float64) for length in image.shape[:2])
        tall, wide = self._sides(down[-1] + 1, across[-1] + 1)
        area = (tall.length * wide.length).clamp(min=_ENLARGED)
        sliver = tall.scaled * wide.scaled > area
        planes = rearrange(image, "h w c -> c h w").to(torch.float64)
        upright = self._vertical_first(tall, wide, sliver)
        # Each order of the passes is given the picture where it is the right one, and else a single row of it.
        part, at = _top(planes, torch.where(upright, 1, tall.length))
        part = _turned(self._resized(part, across, wide, sliver))
        across_first = _turned(self._resized(part, at, tall, sliver))
        part, at = _top(planes, torch.where(upright, tall.length, 1))
        part = _turned(self._resized(_turned(part), at, tall, sliver))
        planes = torch.where(upright, self._resized(part, across, wide, sliver), across_first)
        covered = _covered(tall)[:, None] & _covered(wide)
        fill = torch.tensor(self.preprocess.fill, dtype=torch.float64)[:, None, None]
        return torch.where(covered, planes, fill), (tall, wide)

    def _vertical_first(self, tall: Side, wide: Side, sliver: Tensor) -> Tensor:
        """Whether the height is resized before the width: in Pillow from 13 on, where it loses far more pixels."""
        if _PILLOW < 13:
            return torch.zeros_like(sliver)
        height, width = (torch.where(sliver, side.scaled.clamp(max=side.wanted), side.scaled) for side in (tall, wide))
        lost = tall.length - height
        return ((lost > 0) & (lost > 2 * (wide.length - width))) & (sliver | (self.preprocess.kernel == "pillow"))

    def _sides(self, height: Tensor, width: Tensor) -> tuple[Side, Side]:
        """As `Preprocess.scaled` and what it cuts, with the picture's size known only when the program runs."""
        prepare = self.preprocess
        middle = prepare.intermediate()
        rows, columns = (torch.tensor(float(n), dtype=torch.float64) for n in middle)
        if prepare.resize == "squash":
            scaled = rows, columns
        elif prepare.resize == "crop" and middle[0] == middle[1]:
            upright = height > width
            scaled = (
                torch.where(upright, torch.floor(rows * height / width), rows),
                torch.where(upright, rows, torch.floor(rows * width / height)),
            )
        else:
            side = torch.maximum if prepare.resize == "pad" else torch.minimum
            ratio = side(height / rows, width / columns)
            scaled = torch.round(height / ratio).clamp(min=1), torch.round(width / ratio).clamp(min=1)
        sides = (
            Side(n, to, self._begin(to, cut), cut)
            for n, to, cut in zip((height, width), scaled, prepare.size, strict=True)
        )
        tall, wide = sides
        return tall, wide

    def _begin(self, scaled: Tensor, wanted: int) -> Tensor:
        half = (scaled - wanted) / 2
        cut = torch.round(half) if self.preprocess.crop_offset == "round" else torch.floor(half)
        return torch.where(scaled <= wanted, -torch.floor(-half), cut)

    def _resized(
        self, planes: Float[Tensor, "3 n m"], at: Float[Tensor, " m"], side: Side, sliver: Tensor
    ) -> Float[Tensor, "3 n wanted"]:
        """One pass along the last axis, which holds the pixels `at`."""
        start, scale, first = self._scale(side, sliver)
        asked = torch.minimum(_places(side).clamp(min=0), side.scaled - 1) - first
        weights = self._weights(asked, start, scale, side.length, at)
        unit = torch.where(sliver, PILLOW_UNIT, self._unit(side))
        whole = torch.sign(weights) * torch.floor(weights.abs() * unit + 0.5)
        summed = planes @ rearrange(whole, "wanted m -> m wanted")
        return torch.floor((summed + unit / 2) / unit).clamp(0, 255)

    def _scale(self, side: Side, sliver: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the picture's part begins, how many of its pixels make one, and which place is the first of the part.

        Of a sliver only the part that is wanted is computed, between ends that Pillow holds in float32.
        """
        plain = side.length / side.scaled
        first = side.begin.clamp(min=0)
        count = side.scaled.clamp(max=side.wanted)
        start = (first * plain).to(torch.float32)
        stop = torch.minimum((first + count) * plain, side.length).to(torch.float32)
        cut = (stop - start).to(torch.float64) / count
        nothing = torch.zeros_like(first)
        return (
            torch.where(sliver, start.to(torch.float64), nothing),
            torch.where(sliver, cut, plain),
            torch.where(sliver, first, nothing),
        )

    def _weights(
        self, places: Float[Tensor, " o"], start: Tensor, scale: Tensor, length: Tensor, at: Tensor | None = None
    ) -> Float[Tensor, "o m"]:
        """What each pixel contributes to each place; without `at`, of those only that are within reach."""
        centre = (start + (places + 0.5) * scale)[:, None]
        spread = scale.clamp(min=1)
        reach = self.support * spread
        first = torch.floor(centre - reach + 0.5).clamp(min=0)
        behind = torch.minimum(torch.floor(centre + reach + 0.5), length)
        if at is None:
            taps = (2 * torch.ceil(reach) + 1).to(torch.int64).item()
            torch._check(taps >= 1)
            at = first + torch.arange(taps, dtype=torch.float64)
        weights = self.filter((at - centre + 0.5) * (1 / spread))
        weights = torch.where((at >= first) & (at < behind), weights, torch.zeros_like(weights))
        return weights / weights.sum(dim=1, keepdim=True)

    def _unit(self, side: Side) -> Tensor:
        """What the weight 1 is in fixed point: Pillow's is always the same, torch's follows from the largest of all."""
        if self.preprocess.kernel == "pillow":
            return torch.tensor(PILLOW_UNIT, dtype=torch.float64)
        count = side.scaled.to(torch.int64).item()
        torch._check(count >= 1)
        nothing = torch.zeros_like(side.length)
        places = torch.arange(count, dtype=torch.float64)
        largest = self._weights(places, nothing, side.length / side.scaled, side.length).max()
        units = torch.tensor([2.0**n for n in range(1, 23)], dtype=torch.float64)
        fits = torch.floor(0.5 + largest * units) < TORCH_LARGEST
        return torch.where(fits, units, torch.ones_like(units)).max()


def _places(side: Side) -> Float[Tensor, " wanted"]:
    """The places of the final size, counted in the enlarged or reduced picture."""
    return torch.arange(side.wanted, dtype=torch.float64) + side.begin


def _covered(side: Side) -> Bool[Tensor, " wanted"]:
    """Which of them the picture reaches."""
    return (_places(side) >= 0) & (_places(side) < side.scaled)


def _top(planes: Float[Tensor, "3 h w"], rows: Tensor) -> tuple[Float[Tensor, "3 r w"], Float[Tensor, " r"]]:
    """The first rows, as many as a scalar says, and their numbers."""
    count = rows.to(torch.int64).item()
    torch._check(count >= 1)
    return planes.index_select(1, torch.arange(count)), torch.arange(count, dtype=torch.float64)


def _turned(planes: Float[Tensor, "3 a b"]) -> Float[Tensor, "3 b a"]:
    return rearrange(planes, "c a b -> c b a")
