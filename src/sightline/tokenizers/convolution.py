"""An image read by a few overlapping convolutions instead of one linear map per patch (arXiv 2106.14881)."""

import math
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sightline.types import Tokens

NARROWEST = 16
"""Channels of a layer, at least."""


class ConvolutionalStem(nn.Module):
    """Small convolutions, each with a stride, whose strides multiply to the patch; then a linear map to the width.

    Neighbouring tokens see pixels in common, and edges are found before patches are cut, which few images suffice to
    learn (arXiv 2106.14881, section 3; 2104.05704, section 3.3). Each layer is a 3×3 convolution (5×5 where its stride
    is three, and so on), a norm over the whole image and a GELU; their channels double up to `width`. `patch_size` is
    (height, width) in pixels; an image that it does not divide is filled with zeros below and to the right
    (`partial="pad"`), or cut ("drop"). A token depends on what surrounds the image, so that images of unlike sizes
    cannot be padded into one batch.
    """

    local = False

    def __init__(
        self,
        width: int,
        *,
        in_chans: int = 3,
        patch_size: tuple[int, int] = (16, 16),
        partial: Literal["pad", "drop"] = "pad",
    ):
        super().__init__()
        self.patch_size, self.partial = patch_size, partial
        strides = _strides(patch_size)
        layers, inside = [], in_chans
        for number, stride in enumerate(strides):
            outside = min(max(width >> (len(strides) - 1 - number), NARROWEST), width)
            layers.append(_Layer(inside, outside, stride))
            inside = outside
        self.layers = nn.ModuleList(layers)
        self.projection = nn.Conv2d(inside, width, kernel_size=1)
        nn.init.trunc_normal_(self.projection.weight, std=inside**-0.5)
        nn.init.constant_(self.projection.get_parameter("bias"), 0.0)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image of (height, width) pixels."""
        step = math.ceil if self.partial == "pad" else math.floor
        rows, columns = (step(pixels / patch) for pixels, patch in zip(size, self.patch_size, strict=True))
        return rows, columns

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Tokens:
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        height, width = (n * p for n, p in zip(grid, self.patch_size, strict=True))
        x = F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))
        for layer in self.layers:
            x = layer(x)
        return Tokens(rearrange(self.projection(x), "b d r c -> b (r c) d"), grid)


class _Layer(nn.Module):
    def __init__(self, inside: int, outside: int, stride: tuple[int, int]):
        super().__init__()
        kernel = max(2 * stride[0] - 1, 3), max(2 * stride[1] - 1, 3)
        padding = kernel[0] // 2, kernel[1] // 2
        self.convolution = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
        self.norm = nn.GroupNorm(1, outside)
        nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="relu")

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        return F.gelu(self.norm(self.convolution(x)))


def _strides(patch: tuple[int, int]) -> list[tuple[int, int]]:
    """Small strides (rows, columns) of successive layers, whose products are the patch; the large ones last."""
    rows, columns = map(_factors, patch)
    length = max(len(rows), len(columns), 1)
    pairs = zip([1] * (length - len(rows)) + rows, [1] * (length - len(columns)) + columns, strict=True)
    return list(pairs)


def _factors(number: int) -> list[int]:
    found, factor = [], 2
    while number > 1:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return found


TOKENIZERS = {"convolution": ConvolutionalStem}
