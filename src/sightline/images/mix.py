"""Mixing the images of a batch in pairs: mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899).

Neighbours are mixed with each other, (0, 1), (2, 3), …, and what happens to a pair depends on the key of its first
image alone: a batch gives the same pixels however it is split over processes or micro-batches of even length.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sightline.errors import UserError


class Draw(NamedTuple):
    """What happens to a pair: each image keeps `share` of itself; `box` (top, left, bottom, right) is exchanged."""

    share: float
    box: tuple[int, int, int, int] | None = None


def mix(
    pixels: Float[Tensor, "b c h w"],
    targets: Int[Tensor, " b"] | Float[Tensor, "b k"],
    keys: Int[Tensor, " b"],
    *,
    num_classes: int,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    switch_prob: float = 0.5,
    smoothing: float = 0.0,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
    """Mix each pair of neighbours both ways and return soft targets; an odd last image is left as it is.

    The alphas are those of the Beta distributions, 0 for never; with both, `switch_prob` (0 to 1) is the share of
    CutMix. `targets` are class indices or probabilities; `smoothing` (0 to 1) moves that much of each target evenly
    over all classes, as in PyTorch's cross-entropy. Raises UserError for a setting that is out of its range.
    """
    for name, value, most in (
        ("mixup_alpha", mixup_alpha, math.inf),
        ("cutmix_alpha", cutmix_alpha, math.inf),
        ("switch_prob", switch_prob, 1),
        ("smoothing", smoothing, 1),
    ):
        if not 0 <= value <= most or math.isinf(value):
            raise UserError(f"{name} has to be {'at least 0' if most > 1 else 'from 0 to 1'}, not {value}")
    soft = F.one_hot(targets.long(), num_classes) if targets.ndim == 1 else targets
    soft = soft.to(torch.float32) * (1 - smoothing) + smoothing / num_classes
    if mixup_alpha == cutmix_alpha == 0 or len(pixels) < 2:
        return pixels, soft

    paired = len(pixels) // 2 * 2
    size = (pixels.shape[2], pixels.shape[3])
    draws = [draw(key, size, mixup_alpha, cutmix_alpha, switch_prob) for key in keys[:paired:2].tolist()]
    share = torch.tensor([d.share for d in draws], device=pixels.device).repeat_interleave(2)[:, None]
    partner = torch.arange(paired, device=pixels.device).view(-1, 2).flip(1).flatten()
    others, other_targets = pixels[partner], soft[partner]

    blend = torch.tensor([1.0 if d.box else d.share for d in draws], device=pixels.device, dtype=pixels.dtype)
    blend = blend.repeat_interleave(2)[:, None, None, None]
    mixed = pixels.clone()
    mixed[:paired] = blend * pixels[:paired] + (1 - blend) * others
    for pair, (_, box) in enumerate(draws):
        if box:
            top, left, bottom, right = box
            both = slice(2 * pair, 2 * pair + 2)
            mixed[both, :, top:bottom, left:right] = others[both, :, top:bottom, left:right]
    soft[:paired] = share * soft[:paired] + (1 - share) * other_targets
    return mixed, soft


def draw(key: int, size: tuple[int, int], mixup_alpha: float, cutmix_alpha: float, switch_prob: float) -> Draw:
    """Decide a pair's fate from its key alone; `size` is (height, width) in pixels."""
    random = np.random.default_rng(key)
    cut = cutmix_alpha > 0 and (mixup_alpha == 0 or random.random() < switch_prob)
    alpha = cutmix_alpha if cut else mixup_alpha
    share = random.beta(alpha, alpha)
    if not cut:
        return Draw(share)
    height, width = size
    row, column = random.integers(height), random.integers(width)
    rows, columns = height * math.sqrt(1 - share), width * math.sqrt(1 - share)
    top, bottom = max(int(row - rows / 2), 0), min(int(row + rows / 2), height)
    left, right = max(int(column - columns / 2), 0), min(int(column + columns / 2), width)
    return Draw(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))
