"""Class maps of large images by windows that overlap (arXiv 2105.05633, section 4.1)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sightline.schema import require

AT_ONCE = 8
"""Windows that are computed together."""


@torch.inference_mode()
def sliding_window(
    network: Callable[[Tensor], Tensor],
    pixels: Float[Tensor, "1 3 h w"],
    window: int,
    stride: int,
    size: tuple[int, int],
    *,
    flip: bool = False,
) -> Float[Tensor, "k height width"]:
    """Probabilities of each class for every pixel of an image of `size` (height, width), of which `pixels` are read.

    Windows of `window`² pixels stand `stride` apart, the last in each direction moved back to fit; logits are averaged
    where they overlap, and enlarged or reduced bilinearly to `size`. An image that is smaller than a window is enlarged
    first. With `flip` the mirrored image counts as much. Raises UserError unless 0 < stride <= window.
    """
    require(0 < stride <= window, f"the stride of windows has to lie between 1 and their side {window}, not {stride}")
    views = [_logits(network, pixels, window, stride, size)]
    if flip:
        views.append(_logits(network, pixels.flip(-1), window, stride, size).flip(-1))
    return torch.stack([logits.softmax(dim=0) for logits in views]).mean(dim=0)


def _logits(
    network: Callable[[Tensor], Tensor], pixels: Tensor, window: int, stride: int, size: tuple[int, int]
) -> Float[Tensor, "k height width"]:
    height, width = pixels.shape[-2:]
    if min(height, width) < window:
        ratio = window / min(height, width)
        larger = max(int(ratio * height), window), max(int(ratio * width), window)
        pixels = F.interpolate(pixels, size=larger, mode="bilinear", align_corners=False)
        height, width = larger
    corners = [(top, left) for top in _begins(height, window, stride) for left in _begins(width, window, stride)]
    cuts = torch.cat([pixels[..., top : top + window, left : left + window] for top, left in corners])
    maps = torch.cat([network(part) for part in cuts.split(AT_ONCE)])
    total, count = maps.new_zeros(maps.shape[1], height, width), maps.new_zeros(height, width)
    for own, (top, left) in zip(maps, corners, strict=True):
        total[:, top : top + window, left : left + window] += own
        count[top : top + window, left : left + window] += 1
    return F.interpolate((total / count)[None], size=size, mode="bilinear", align_corners=False)[0]


def _begins(length: int, window: int, stride: int) -> list[int]:
    steps = math.ceil((length - window) / stride)
    return [min(i * stride, length - window) for i in range(steps + 1)]
