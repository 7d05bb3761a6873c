"""The Pooling-based Vision Transformer (arXiv 2103.16302): fewer and wider tokens from stage to stage."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.backbones.backbone import Backbone
from sightline.errors import printable
from sightline.layers.canvas import on_canvas, real_pixels, real_tokens
from sightline.layers.dense import Dense
from sightline.layers.encoder import DropPath, Encoder
from sightline.layers.positions import RESAMPLERS, LearnedPositions, resample_table
from sightline.registry import Variant
from sightline.schema import require
from sightline.types import Tokens

Grid = tuple[int, int]


@dataclass(frozen=True)
class PiTConfig:
    """The settings of a `PiT`, under the names that timm's users know.

    `image_size` and `patch_size` are (height, width) in pixels; a patch is cut every `stride` pixels. `base_dims`,
    `depth` and `heads` have one number for each stage: the width of a head, the layers, and the heads. Each stage's
    tokens are `base_dims` times `heads` wide, a multiple of the width before. `distillation_token` puts a second token
    beside the class token (arXiv 2012.12877). `position_resample` is a key of `RESAMPLERS`. Rates of dropout and
    stochastic depth lie in [0, 1). Raises UserError for values out of range or that do not go together.
    """

    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    patch_size: tuple[int, int] = (16, 16)
    stride: int = 8
    base_dims: tuple[int, ...] = (48, 48, 48)
    depth: tuple[int, ...] = (2, 6, 4)
    heads: tuple[int, ...] = (3, 6, 12)
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    distillation_token: bool = False
    position_resample: str = "bicubic_antialias"
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "in_chans", "patch_size", "stride", "base_dims", "depth", "heads"):
            value = getattr(self, name)
            positive = min(value, default=0) > 0 if isinstance(value, tuple) else value > 0
            require(positive, f"{name} must be positive, not {value}")
        stages = {len(self.base_dims), len(self.depth), len(self.heads)}
        require(len(stages) == 1, "base_dims, depth and heads need one number each for every stage")
        for before, after in pairwise(self.widths):
            require(after % before == 0, f"a stage is {after} wide, which is no multiple of the {before} before it")
        require(0 < self.mlp_ratio < 1024, f"mlp_ratio must lie between 0 and 1024, not {self.mlp_ratio}")
        require(int(self.widths[0] * self.mlp_ratio) > 0, f"mlp_ratio {self.mlp_ratio} leaves no hidden units")
        require(0 <= self.norm_eps < 1, f"norm_eps must lie in [0, 1), not {self.norm_eps}")
        require(
            self.position_resample in RESAMPLERS,
            f"position_resample '{printable(self.position_resample)}' is not one of {', '.join(RESAMPLERS)}",
        )
        for name in ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), not {getattr(self, name)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The size of the tokens of each stage."""
        return tuple(width * heads for width, heads in zip(self.base_dims, self.heads, strict=True))

    def grid(self, size: tuple[int, int]) -> Grid:
        """Rows and columns of patches before any pooling, for an image of (height, width) pixels."""
        sides = zip(size, self.patch_size, strict=True)
        rows, columns = (max(pixels - patch, 0) // self.stride + 1 for pixels, patch in sides)
        return rows, columns


class Pooling(nn.Module):
    """Half as many rows and columns of wider tokens (arXiv 2103.16302, section 3.2 and figure 3).

    Each channel of the patches is read by as many 3×3 filters as the width grows by, at every second cell; what lies
    outside the image is zero. The prefix tokens pass a dense layer.
    """

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.convolution = nn.Conv2d(inside, outside, kernel_size=3, stride=2, padding=1, groups=inside)
        self.dense = Dense(inside, outside)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens on half as many rows and columns, rounded up; what a mask hides counts as outside the image."""
        patches, prefix = tokens.patches, tokens.prefix
        if tokens.mask is not None:
            patches = patches * tokens.mask[:, prefix:, None]
        plane = self.convolution(rearrange(patches, "b (r c) d -> b d r c", r=tokens.grid[0]))
        x = torch.cat([self.dense(tokens.x[:, :prefix]), rearrange(plane, "b d r c -> b (r c) d")], dim=1)
        return Tokens(x, halved(tokens.grid), prefix)


def halved(grid: Grid) -> Grid:
    """Rows and columns that are left after a `Pooling`."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


class PiT(Backbone):
    """A Vision Transformer in stages, with a pooling before each but the first.

    Patches overlap. Only they have positions: the prefix tokens have none. An image smaller than a patch is filled
    with zeros below and to the right; pixels beyond the last whole patch are not seen. `depth` counts the layers of all
    stages; `stages` has one entry for each resolution. The final norm is applied to every token, although the
    published heads read the prefix tokens alone. Initialised as the original code does it: positions and prefix tokens
    with deviation 0.02, other layers as the framework does.
    """

    Config = PiTConfig

    def __init__(self, config: PiTConfig):
        super().__init__()
        self.config, self.width, self.depth = config, config.widths[-1], sum(config.depth)
        first, self.prefix = config.widths[0], 1 + config.distillation_token
        self.projection = nn.Conv2d(config.in_chans, first, config.patch_size, stride=config.stride)
        self.positions = LearnedPositions(
            first, config.grid(config.image_size), prefix=0, resample=config.position_resample
        )
        self.prefix_tokens = nn.Parameter(torch.empty(1, self.prefix, first))
        nn.init.trunc_normal_(self.prefix_tokens, std=0.02)
        self.drop = nn.Dropout(config.pos_drop_rate)
        self.poolings = nn.ModuleList(Pooling(*widths) for widths in pairwise(config.widths))
        self.transformers = nn.ModuleList(
            Encoder(
                depth,
                width=width,
                heads=heads,
                hidden=int(width * config.mlp_ratio),
                eps=config.norm_eps,
                drop=config.proj_drop_rate,
                attn_drop=config.attn_drop_rate,
            )
            for width, heads, depth in zip(config.widths, config.heads, config.depth, strict=True)
        )
        # The rate of stochastic depth grows over all stages together, and stops one step short of its value.
        drops = [module for module in self.transformers.modules() if isinstance(module, DropPath)]
        for i, drop in enumerate(drops):
            drop.rate = config.drop_path_rate * i / self.depth
        self.norm = nn.LayerNorm(self.width, eps=config.norm_eps)

    def _embed(self, pixels: Float[Tensor, "b c h w"], grids: Sequence[Grid] | None) -> Tokens:
        lacking = [max(patch - side, 0) for patch, side in zip(self.config.patch_size, pixels.shape[-2:], strict=True)]
        plane = self.projection(F.pad(pixels, (0, lacking[1], 0, lacking[0])))
        grid = (plane.shape[-2], plane.shape[-1])
        if grids is None:
            table = self.positions(grid)
        else:
            table = torch.cat([on_canvas(self.positions(own), own, grid, 0) for own in grids])
        patches = self.drop(rearrange(plane, "b d r c -> b (r c) d") + table)
        prefix = self.prefix_tokens.expand(patches.shape[0], -1, -1).to(patches.dtype)
        return Tokens(torch.cat([prefix, patches], dim=1), grid, self.prefix)

    def _each(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None) -> Iterator[Tokens]:
        """The tokens at the end of each stage."""
        grids = None
        if sizes is not None:
            grids = [self.config.grid((int(h), int(w))) for h, w in sizes.tolist()]
            pixels = pixels * real_pixels(sizes.to(pixels.device), pixels.shape[-2], pixels.shape[-1])
        tokens = self._embed(pixels, grids)
        for number, encoder in enumerate(self.transformers):
            if number > 0:
                tokens = self.poolings[number - 1](tokens)
                grids = None if grids is None else [halved(grid) for grid in grids]
            bias = None
            if grids is not None:
                mask = real_tokens(grids, tokens.grid, self.prefix).to(tokens.x.device)
                tokens = tokens._replace(mask=mask)
                hidden = torch.zeros_like(mask, dtype=tokens.x.dtype).masked_fill(~mask, -math.inf)
                bias = rearrange(hidden, "b m -> b 1 1 m")
            tokens = tokens._replace(x=encoder(tokens.x, bias))
            yield tokens

    def stages(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> list[Tokens]:
        return list(self._each(pixels, sizes))

    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Tokens:
        *_, tokens = self._each(pixels, sizes)
        return tokens._replace(x=self.norm(tokens.x))

    def whole(
        self, name: str, weights: Float[Tensor, "b h n n"], size: tuple[int, int], *, shares: bool = True
    ) -> tuple[Float[Tensor, "b h n n"], Grid]:
        """The attention map of a layer over all tokens of its stage, as it is, and that stage's rows and columns.

        `name` is the layer's, `size` the image's (height, width) in pixels.
        """
        grid = self.config.grid(size)
        for _ in range(int(name.split(".")[1])):
            grid = halved(grid)
        return weights, grid

    def layer_of(self, parameter: str) -> int:
        """Layers are counted through all stages; a pooling goes with the layer that follows it."""
        part, *rest = parameter.split(".")
        if part == "transformers":
            return sum(self.config.depth[: int(rest[0])]) + int(rest[2]) + 1
        if part == "poolings":
            return sum(self.config.depth[: int(rest[0]) + 1]) + 1
        return self.depth + 1 if part == "norm" else 0

    def resample(self, state: Mapping[str, Tensor], other: Backbone) -> dict[str, tuple[Tensor, str]]:
        """Positions, stretched from the grid of `other` to this one."""
        assert isinstance(other, PiT)
        old, new = (part.config.grid(part.config.image_size) for part in (other, self))
        if old == new:
            return {}
        method = other.config.position_resample
        how = f"from {old[0]}×{old[1]} to {new[0]}×{new[1]} patches ({method})"
        name = "positions.table"
        return {name: (resample_table(state[name], old, new, method), how)}

    @classmethod
    def tokens(cls, config: PiTConfig) -> int:
        return math.prod(config.grid(config.image_size))

    @classmethod
    def split(cls, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        mine, others = super().split(settings)
        if "distilled" in others:
            # As in timm, one word asks for the second token and for the classifier that reads it.
            mine.setdefault("distillation_token", others["distilled"])
        return mine, others


FAMILIES = {"pit": PiT}

_SIZES = {
    "ti": {"base_dims": (32, 32, 32), "heads": (2, 4, 8)},
    "xs": {"base_dims": (48, 48, 48), "heads": (2, 4, 8)},
    "s": {"base_dims": (48, 48, 48), "heads": (3, 6, 12)},
    "b": {"base_dims": (64, 64, 64), "heads": (4, 8, 16), "depth": (3, 6, 4), "patch_size": 14, "stride": 7},
}


def _row(size: str, parameters: int, distilled: bool) -> Variant:
    return Variant(
        family="pit",
        parameters=parameters,
        paper="2103.16302",
        settings={"depth": (2, 6, 4), "patch_size": 16, "stride": 8, **_SIZES[size]},
        head={"distilled": True} if distilled else {},
        preprocess={
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        sources=("timm", "original"),
    )


VARIANTS = {
    f"pit_{size}{'_distilled' * distilled}_224": _row(size, parameters, distilled)
    for size, distilled, parameters in [
        ("ti", False, 4_847_272),
        ("xs", False, 10_618_888),
        ("s", False, 23_461_912),
        ("b", False, 73_764_840),
        ("ti", True, 5_104_336),
        ("xs", True, 11_003_984),
        ("s", True, 24_039_056),
        ("b", True, 74_790_096),
    ]
}

SMALL = {
    "pit": (
        "pit_ti_distilled_224",
        {
            "image_size": (32, 48),
            "patch_size": 8,
            "stride": 4,
            "base_dims": (8, 8, 8),
            "depth": (1, 2, 1),
            "heads": (2, 4, 8),
        },
    )
}
