"""What a model has learned about where patches stand (arXiv 2010.11929, figure 7, centre)."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sightline.layers.positions import FixedPositions, LearnedPositions


def similarity(table: Float[Tensor, "1 n d"], grid: tuple[int, int]) -> Float[Tensor, "rows columns rows columns"]:
    """Cosine similarity, -1 to 1, of every patch's position vector with every other's; prefix rows are left out."""
    unit = F.normalize(table[0, table.shape[1] - grid[0] * grid[1] :].float(), dim=-1)
    return rearrange(unit @ unit.T, "(r c) (y x) -> r c y x", r=grid[0], y=grid[0])


def position_similarity(
    backbone: nn.Module, grid: tuple[int, int] | None = None
) -> Float[Tensor, "rows columns rows columns"] | None:
    """The similarities of a backbone's position vectors as it uses them on `grid`, that of its first layer.

    On the grid that they were made for where `grid` is None. None where it has no table of positions, as with relative
    ones, which are biases between places.
    """
    for module in backbone.modules():
        if isinstance(module, (LearnedPositions, FixedPositions)):
            own = module.grid if grid is None else grid
            return similarity(module(own), own)
    return None
