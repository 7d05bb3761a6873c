"""Mean attention distance: how far across the image a head looks (arXiv 2010.11929, figure 7 and appendix D.7)."""

import torch
from jaxtyping import Float
from torch import Tensor


def mean_distance(weights: Float[Tensor, "b h n n"], between: Float[Tensor, "patches patches"]) -> Float[Tensor, " h"]:
    """For each head the distance in pixels between a patch and those it attends to, by weight.

    `between` are the distances between the patches, which are the last of the tokens. A mean over the patches that ask
    and over the batch. What a patch gives to the prefix tokens counts as distance 0: the weights are not scaled up for
    it.
    """
    prefix = weights.shape[-1] - len(between)
    return (weights[:, :, prefix:, prefix:] * between).sum(dim=-1).mean(dim=(0, 2))


def patch_distances(grid: tuple[int, int], stride: tuple[float, float]) -> Float[Tensor, "patches patches"]:
    """Euclidean distances in pixels between the centres of all patches, row by row.

    `stride` is the step of the grid in pixels, (down, right).
    """
    axes = (torch.arange(cells, dtype=torch.float32) * step for cells, step in zip(grid, stride, strict=True))
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    # Never by a product of matrices, whose rounding would put a patch a little way from itself.
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
