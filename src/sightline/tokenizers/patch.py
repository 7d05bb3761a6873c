"""An image cut into patches that do not overlap, each read by one linear map (arXiv 2010.11929, section 3.1)."""

import math
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sightline.types import Tokens


class PatchEmbedding(nn.Module):
    """Patch embedding: a convolution whose stride is its kernel.

    `patch_size` is (height, width) in pixels. Where it does not divide the image, `partial="pad"` fills the last row
    and column of patches with zeros below and to the right, so that every pixel is seen; `partial="drop"` leaves the
    rest of the image out, as most published code does. `bias` is added to every patch.
    """

    def __init__(
        self,
        width: int,
        *,
        in_chans: int = 3,
        patch_size: tuple[int, int] = (16, 16),
        partial: Literal["pad", "drop"] = "pad",
        bias: bool = True,
    ):
        super().__init__()
        self.patch_size, self.partial = patch_size, partial
        self.projection = nn.Conv2d(in_chans, width, kernel_size=patch_size, stride=patch_size, bias=bias)
        nn.init.trunc_normal_(self.projection.weight, std=(in_chans * math.prod(patch_size)) ** -0.5)
        if bias:
            nn.init.constant_(self.projection.get_parameter("bias"), 0.0)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches for an image of (height, width) pixels."""
        step = math.ceil if self.partial == "pad" else math.floor
        rows, columns = (step(pixels / patch) for pixels, patch in zip(size, self.patch_size, strict=True))
        return rows, columns

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Tokens:
        height, width = pixels.shape[-2:]
        grid = self.grid((height, width))
        below, right = (max(n * p - s, 0) for n, p, s in zip(grid, self.patch_size, (height, width), strict=True))
        if below or right:
            pixels = F.pad(pixels, (0, right, 0, below))
        return Tokens(rearrange(self.projection(pixels), "b d r c -> b (r c) d"), grid)


TOKENIZERS = {"patch": PatchEmbedding}
