"""Where a token stands: learned tables, fixed waves, relative biases, and their change from one grid to another."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

Grid = tuple[int, int]


def _to_size(mode: str, *, antialias: bool = False, align_corners: bool | None = False) -> Callable:
    def resample(table: Tensor, grid: Grid) -> Tensor:
        return F.interpolate(table, size=grid, mode=mode, antialias=antialias, align_corners=align_corners)

    return resample


def _by_factor(table: Tensor, grid: Grid) -> Tensor:
    # DINO scales by (cells + 0.1) / old, a guard against rounding that shifts every sample point by a little.
    factor = tuple((new + 0.1) / old for new, old in zip(grid, table.shape[-2:], strict=True))
    return F.interpolate(table, scale_factor=factor, mode="bicubic", align_corners=False)


RESAMPLERS: dict[str, Callable[[Tensor, Grid], Tensor]] = {
    "bicubic_antialias": _to_size("bicubic", antialias=True),
    "bicubic": _to_size("bicubic"),
    "bilinear": _to_size("bilinear"),
    "bilinear_corners": _to_size("bilinear", align_corners=True),
    "bicubic_factor": _by_factor,
}
"""How each source stretches its position table to another grid.

`bicubic_antialias`: timm, open_clip, DINOv2 with registers. `bicubic`: DeiT, MAE, T2T, BEiT, transformers.
`bilinear`: Segmenter, timm's reader of Google files. `bilinear_corners`: the original JAX code and big_vision (a zoom
of order 1 with aligned corners). `bicubic_factor`: DINO and DINOv2 without registers.
"""


def resample_table(table: Float[Tensor, "b n d"], old: Grid, new: Grid, method: str) -> Float[Tensor, "b m d"]:
    """A table of position vectors for `old` (rows, columns) stretched to `new`; prefix rows before them stay.

    The table holds old[0]*old[1] rows, preceded by any number of prefix rows (class, distillation). The result is the
    table itself where the grids are equal.
    """
    if old == new:
        return table
    prefix = table.shape[1] - old[0] * old[1]
    assert prefix >= 0, f"a table of {table.shape[1]} rows cannot hold a grid of {old[0]}×{old[1]}"
    plane = rearrange(table[:, prefix:].float(), "b (r c) d -> b d r c", r=old[0])
    patches = rearrange(RESAMPLERS[method](plane, new), "b d r c -> b (r c) d").to(table.dtype)
    return torch.cat([table[:, :prefix], patches], dim=1)


class LearnedPositions(nn.Module):
    """A learned vector for every cell of a grid, and for the prefix tokens that have one (arXiv 2010.11929, eq. 1)."""

    def __init__(self, width: int, grid: Grid, *, prefix: int = 1, resample: str = "bicubic_antialias"):
        super().__init__()
        self.grid, self.prefix, self.resample = grid, prefix, resample
        self.table = nn.Parameter(torch.zeros(1, prefix + grid[0] * grid[1], width))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, grid: Grid) -> Float[Tensor, "1 n d"]:
        return resample_table(self.table, self.grid, grid, self.resample)


class FixedPositions(nn.Module):
    """Sine and cosine waves that are not learned; prefix tokens get zeros.

    `kind="sincos2d"`: half of the channels encode the column, half the row, each as sines then cosines (arXiv
    2111.06377, appendix A.1; needs a width that 4 divides). `kind="sincos1d"`: the place in the sequence, sines and
    cosines in turn (arXiv 1706.03762, section 3.5; needs an even width).
    """

    table: Float[Tensor, "1 n d"]

    def __init__(self, width: int, grid: Grid, *, prefix: int = 1, kind: str = "sincos2d"):
        super().__init__()
        self.width, self.grid, self.prefix, self.kind = width, grid, prefix, kind
        self.register_buffer("table", self._table(grid), persistent=False)

    def _table(self, grid: Grid) -> Float[Tensor, "1 n d"]:
        patches = {"sincos2d": sincos2d, "sincos1d": sincos1d}[self.kind](self.width, grid)
        return F.pad(patches, (0, 0, self.prefix, 0))[None]

    def forward(self, grid: Grid) -> Float[Tensor, "1 n d"]:
        return self.table if grid == self.grid else self._table(grid).to(self.table)


def _waves(count: int, at: Float[Tensor, " n"]) -> Float[Tensor, "n count"]:
    return at[:, None] / 10000 ** (_range(count) / count)


def _range(count: int) -> Float[Tensor, " count"]:
    # The device is named so that tables are real numbers even in a model that is being laid out without memory.
    return torch.arange(count, dtype=torch.float64, device="cpu")


def sincos2d(width: int, grid: Grid) -> Float[Tensor, "n d"]:
    """Fixed two-dimensional positions for a grid of (rows, columns), row by row: column waves first, then row waves."""
    assert width % 4 == 0, f"two-dimensional waves need a width that 4 divides, not {width}"
    rows, columns = torch.meshgrid(*(_range(size) for size in grid), indexing="ij")
    halves = [_waves(width // 4, axis.flatten()) for axis in (columns, rows)]
    return torch.cat([wave for half in halves for wave in (half.sin(), half.cos())], dim=1).float()


def sincos1d(width: int, grid: Grid) -> Float[Tensor, "n d"]:
    """Fixed positions along the sequence of grid[0]*grid[1] patches: sine at even channels, cosine at odd ones."""
    assert width % 2 == 0, f"waves need an even width, not {width}"
    angles = _waves(width // 2, _range(grid[0] * grid[1]))
    return rearrange(torch.stack([angles.sin(), angles.cos()]), "two n k -> n (k two)").float()


class RelativePositions(nn.Module):
    """A learned bias for every head and every offset between two patches, added to the attention logits.

    The table has (2·rows-1)·(2·columns-1) offsets and, where there are prefix tokens, three rows more: from prefix to
    patch, from patch to prefix, and between prefix tokens (arXiv 2106.08254, section 2.1; the relative attention that
    arXiv 2010.11929 compares in appendix D.4).
    """

    index: Int[Tensor, "n n"]

    def __init__(self, heads: int, grid: Grid, *, prefix: int = 1):
        super().__init__()
        self.grid, self.prefix = grid, prefix
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.table = nn.Parameter(torch.zeros(offsets + 3 * (prefix > 0), heads))
        self.register_buffer("index", relative_index(grid, prefix), persistent=False)

    def forward(self, grid: Grid) -> Float[Tensor, "h n n"]:
        table, index = self.table, self.index
        if grid != self.grid:
            table, index = resample_relative(table, self.grid, grid), relative_index(grid, self.prefix).to(index)
        return rearrange(table[index], "n m h -> h n m")


def resample_relative(table: Float[Tensor, "n h"], old: Grid, new: Grid) -> Float[Tensor, "m h"]:
    """A relative table for `old` (rows, columns) stretched to `new`; the rows of prefix tokens after it stay."""
    before, after = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (old, new))
    offsets = before[0] * before[1]
    return torch.cat([resample_table(table[None, :offsets], before, after, "bicubic")[0], table[offsets:]])


def relative_index(grid: Grid, prefix: int) -> Int[Tensor, "n n"]:
    """For each pair (query, key) of prefix and patch tokens, the row of the relative table that holds its bias."""
    rows, columns = grid
    cells = torch.stack(torch.meshgrid(*(torch.arange(n, device="cpu") for n in grid), indexing="ij")).flatten(1)
    offset = cells[:, :, None] - cells[:, None, :]
    index = (offset[0] + rows - 1) * (2 * columns - 1) + offset[1] + columns - 1
    if prefix:
        offsets = (2 * rows - 1) * (2 * columns - 1)
        index = F.pad(index, (prefix, 0, prefix, 0))
        index[:prefix, prefix:], index[prefix:, :prefix], index[:prefix, :prefix] = offsets, offsets + 1, offsets + 2
    return index
