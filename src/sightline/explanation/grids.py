"""Where a network's tokens lie: on its input, and on the grid of the layer before.

A pyramid's grid grows coarser from layer to layer. Nothing here knows how a family merges its tokens: it is told by the
grids alone.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Grid = tuple[int, int]
Pair = tuple[float, float]

_LONG = 2**24


class Seats(NamedTuple):
    """The tokens of one layer: `prefix` of them, and after them one for each cell of `grid`, row by row."""

    prefix: int
    grid: Grid

    @property
    def tokens(self) -> int:
        """The number of all tokens."""
        return self.prefix + self.grid[0] * self.grid[1]


class Lattice(NamedTuple):
    """Where a grid lies on the model's input: its first cell begins at `origin`, and each is `stride` from the next.

    Both are in pixels, (down, right).
    """

    origin: Pair
    stride: Pair


def lattice(backbone: nn.Module, size: Grid, grid: Grid) -> Lattice:
    """Where the finest grid of a backbone lies on an image of `size` (height, width) that became `grid`.

    The step is read from the grid that the tokenizer gives a very long image, where a last patch that is cut off or
    filled up no longer counts; so any stem will do, and one whose cells do not begin at 0 says so by its `origin`.
    Without a tokenizer, patches that overlap lie where the first convolution puts the centres of its kernels; and where
    neither makes this grid, it is taken to cover the image exactly, as activation maps are drawn in arXiv 1512.04150.
    """
    grid_of = getattr(getattr(backbone, "tokenizer", None), "grid", None)
    if grid_of is not None and tuple(grid_of(size)) == grid:
        rows, columns = grid_of((_LONG, _LONG))
        origin = getattr(backbone.tokenizer, "origin", (0.0, 0.0))
        return Lattice(origin, (float(round(_LONG / rows)), float(round(_LONG / columns))))
    convolution = first_convolution(backbone)
    if convolution is not None and convolution.padding == (0, 0):
        (down, right), kernel = convolution.stride, convolution.kernel_size
        counts = ((size[0] - kernel[0]) // down + 1, (size[1] - kernel[1]) // right + 1)
        if counts == grid:
            return Lattice(((kernel[0] - down) / 2, (kernel[1] - right) / 2), (float(down), float(right)))
    return Lattice((0.0, 0.0), (size[0] / grid[0], size[1] / grid[1]))


def strides(finest: Pair, grids: Sequence[Grid]) -> tuple[Pair, ...]:
    """The step of each of `grids` in pixels, (down, right), of which the first has steps of `finest`."""
    steps = [finest]
    for fine, coarse in pairwise(grids):
        before = steps[-1]
        steps.append((before[0] * cover(fine[0], coarse[0]), before[1] * cover(fine[1], coarse[1])))
    return tuple(steps)


def cover(fine: int, coarse: int) -> float:
    """How many of `fine` cells along an axis each of `coarse` ones covers.

    A whole number where that, with a last cell that is not full, makes as many; otherwise the quotient.
    """
    whole = -(-fine // coarse)
    return float(whole) if -(-fine // whole) == coarse else fine / coarse


def handed_down(rows: Float[Tensor, "b q n"], above: Seats, below: Seats) -> Float[Tensor, "b q m"]:
    """Shares of the tokens of one layer as shares of the tokens of the layer before it, whose grid may be finer.

    Each token hands its share to the cells it covers (`cover`), equally, or by area where it covers parts of cells. A
    prefix token keeps its share; where the layer before has no such token, the share ends there. Otherwise rows keep
    their sum.

    Merging itself mixes by learned weights, which may prefer one cell to another or look beyond the cells covered:
    these are not followed, so that a map is only as fine as the grid on which attention was paid.
    """
    if above == below:
        return rows
    down, across = (_shares(coarse, fine) for coarse, fine in zip(above.grid, below.grid, strict=True))
    plane = rearrange(rows[..., above.prefix :], "b q (r c) -> b q r c", r=above.grid[0])
    plane = torch.einsum("b q r c, r y, c x -> b q y x", plane, down.to(rows), across.to(rows))
    prefix = rows.new_zeros(*rows.shape[:2], below.prefix)
    kept = min(above.prefix, below.prefix)
    prefix[..., :kept] = rows[..., :kept]
    return torch.cat([prefix, rearrange(plane, "b q y x -> b q (y x)")], dim=-1)


def _shares(coarse: int, fine: int) -> Float[Tensor, "coarse fine"]:
    """What each coarse cell along one axis gives to each fine one; rows sum to 1."""
    step = cover(fine, coarse)
    begins, cells = torch.arange(coarse)[:, None] * step, torch.arange(fine)
    overlap = torch.minimum(begins + step, cells + 1) - torch.maximum(begins, cells)
    overlap = overlap.clamp_min(0).float()
    return overlap / overlap.sum(dim=1, keepdim=True)


def first_convolution(backbone: nn.Module) -> nn.Conv2d | None:
    """The first convolution that meets the pixels: the first module of the kind that takes as many channels as they."""
    channels = getattr(getattr(backbone, "config", None), "in_chans", None)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and channels in (None, module.in_channels):
            return module
    return None
