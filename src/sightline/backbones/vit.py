"""The Vision Transformer (arXiv 2010.11929) and, as configurations of it, its relatives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sightline.backbones.backbone import Backbone
from sightline.errors import printable
from sightline.layers.encoder import ACTIVATIONS, Encoder
from sightline.layers.positions import (
    RESAMPLERS,
    FixedPositions,
    LearnedPositions,
    RelativePositions,
    resample_relative,
    resample_table,
)
from sightline.registry import Variant, find
from sightline.schema import require
from sightline.types import Tokens

Grid = tuple[int, int]


@dataclass(frozen=True)
class ViTConfig:
    """The settings of a `ViT`, under the names that timm's users know.

    `image_size` and `patch_size` are (height, width) in pixels. `mlp_dim` overrides `mlp_ratio`. `norm="post"` with
    `activation="relu"` and `positions="sincos1d"` is the encoder of arXiv 1706.03762. `init_values` turns layer scale
    on. `partial_patches` says what happens where patches do not divide the image: the rest is padded with zeros, or
    dropped. `position_resample` is a key of `RESAMPLERS`. Rates of dropout and stochastic depth lie in [0, 1).
    Raises UserError for values out of range.
    """

    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    tokenizer: str = "patch"
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)
    patch_size: tuple[int, int] = (16, 16)
    partial_patches: Literal["pad", "drop"] = "pad"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    mlp_dim: int | None = None
    qkv_bias: bool = True
    norm: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    activation: str = "gelu"
    init_values: float | None = None
    class_token: bool = True
    positions: Literal["learned", "sincos2d", "sincos1d", "relative", "none"] = "learned"
    position_resample: str = "bicubic_antialias"
    final_norm: bool = True
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "in_chans", "patch_size", "embed_dim", "depth", "num_heads"):
            value = getattr(self, name)
            require(min(value if isinstance(value, tuple) else (value,)) > 0, f"{name} must be positive, not {value}")
        require(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}",
        )
        require(0 < self.mlp_ratio < 1024, f"mlp_ratio must lie between 0 and 1024, not {self.mlp_ratio}")
        require(self.hidden > 0, f"mlp_ratio {self.mlp_ratio} leaves no hidden units")
        require(0 <= self.norm_eps < 1, f"norm_eps must lie in [0, 1), not {self.norm_eps}")
        require(
            self.activation in ACTIVATIONS,
            f"activation '{printable(self.activation)}' is not one of {', '.join(ACTIVATIONS)}",
        )
        require(
            self.position_resample in RESAMPLERS,
            f"position_resample '{printable(self.position_resample)}' is not one of {', '.join(RESAMPLERS)}",
        )
        for name in ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), not {getattr(self, name)}")
        waves = {"sincos2d": 4, "sincos1d": 2}.get(self.positions, 1)
        require(self.embed_dim % waves == 0, f"positions '{self.positions}' need an embed_dim that {waves} divides")

    @property
    def hidden(self) -> int:
        """Width of the hidden layer of each MLP."""
        return self.mlp_dim if self.mlp_dim is not None else int(self.embed_dim * self.mlp_ratio)


class Place(nn.Module):
    """Puts the class token before the patches and adds to each token where it stands."""

    def __init__(self, config: ViTConfig, grid: Grid):
        super().__init__()
        width, prefix = config.embed_dim, int(config.class_token)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.positions: nn.Module | None = None
        if config.positions == "learned":
            self.positions = LearnedPositions(width, grid, prefix=prefix, resample=config.position_resample)
        elif config.positions in ("sincos2d", "sincos1d"):
            self.positions = FixedPositions(width, grid, prefix=prefix, kind=config.positions)
        self.drop = nn.Dropout(config.pos_drop_rate)

    def forward(self, tokens: Tokens, grids: Sequence[Grid] | None = None) -> Tokens:
        """Tokens with their prefix and positions; `grids` gives each image's own grid where the sizes are unlike."""
        x, prefix = tokens.x, int(self.class_token is not None)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.positions is not None and grids is None:
            x = x + self.positions(tokens.grid)
        elif self.positions is not None and grids is not None:
            x = x + torch.cat([_on_canvas(self.positions(own), own, tokens.grid, prefix) for own in grids])
        mask = None if grids is None else _real(grids, tokens.grid, prefix).to(x.device)
        return Tokens(self.drop(x), tokens.grid, prefix, mask)


def _on_canvas(table: Float[Tensor, "1 n d"], own: Grid, canvas: Grid, prefix: int) -> Float[Tensor, "1 m d"]:
    """The position table of one image's grid, laid into the upper left of a larger one."""
    plane = rearrange(table[:, prefix:], "1 (r c) d -> 1 r c d", r=own[0])
    plane = F.pad(plane, (0, 0, 0, canvas[1] - own[1], 0, canvas[0] - own[0]))
    return torch.cat([table[:, :prefix], rearrange(plane, "1 r c d -> 1 (r c) d")], dim=1)


def _real(grids: Sequence[Grid], canvas: Grid, prefix: int) -> Bool[Tensor, "b n"]:
    """True at prefix tokens and at the patches that belong to each image."""
    own = torch.tensor(grids)
    rows = torch.arange(canvas[0]) < own[:, :1]
    columns = torch.arange(canvas[1]) < own[:, 1:]
    patches = rearrange(rows[:, :, None] & columns[:, None, :], "b r c -> b (r c)")
    return F.pad(patches, (prefix, 0), value=True)


class ViT(Backbone):
    """A Vision Transformer: tokenizer, place (class token and positions), encoder, final norm.

    The parts are public, so that an objective can stand between them. Initialised as the paper's code does it: dense
    layers uniform by Glorot's rule, positions normal with deviation 0.02, class token zero.
    """

    Config = ViTConfig

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, self.width, self.depth = config, config.embed_dim, config.depth
        tokenizer = find("tokenizers", "TOKENIZERS", config.tokenizer, "tokenizer")
        self.tokenizer = tokenizer(
            config.embed_dim,
            in_chans=config.in_chans,
            patch_size=config.patch_size,
            partial=config.partial_patches,
            **config.tokenizer_options,
        )
        grid = self.tokenizer.grid(config.image_size)
        require(
            min(grid) > 0,
            f"patches of {config.patch_size[0]}×{config.patch_size[1]} pixels do not fit into an image of "
            f"{config.image_size[0]}×{config.image_size[1]}",
        )
        self.place = Place(config, grid)
        self.relative = nn.ModuleList()
        if config.positions == "relative":
            tables = (RelativePositions(config.num_heads, grid, prefix=self.prefix) for _ in range(config.depth))
            self.relative.extend(tables)
        self.encoder = Encoder(
            config.depth,
            width=config.embed_dim,
            heads=config.num_heads,
            hidden=config.hidden,
            norm=config.norm,
            eps=config.norm_eps,
            activation=config.activation,
            qkv_bias=config.qkv_bias,
            layer_scale=config.init_values,
            drop=config.proj_drop_rate,
            attn_drop=config.attn_drop_rate,
            drop_path=config.drop_path_rate,
        )
        self.norm = nn.LayerNorm(self.width, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.encoder.apply(_glorot)

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return int(self.config.class_token)

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches at the image size it was made for."""
        return self.tokenizer.grid(self.config.image_size)

    def embed(
        self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None
    ) -> tuple[Tokens, list[Tensor] | Tensor | None]:
        """The tokens that enter the encoder, and the bias of its attention (relative positions, padding)."""
        grids = None
        if sizes is not None:
            local = getattr(self.tokenizer, "local", True)
            require(local, f"the tokenizer '{self.config.tokenizer}' cannot read images of unlike sizes in one batch")
            grids = [self.tokenizer.grid((int(h), int(w))) for h, w in sizes.tolist()]
            pixels = pixels * _inside(sizes.to(pixels.device), pixels.shape[-2], pixels.shape[-1])
        tokens = self.place(self.tokenizer(pixels), grids)
        return tokens, self._bias(tokens, grids)

    def _bias(self, tokens: Tokens, grids: Sequence[Grid] | None) -> list[Tensor] | Tensor | None:
        if tokens.mask is None or grids is None:
            return [table(tokens.grid)[None] for table in self.relative] or None
        hidden = torch.zeros_like(tokens.mask, dtype=tokens.x.dtype).masked_fill(~tokens.mask, -torch.inf)
        hidden = rearrange(hidden, "b m -> b 1 1 m")
        if not self.relative:
            return hidden
        return [hidden + self._relative_on_canvas(table, tokens, grids) for table in self.relative]

    def _relative_on_canvas(self, table: nn.Module, tokens: Tokens, grids: Sequence[Grid]) -> Float[Tensor, "b h n n"]:
        assert tokens.mask is not None
        n = tokens.x.shape[1]
        canvas = tokens.x.new_zeros(len(grids), self.config.num_heads, n, n)
        for image, (grid, mask) in enumerate(zip(grids, tokens.mask, strict=True)):
            real = mask.nonzero()[:, 0]
            canvas[image, :, real[:, None], real] = table(grid).to(canvas.dtype)
        return canvas

    def stages(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> list[Tokens]:
        tokens, bias = self.embed(pixels, sizes)
        return [tokens._replace(x=x) for x in self.encoder.each(tokens.x, bias)]

    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Tokens:
        tokens, bias = self.embed(pixels, sizes)
        return tokens._replace(x=self.norm(self.encoder(tokens.x, bias)))

    def layer_of(self, parameter: str) -> int:
        part, *rest = parameter.split(".")
        if part == "encoder":
            return int(rest[1]) + 1
        if part == "relative":
            return int(rest[0]) + 1
        return 0 if part in ("tokenizer", "place") else self.depth + 1

    def resample(self, state: Mapping[str, Tensor], other: Backbone) -> dict[str, tuple[Tensor, str]]:
        """Positions, stretched from the grid of `other` to this one by the method of their source."""
        assert isinstance(other, ViT)
        old, new, method = other.grid, self.grid, other.config.position_resample
        if old == new:
            return {}
        how = f"from {old[0]}×{old[1]} to {new[0]}×{new[1]} patches"
        relative = {name: table for name, table in state.items() if name.startswith("relative.")}
        changed = {name: (resample_relative(table, old, new), how) for name, table in relative.items()}
        if (learned := "place.positions.table") in state:
            changed[learned] = resample_table(state[learned], old, new, method), f"{how} ({method})"
        return changed

    @classmethod
    def split(cls, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        mine, others = super().split(settings)
        if others.get("global_pool") == "avg" and "final_norm" not in mine:
            # As in timm, averaging moves the final norm behind the pooling unless it is told to stay.
            others.setdefault("fc_norm", True)
            mine["final_norm"] = not others["fc_norm"]
        return mine, others


def _inside(sizes: Int[Tensor, "b 2"], height: int, width: int) -> Bool[Tensor, "b 1 height width"]:
    """True at the pixels that belong to each image of a padded batch."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _glorot(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        # Query, key and value share one matrix; each is a dense layer of its own to the rule.
        for rows in module.weight.data.split(min(module.weight.shape), dim=0):
            nn.init.xavier_uniform_(rows)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


FAMILIES = {"vit": ViT}

_SIZES = {
    # Sizes of our own, for small images and few of them.
    "femto": {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
    "pico": {"embed_dim": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0},
    "nano": {"embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}


def _row(size: str, patch: int, image: int, parameters: int) -> Variant:
    half = (0.5, 0.5, 0.5)
    return Variant(
        family="vit",
        parameters=parameters,
        paper="2010.11929",
        settings={**_SIZES[size], "patch_size": patch, "image_size": image},
        preprocess={"crop_pct": 0.9 if image == 224 else 1.0, "interpolation": "bicubic", "mean": half, "std": half},
        sources=("timm", "transformers", "google") if image >= 224 else (),
    )


VARIANTS = {
    f"vit_{size}_patch{patch}_{image}": _row(size, patch, image, parameters)
    for size, patch, image, parameters in [
        ("femto", 4, 32, 139_432),
        ("pico", 4, 32, 206_376),
        ("nano", 4, 32, 938_856),
        ("tiny", 16, 224, 5_717_416),
        ("tiny", 16, 384, 5_790_376),
        ("small", 32, 224, 22_878_952),
        ("small", 32, 384, 22_915_432),
        ("small", 16, 224, 22_050_664),
        ("small", 16, 384, 22_196_584),
        ("base", 32, 224, 88_224_232),
        ("base", 32, 384, 88_297_192),
        ("base", 16, 224, 86_567_656),
        ("base", 16, 384, 86_859_496),
        ("base", 8, 224, 86_576_872),
        ("large", 32, 224, 306_535_400),
        ("large", 32, 384, 306_632_680),
        ("large", 16, 224, 304_326_632),
        ("large", 16, 384, 304_715_752),
        ("large", 14, 224, 304_203_752),
        ("huge", 14, 224, 632_045_800),
    ]
}
