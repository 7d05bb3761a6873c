"""Where a token stands: learned tables, fixed waves, relative biases, and their change from one grid to another."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
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


def _geometric(weights: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Grid], Tensor]:
    def resample(table: Tensor, sides: Grid) -> Tensor:
        axes = (_between(old, new, weights).to(table) for old, new in zip(table.shape[-2:], sides, strict=True))
        return torch.einsum("b d r c, y r, x c -> b d y x", table, *axes)

    return resample


def _between(old: int, new: int, weights: Callable[[Tensor, Tensor], Tensor]) -> Float[Tensor, "new old"]:
    """The matrix along one axis from `old` offsets, spread out to the extent of `new` ones, to each of those."""
    ratio, steps, extent = (1.01, 1.5), old // 2, new // 2
    while ratio[1] - ratio[0] > 1e-6:
        middle = sum(ratio) / 2
        reach = (middle**steps - 1) / (middle - 1)
        ratio = (ratio[0], middle) if reach > extent else (middle, ratio[1])
    # The last ratio tried, not the end of the interval: so the original stops, and a millionth is felt in the far ones.
    away = torch.cumsum(middle ** _range(steps), dim=0)
    at = torch.cat([-away.flip(0), _range(1), away])
    to = (_range(new) - extent).clamp(at[0], at[-1])
    return weights(at, to) if steps else torch.ones(new, 1, dtype=to.dtype, device="cpu")


def _lines(at: Float[Tensor, " m"], to: Float[Tensor, " n"]) -> Float[Tensor, "n m"]:
    """What the values at the places `at`, joined by straight lines, contribute at the places `to` between them."""
    return _b_splines(torch.cat([at[:1], at, at[-1:]]), 1, to)


def _cubics(at: Float[Tensor, " m"], to: Float[Tensor, " n"]) -> Float[Tensor, "n m"]:
    """What the values at the places `at` contribute at the places `to` to the cubic spline through all of them.

    Its third derivative is continuous at the second and the last but one place too ("not a knot"), as in FITPACK;
    through three places goes a parabola.
    """
    degree = min(3, len(at) - 1)
    knots = torch.cat([at[:1].expand(degree + 1), at[2:-2], at[-1:].expand(degree + 1)])
    return torch.linalg.solve(_b_splines(knots, degree, at), _b_splines(knots, degree, to), left=False)


def _b_splines(knots: Float[Tensor, " k"], degree: int, to: Float[Tensor, " n"]) -> Float[Tensor, "n m"]:
    """Every B-spline of these knots at the places `to`, by de Boor's recursion."""
    to = to[:, None]
    last = (to == knots[-1]) & (knots[:-1] < knots[-1]) & (knots[1:] == knots[-1])
    found = (((knots[:-1] <= to) & (to < knots[1:])) | last).to(knots)
    for width in range(1, degree + 1):
        spans = knots[width:] - knots[:-width]
        spans = torch.where(spans > 0, spans, 1)  # what is divided by an empty span is zero
        rising, falling = (to - knots[: -width - 1]) / spans[:-1], (knots[width + 1 :] - to) / spans[1:]
        found = rising * found[:, :-1] + falling * found[:, 1:]
    return found


RESAMPLERS: dict[str, Callable[[Tensor, Grid], Tensor]] = {
    "bicubic_antialias": _to_size("bicubic", antialias=True),
    "bicubic": _to_size("bicubic"),
    "bicubic_corners": _to_size("bicubic", align_corners=True),
    "bilinear": _to_size("bilinear"),
    "bilinear_corners": _to_size("bilinear", align_corners=True),
    "bicubic_factor": _by_factor,
}
"""How each source stretches its position table to another grid.

`bicubic_antialias`: timm, open_clip, DINOv2 with registers. `bicubic`: DeiT, MAE, T2T, BEiT, transformers.
`bicubic_corners`: torchvision. `bilinear`: Segmenter, timm's reader of Google files. `bilinear_corners`: the original
JAX code and big_vision (a zoom of order 1 with aligned corners). `bicubic_factor`: DINO and DINOv2 without registers.
"""

RELATIVE_RESAMPLERS: dict[str, Callable[[Tensor, Grid], Tensor]] = {
    **RESAMPLERS,
    "geometric": _geometric(_cubics),
    "geometric_linear": _geometric(_lines),
}
"""How each source stretches its table of relative positions; the sides count offsets, and are odd.

`geometric`: BEiT, whose fine-tuning at another resolution puts the old offsets at distances that grow by a constant
ratio until they reach as far as the new ones, and reads a cubic spline through them. `geometric_linear`: timm, with
straight lines in its place. `bicubic`: Swin. `bilinear`: transformers' BEiT.
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
    patches = rearrange(RELATIVE_RESAMPLERS[method](plane, new), "b d r c -> b (r c) d").to(table.dtype)
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
    """Sine and cosine waves that are not learned: a frozen parameter, which checkpoints carry and counts include.

    `kind="sincos2d"`: half of the channels encode the column, half the row, each as sines then cosines (arXiv
    2111.06377, appendix A.1; needs a width that 4 divides); prefix tokens get zeros. `kind="sincos1d"`: the place in
    the sequence, prefix tokens counted too, sines and cosines in turn (arXiv 1706.03762, section 3.5). Another grid
    gets the stretched table, as with learned positions.
    """

    def __init__(
        self, width: int, grid: Grid, *, prefix: int = 1, kind: str = "sincos2d", resample: str = "bicubic_antialias"
    ):
        super().__init__()
        self.grid, self.prefix, self.resample = grid, prefix, resample
        self.table = nn.Parameter(torch.empty(1, prefix + grid[0] * grid[1], width), requires_grad=False)
        if not self.table.is_meta:
            waves = {"sincos2d": sincos2d, "sincos1d": sincos1d}[kind]
            self.table.copy_(waves(width, grid, prefix))

    def forward(self, grid: Grid) -> Float[Tensor, "1 n d"]:
        return resample_table(self.table, self.grid, grid, self.resample)


def _waves(count: int, at: Float[Tensor, " n"]) -> Float[Tensor, "n count"]:
    return at[:, None] / 10000 ** (_range(count) / count)


def _range(count: int) -> Float[Tensor, " count"]:
    # The device is named so that tables are real numbers even in a model that is being laid out without memory.
    return torch.arange(count, dtype=torch.float64, device="cpu")


def sincos2d(width: int, grid: Grid, prefix: int = 0) -> Float[Tensor, "n d"]:
    """Fixed two-dimensional positions for a grid of (rows, columns), row by row: column waves first, then row waves.

    Before them stand `prefix` rows of zeros.
    """
    assert width % 4 == 0, f"two-dimensional waves need a width that 4 divides, not {width}"
    rows, columns = torch.meshgrid(*(_range(size) for size in grid), indexing="ij")
    halves = [_waves(width // 4, axis.flatten()) for axis in (columns, rows)]
    waves = torch.cat([wave for half in halves for wave in (half.sin(), half.cos())], dim=1).float()
    return F.pad(waves, (0, 0, prefix, 0))


def sincos1d(width: int, grid: Grid, prefix: int = 0) -> Float[Tensor, "n d"]:
    """Fixed positions along the sequence of `prefix` tokens and grid[0]*grid[1] patches.

    Sine stands at even channels, cosine at odd ones; an odd width ends with a sine.
    """
    at = _range(prefix + grid[0] * grid[1])
    angles = at[:, None] / 10000 ** (2 * _range((width + 1) // 2) / width)
    return rearrange(torch.stack([angles.sin(), angles.cos()]), "two n k -> n (k two)")[:, :width].float()


def sine_positions(real: Bool[Tensor, "b r c"], width: int) -> Float[Tensor, "b n d"]:
    """DETR's positions for each image's own part of a grid, where `real` is True (arXiv 2005.12872, appendix A.4).

    Rows, then columns, are counted from 1 over the real cells and scaled to 2π at the last; sine and cosine take turns
    over the channels, half of which, `width` / 2, belong to each axis.
    """
    half = width // 2
    powers = 10000 ** (2 * (torch.arange(half, device=real.device) // 2) / half)
    axes = []
    for axis in (1, 2):
        counted = real.float().cumsum(dim=axis)
        last = counted.select(axis, -1).unsqueeze(axis)
        angles = (counted / (last + 1e-6) * 2 * math.pi)[..., None] / powers
        waves = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1)
        axes.append(rearrange(waves, "b r c k two -> b (r c) (k two)"))
    return torch.cat(axes, dim=-1)


class RelativePositions(nn.Module):
    """A learned bias for every head and every offset between two patches, added to the attention logits.

    The table has (2·rows-1)·(2·columns-1) offsets and, where there are prefix tokens, three rows more: from prefix to
    patch, from patch to prefix, and between prefix tokens (arXiv 2106.08254, section 2.1; the relative attention that
    arXiv 2010.11929 compares in appendix D.4).
    """

    index: Int[Tensor, "n n"]

    def __init__(self, heads: int, grid: Grid, *, prefix: int = 1, resample: str = "bicubic"):
        super().__init__()
        self.grid, self.prefix, self.resample = grid, prefix, resample
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.table = nn.Parameter(torch.zeros(offsets + 3 * (prefix > 0), heads))
        self.register_buffer("index", relative_index(grid, prefix), persistent=False)

    def forward(self, grid: Grid) -> Float[Tensor, "h n n"]:
        table, index = self.table, self.index
        if grid != self.grid:
            table = resample_relative(table, self.grid, grid, self.resample)
            index = relative_index(grid, self.prefix).to(index)
        return rearrange(table[index], "n m h -> h n m")


def resample_relative(
    table: Float[Tensor, "n h"], old: Grid, new: Grid, method: str = "bicubic"
) -> Float[Tensor, "m h"]:
    """A relative table for `old` (rows, columns) stretched to `new`; the rows of prefix tokens after it stay.

    `method` is a key of `RELATIVE_RESAMPLERS`.
    """
    before, after = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (old, new))
    offsets = before[0] * before[1]
    return torch.cat([resample_table(table[None, :offsets], before, after, method)[0], table[offsets:]])


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
