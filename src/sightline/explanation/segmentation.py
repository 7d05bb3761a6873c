"""Attention as a segmentation, as DINO shows it (arXiv 2104.14294, figure 4): what holds most of a head's attention."""

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float

from sightline.explanation.render import View, spread

MASS = 0.6
"""The share of a map's sum that its mask keeps: 60 % in the paper."""


def mass_mask(maps: Float[np.ndarray, "*b rows columns"], mass: float = MASS) -> Bool[np.ndarray, "*b rows columns"]:
    """The fewest cells of each map whose values sum to at least `mass` of the map's sum, the largest first.

    `maps` are not negative; `mass` lies above 0 and up to 1. Of equal values the earlier comes first. A map of zeros
    has an empty mask.
    """
    assert 0 < mass <= 1, f"a share lies above 0 and up to 1, not {mass}"
    flat = rearrange(maps.astype(np.float64), "... r c -> ... (r c)")
    order = np.argsort(-flat, axis=-1, kind="stable")
    falling = np.take_along_axis(flat, order, axis=-1)
    total = falling.sum(axis=-1, keepdims=True)
    before = np.cumsum(falling, axis=-1) - falling
    kept = (before < mass * total * (1 - 1e-9)) & (falling > 0)
    mask = np.zeros_like(flat, dtype=bool)
    np.put_along_axis(mask, order, kept, axis=-1)
    return mask.reshape(maps.shape)


def pixel_mask(
    cells: Float[np.ndarray, "rows columns"], height: int, width: int, view: View, mass: float = MASS
) -> Bool[np.ndarray, "height width"]:
    """The mask of a map in pixels of an image: thresholded on the grid, each pixel as the cell it lies in.

    Pixels that the model did not see are outside.
    """
    mask = mass_mask(cells, mass).astype(np.float32)
    heat, seen = spread(mask, height, width, view, blocks=True)
    return (heat > 0.5) & seen


def overlap(mask: Bool[np.ndarray, "height width"], truth: Bool[np.ndarray, "height width"]) -> float:
    """Intersection over union of two masks (the Jaccard index), 0 to 1; 1 where both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0
