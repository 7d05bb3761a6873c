"""Mean attention distance: how far across the image a head looks (arXiv 2010.11929, figure 7 and appendix D.7)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

_LONG = 2**24


def mean_distance(
    weights: Float[Tensor, "b h n n"], grid: tuple[int, int], prefix: int, stride: tuple[float, float]
) -> Float[Tensor, " h"]:
    """For each head the distance in pixels between a patch and those it attends to, by weight.

    A mean over the patches that ask and over the batch. What a patch gives to the prefix tokens counts as distance 0:
    the weights are not scaled up for it. `stride` is the step of the grid in pixels, (down, right).
    """
    between = patch_distances(grid, stride).to(weights.device)
    return (weights[:, :, prefix:, prefix:] * between).sum(dim=-1).mean(dim=(0, 2))


def patch_distances(grid: tuple[int, int], stride: tuple[float, float]) -> Float[Tensor, "patches patches"]:
    """Euclidean distances in pixels between the centres of all patches, row by row."""
    axes = (torch.arange(cells, dtype=torch.float32) * step for cells, step in zip(grid, stride, strict=True))
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return (centres[:, None] - centres[None]).norm(dim=-1)


def patch_stride(backbone: nn.Module, size: tuple[int, int], grid: tuple[int, int]) -> tuple[float, float]:
    """The step of a backbone's grid in pixels, (down, right), for an image of `size` that became `grid`.

    Read from the grid that its tokenizer gives a very long image, where a last patch that is cut off or filled up no
    longer counts; so any stem will do. Without a tokenizer the grid is taken to cover the image exactly.
    """
    grid_of = getattr(getattr(backbone, "tokenizer", None), "grid", None)
    if grid_of is None:
        return size[0] / grid[0], size[1] / grid[1]
    rows, columns = grid_of((_LONG, _LONG))
    return float(round(_LONG / rows)), float(round(_LONG / columns))
