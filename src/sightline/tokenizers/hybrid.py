"""The hybrid Vision Transformer: patches are cut from the feature map of a residual network (arXiv 2010.11929)."""

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sightline.errors import printable
from sightline.layers.resnet import GROUPS, Bottleneck, GroupNorm, StandardizedConv, padded, stages
from sightline.registry import Variant
from sightline.schema import require
from sightline.types import Tokens

STEM = 64
"""Channels of the first convolution, before the width factor; the first stage puts out four times as many."""

_MOST_STAGES, _DEEPEST, _WIDEST = 8, 128, 64
_EpsTo = Literal["variance", "deviation"]


class HybridEmbedding(nn.Module):
    """A residual network, and the patch embedding of its feature map (arXiv 2010.11929, section 3.1; 2106.10270).

    A 7×7 convolution and a pooling leave a quarter of the rows and columns, and each stage of post-activated
    bottlenecks but the first half of them; `layers` has the number of blocks of each stage, and without any only the
    stem stays. The stem has 64 channels and the stages 256, 512, … times `width_factor`. All convolutions are
    standardised, have group norms after them, and are padded as TensorFlow does it: unevenly where sides are even.

    `patch_size` counts (rows, columns) of the feature map. Where it does not divide the map, `partial="pad"` fills it
    up with zeros below and to the right; `partial="drop"` leaves the rest out, as the published code does, unless the
    whole map is smaller than a patch.
    `weight_eps` is added to the variance of a kernel or to its deviation (`weight_eps_to`), and `norm_eps` to the
    variance in norms: 1e-8 and 1e-5 in timm, 1e-5 to the deviation and 1e-6 in the original. A token depends on the
    whole image, so that images of unlike sizes cannot be padded into one batch. Raises UserError for values out of
    range.
    """

    local = False

    def __init__(
        self,
        width: int,
        *,
        in_chans: int = 3,
        patch_size: tuple[int, int] = (1, 1),
        partial: Literal["pad", "drop"] = "pad",
        layers: Sequence[int] = (3, 4, 9),
        width_factor: float = 1.0,
        weight_eps: float = 1e-8,
        weight_eps_to: _EpsTo = "variance",
        norm_eps: float = 1e-5,
        bias: bool = True,
    ):
        super().__init__()
        _require_stages(layers)
        require(weight_eps_to in get_args(_EpsTo), f"weight_eps_to '{printable(weight_eps_to)}' is unknown")
        for name, value, limit in (
            ("width_factor", width_factor, _WIDEST),
            ("weight_eps", weight_eps, 1),
            ("norm_eps", norm_eps, 1),
        ):
            sane = isinstance(value, int | float) and 0 <= value <= limit
            require(sane, f"{name} must lie between 0 and {limit}, not {printable(value)}")
        stem = int(STEM * width_factor)
        require(stem > 0 and stem % GROUPS == 0, f"width_factor {width_factor} makes {stem} channels, not 32, 64, …")
        self.patch_size, self.partial, self.count = patch_size, partial, len(layers)
        widths = [4 * stem * 2**stage for stage in range(len(layers))]
        convolve = functools.partial(StandardizedConv, eps=weight_eps, eps_to=weight_eps_to, padding="same")
        normalise = functools.partial(GroupNorm, eps=norm_eps)
        self.conv = convolve(in_chans, stem, 7, 2)
        self.norm = normalise(stem)
        block = functools.partial(Bottleneck, convolve=convolve, normalise=normalise)
        self.stages = stages(stem, widths, tuple(layers), block)
        self.projection = nn.Conv2d([stem, *widths][-1], width, kernel_size=patch_size, stride=patch_size, bias=bias)
        nn.init.trunc_normal_(self.projection.weight, std=self.projection.weight[0].numel() ** -0.5)
        if bias:
            nn.init.zeros_(self.projection.get_parameter("bias"))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches for an image of (height, width) pixels."""
        more = [side - 1 if self.partial == "pad" else 0 for side in self.patch_size]
        sides = zip(features(size, self.count), self.patch_size, more, strict=True)
        rows, columns = (max((cells + extra) // patch, 1) for cells, patch, extra in sides)
        return rows, columns

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Tokens:
        x = F.relu(self.norm(self.conv(pixels)))
        x = F.max_pool2d(padded(x, 3, 2, float("-inf")), kernel_size=3, stride=2)
        for stage in self.stages:
            x = stage(x)
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        below, right = (max(n * p - s, 0) for n, p, s in zip(grid, self.patch_size, x.shape[-2:], strict=True))
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return Tokens(rearrange(self.projection(x), "b d r c -> b (r c) d"), grid)


def features(size: tuple[int, int], stages: int) -> tuple[int, int]:
    """Rows and columns of the feature map of an image of (height, width) pixels, after a number of stages."""
    for _ in range(1 + max(stages, 1)):
        size = -(-size[0] // 2), -(-size[1] // 2)
    return size


def _require_stages(layers: Sequence[int]) -> None:
    listed = isinstance(layers, list | tuple) and all(isinstance(n, int) and 0 < n <= _DEEPEST for n in layers)
    words = f"layers must be positive numbers of blocks, one for each stage, at most {_DEEPEST} in all, not "
    sane = listed and len(layers) <= _MOST_STAGES and sum(layers) <= _DEEPEST
    require(sane, words + printable(layers, 60))


TOKENIZERS = {"hybrid": HybridEmbedding}

_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

STAGES = {"r": [], "r26": [2, 2, 2, 2], "r50_s16": [3, 4, 9], "r50_s32": [3, 4, 6, 3]}
"""The blocks of each stage in published networks. Lists, because that is how settings come back from JSON."""


def _row(size: str, stem: str, patch: int, image: int, parameters: int) -> Variant:
    half = (0.5, 0.5, 0.5)
    return Variant(
        family="vit",
        parameters=parameters,
        paper="2010.11929" if stem == "r50_s16" else "2106.10270",
        settings={
            **_SIZES[size],
            "tokenizer": "hybrid",
            "tokenizer_options": {"layers": STAGES[stem]},
            "patch_size": patch,
            "image_size": image,
        },
        preprocess={"crop_pct": 0.9 if image == 224 else 1.0, "interpolation": "bicubic", "mean": half, "std": half},
        sources=("timm", "google"),
    )


VARIANTS = {
    name: _row(*row)
    for name, row in {
        "vit_tiny_r_s16_p8_224": ("tiny", "r", 8, 224, 6_337_704),
        "vit_tiny_r_s16_p8_384": ("tiny", "r", 8, 384, 6_355_944),
        "vit_small_r26_s32_224": ("small", "r26", 1, 224, 36_431_912),
        "vit_small_r26_s32_384": ("small", "r26", 1, 384, 36_468_392),
        "vit_base_r26_s32_224": ("base", "r26", 1, 224, 101_383_976),
        "vit_base_r50_s16_224": ("base", "r50_s16", 1, 224, 98_659_112),
        "vit_base_r50_s16_384": ("base", "r50_s16", 1, 384, 98_950_952),
        "vit_large_r50_s32_224": ("large", "r50_s32", 1, 224, 328_994_856),
        "vit_large_r50_s32_384": ("large", "r50_s32", 1, 384, 329_092_136),
    }.items()
}

SMALL = {
    "hybrid": (
        "vit_base_r50_s16_224",
        {
            "image_size": (32, 48),
            "tokenizer_options": {"layers": [1, 1], "width_factor": 0.5},
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 3,
        },
    )
}
