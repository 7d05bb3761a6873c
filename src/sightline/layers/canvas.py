"""Images of unlike sizes in one batch: each lies in the upper left corner of its canvas, and the rest is hidden."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

Grid = tuple[int, int]


def on_canvas(table: Float[Tensor, "1 n d"], own: Grid, canvas: Grid, prefix: int) -> Float[Tensor, "1 m d"]:
    """A row per cell of one image's grid (rows, columns), laid into a larger one; `prefix` rows before them stay."""
    plane = rearrange(table[:, prefix:], "1 (r c) d -> 1 r c d", r=own[0])
    plane = F.pad(plane, (0, 0, 0, canvas[1] - own[1], 0, canvas[0] - own[0]))
    return torch.cat([table[:, :prefix], rearrange(plane, "1 r c d -> 1 (r c) d")], dim=1)


def real_tokens(grids: Sequence[Grid], canvas: Grid, prefix: int) -> Bool[Tensor, "b n"]:
    """True at `prefix` tokens and at the patches that belong to each image of (rows, columns) on the canvas."""
    own = torch.tensor(grids)
    rows = torch.arange(canvas[0]) < own[:, :1]
    columns = torch.arange(canvas[1]) < own[:, 1:]
    patches = rearrange(rows[:, :, None] & columns[:, None, :], "b r c -> b (r c)")
    return F.pad(patches, (prefix, 0), value=True)


def real_pixels(sizes: Int[Tensor, "b 2"], height: int, width: int) -> Bool[Tensor, "b 1 height width"]:
    """True at the pixels that belong to each image of (height, width) in a padded batch."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[:, None]
