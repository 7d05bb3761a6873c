"""The principal components of the filters that meet the pixels (arXiv 2010.11929, figure 7, left)."""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sightline.explanation.grids import first_convolution


@dataclass(frozen=True, eq=False)
class Filters:
    """The directions in which the filters differ most, by falling `variance`.

    The signs are such that the entry of largest magnitude is positive. `pictures` are the directions with each one's
    range stretched to 0 to 1.
    """

    directions: Float[np.ndarray, "k channels height width"]
    variance: Float[np.ndarray, " k"]
    pictures: Float[np.ndarray, "k channels height width"]


def principal_filters(kernel: Float[Tensor, "d channels height width"], components: int = 28) -> Filters:
    """At most `components` principal components of the filters; each filter is one sample (divisor d - 1)."""
    samples = rearrange(kernel.detach().cpu().double(), "d c h w -> d (c h w)")
    samples = samples - samples.mean(dim=0)
    _, deviation, directions = torch.linalg.svd(samples, full_matrices=False)
    directions = directions[: min(components, len(samples) - 1)]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * largest.sign()
    low, high = directions.amin(dim=1, keepdim=True), directions.amax(dim=1, keepdim=True)
    stretched = (directions - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    shape = {"c": kernel.shape[1], "h": kernel.shape[2], "w": kernel.shape[3]}
    return Filters(
        rearrange(directions, "k (c h w) -> k c h w", **shape).float().numpy(),
        (deviation[: len(directions)] ** 2 / (len(samples) - 1)).float().numpy(),
        rearrange(stretched, "k (c h w) -> k c h w", **shape).float().numpy(),
    )


def patch_filters(backbone: nn.Module, components: int = 28) -> Filters | None:
    """The components of the first convolution that meets the pixels, as it meets them; None where there is none."""
    convolution = first_convolution(backbone)
    if convolution is None or convolution.out_channels == 1:
        return None
    standardized = getattr(convolution, "standardized", None)
    return principal_filters(convolution.weight if standardized is None else standardized(), components)
