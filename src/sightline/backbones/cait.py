"""Class-attention in image Transformers, CaiT (arXiv 2103.17239), and how timm stores it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.backbones.backbone import Backbone
from sightline.errors import printable
from sightline.layers.attention import Apart, Attention
from sightline.layers.canvas import on_canvas, real_pixels, real_tokens
from sightline.layers.dense import Dense
from sightline.layers.encoder import Bias, Block, Encoder
from sightline.layers.positions import RESAMPLERS, LearnedPositions, resample_table
from sightline.layout import Rule, Shapes, TimmLayout, fused, one, same
from sightline.registry import Variant
from sightline.schema import require
from sightline.tokenizers.patch import PatchEmbedding
from sightline.types import Tokens

Grid = tuple[int, int]


@dataclass(frozen=True)
class CaiTConfig:
    """The settings of a `CaiT`, under the names that timm's users know.

    `image_size` and `patch_size` are (height, width) in pixels. `depth` layers see the patches alone; in
    `depth_token_only` more, whose MLP has its own ratio, the class token reads them. `init_values` is where layer scale
    starts. `partial_patches` says what happens where patches do not divide the image: the rest is padded with zeros, or
    dropped. `position_resample` is a key of `RESAMPLERS`. Rates of dropout and stochastic depth lie in [0, 1) and act
    in the first layers only; that of stochastic depth is the same in each. Raises UserError for values out of range.
    """

    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    patch_size: tuple[int, int] = (16, 16)
    partial_patches: Literal["pad", "drop"] = "pad"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    depth_token_only: int = 2
    mlp_ratio_token_only: float = 4.0
    qkv_bias: bool = True
    init_values: float = 1e-4
    norm_eps: float = 1e-6
    position_resample: str = "bicubic_antialias"
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "in_chans", "patch_size", "embed_dim", "depth", "num_heads", "depth_token_only"):
            value = getattr(self, name)
            require(min(value if isinstance(value, tuple) else (value,)) > 0, f"{name} must be positive, not {value}")
        require(self.depth_token_only <= 1024, f"depth_token_only must be at most 1024, not {self.depth_token_only}")
        require(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}",
        )
        for name in ("mlp_ratio", "mlp_ratio_token_only"):
            ratio = getattr(self, name)
            require(0 < ratio < 1024, f"{name} must lie between 0 and 1024, not {ratio}")
            require(int(self.embed_dim * ratio) > 0, f"{name} {ratio} leaves no hidden units")
        require(0 <= self.norm_eps < 1, f"norm_eps must lie in [0, 1), not {self.norm_eps}")
        require(
            self.position_resample in RESAMPLERS,
            f"position_resample '{printable(self.position_resample)}' is not one of {', '.join(RESAMPLERS)}",
        )
        for name in ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), not {getattr(self, name)}")


class TalkingHeads(Attention):
    """Attention whose heads are mixed before the softmax and after it (arXiv 2003.02436, section 4).

    `before` mixes logits, `after` mixes weights; both have a bias. What `bias` hides stays hidden: it is added when the
    logits are mixed, and what a hidden key was given afterwards is taken from it.
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True, drop: float = 0.0, out_drop: float = 0.0):
        super().__init__(width, heads, qkv_bias=qkv_bias, drop=drop, out_drop=out_drop)
        self.before, self.after = Dense(heads, heads), Dense(heads, heads)

    def forward(
        self,
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b m d"] | None = None,
        value: Float[Tensor, "b m d"] | None = None,
        *,
        bias: Float[Tensor, "#b #h #n #m"] | Apart | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Each query's mixture of the values; a head's weights need not sum to 1, nor be positive."""
        assert not isinstance(bias, Apart), "images are apart here by hiding keys"
        q, k, v = self.project(query, key, value)
        weights = _across(self.after, self._softmax(q, k, bias))
        if bias is not None:
            weights = weights.masked_fill(bias.isneginf(), 0.0)
        mixed = F.dropout(weights, self.drop, self.training) @ v
        return self.out_drop(self.out(rearrange(mixed, "b h n k -> b n (h k)")))

    def weights(
        self,
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b m d"] | None = None,
        value: Float[Tensor, "b m d"] | None = None,
        *,
        bias: Float[Tensor, "#b #h #n #m"] | None = None,
    ) -> Float[Tensor, "b h n m"]:
        """The attention map as it leaves the softmax, before heads are mixed again; every row sums to 1."""
        q, k, _ = self.project(query, key, value)
        return self._softmax(q, k, bias)

    def weights_gradient(
        self,
        gradient: Float[Tensor, "b n d"],
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b m d"] | None = None,
        value: Float[Tensor, "b m d"] | None = None,
        *,
        bias: Float[Tensor, "#b #h #n #m"] | None = None,
    ) -> Float[Tensor, "b h n m"]:
        """The gradient by the map as it leaves the softmax, before heads are mixed again."""
        mixed = super().weights_gradient(gradient, query, key, value)
        if bias is not None:
            mixed = mixed.masked_fill(bias.isneginf(), 0.0)
        return torch.einsum("b h n m, h g -> b g n m", mixed, self.after.weight)

    def _softmax(
        self, q: Float[Tensor, "b h n k"], k: Float[Tensor, "b h m k"], bias: Float[Tensor, "#b #h #n #m"] | None
    ) -> Float[Tensor, "b h n m"]:
        logits = _across(self.before, q * q.shape[-1] ** -0.5 @ rearrange(k, "b h m k -> b h k m"))
        return torch.softmax(logits if bias is None else logits + bias, dim=-1)


def _across(mixing: nn.Module, maps: Float[Tensor, "b h n m"]) -> Float[Tensor, "b h n m"]:
    """A dense layer over the axis of the heads."""
    return rearrange(mixing(rearrange(maps, "b h n m -> b n m h")), "b n m h -> b h n m")


class ClassLayer(Block):
    """An encoder layer in which only the class token, the first, changes (arXiv 2103.17239, section 3)."""

    def forward(self, x: Float[Tensor, "b n d"], bias: Bias | None = None) -> Tensor:
        """All tokens, after the class token has read them and itself."""
        seen = self.norm1(x)
        token = x[:, :1] + self.scale1(self.attention(seen[:, :1], seen, bias=bias))
        token = token + self.scale2(self.mlp(self.norm2(token)))
        return torch.cat([token, x[:, 1:]], dim=1)


class CaiT(Backbone):
    """A Vision Transformer in which the class token comes late (arXiv 2103.17239, section 3).

    Patches alone pass the first layers, with talking heads. Then the class token reads them, and itself, in a few more
    in which they do not change. `depth` counts both kinds. Layer scale stands on every branch. Initialised as the
    original code does it: matrices, positions and the class token with deviation 0.02.
    """

    Config = CaiTConfig

    def __init__(self, config: CaiTConfig):
        super().__init__()
        self.config, self.width, self.depth = config, config.embed_dim, config.depth + config.depth_token_only
        self.tokenizer = PatchEmbedding(
            self.width, in_chans=config.in_chans, patch_size=config.patch_size, partial=config.partial_patches
        )
        grid = self.tokenizer.grid(config.image_size)
        require(min(grid) > 0, f"patches of {config.patch_size} pixels do not fit into an image of {config.image_size}")
        self.positions = LearnedPositions(self.width, grid, prefix=0, resample=config.position_resample)
        self.class_token = nn.Parameter(torch.empty(1, 1, self.width))
        self.drop = nn.Dropout(config.pos_drop_rate)
        block: dict[str, Any] = {"width": self.width, "heads": config.num_heads, "qkv_bias": config.qkv_bias}
        block |= {"eps": config.norm_eps, "layer_scale": config.init_values}
        hidden, drop = int(self.width * config.mlp_ratio), config.proj_drop_rate
        self.encoder = Encoder(config.depth, hidden=hidden, drop=drop, **block)
        for layer in [module for module in self.encoder.modules() if isinstance(module, Block)]:
            layer.drop_path.rate = config.drop_path_rate
            layer.attention = TalkingHeads(
                self.width, config.num_heads, qkv_bias=config.qkv_bias, drop=config.attn_drop_rate, out_drop=drop
            )
        hidden = int(self.width * config.mlp_ratio_token_only)
        self.readers = nn.ModuleList(ClassLayer(hidden=hidden, **block) for _ in range(config.depth_token_only))
        self.norm = nn.LayerNorm(self.width, eps=config.norm_eps)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        self.encoder.apply(_truncated)
        self.readers.apply(_truncated)

    def _each(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None) -> Iterator[Tokens]:
        """The tokens after each layer: the patches, and in the last ones the class token before them."""
        mask, bias, bias_with_class = None, None, None
        if sizes is not None:
            pixels = pixels * real_pixels(sizes.to(pixels.device), pixels.shape[-2], pixels.shape[-1])
        tokens = self.tokenizer(pixels)
        if sizes is None:
            table = self.positions(tokens.grid)
        else:
            grids = [self.tokenizer.grid((int(h), int(w))) for h, w in sizes.tolist()]
            table = torch.cat([on_canvas(self.positions(own), own, tokens.grid, 0) for own in grids])
            mask = real_tokens(grids, tokens.grid, 1).to(pixels.device)
            hidden = torch.zeros_like(mask, dtype=table.dtype).masked_fill(~mask, -math.inf)
            bias_with_class = rearrange(hidden, "b m -> b 1 1 m")
            bias, tokens = bias_with_class[..., 1:], tokens._replace(mask=mask[:, 1:])
        x = self.drop(tokens.x + table)
        for x in self.encoder.each(x, bias):  # noqa: B020  (where a stage ends, the next begins)
            yield tokens._replace(x=x)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        for reader in self.readers:
            x = reader(x, bias_with_class)
            yield Tokens(x, tokens.grid, 1, mask)

    def stages(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> list[Tokens]:
        return list(self._each(pixels, sizes))

    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Tokens:
        *_, tokens = self._each(pixels, sizes)
        return tokens._replace(x=self.norm(tokens.x))

    def whole(
        self, name: str, weights: Float[Tensor, "b h q n"], size: tuple[int, int], *, shares: bool = True
    ) -> tuple[Float[Tensor, "b h m m"], Grid]:
        """The map of a layer over class token and patches, and their rows and columns; who is not asked keeps itself.

        `name` is the layer's, `size` the image's (height, width) in pixels. Where the numbers are no `shares`, who is
        not asked has zeros.
        """
        grid = self.tokenizer.grid(size)
        batch, heads, _, keys = weights.shape
        tokens = 1 + grid[0] * grid[1]
        whole = torch.eye(tokens, dtype=weights.dtype, device=weights.device).repeat(batch, heads, 1, 1) * shares
        if keys == tokens:
            whole[:, :, :1] = weights
        else:
            whole[:, :, 1:, 1:] = weights
        return whole, grid

    def layer_of(self, parameter: str) -> int:
        part, *rest = parameter.split(".")
        if part == "encoder":
            return int(rest[1]) + 1
        if part == "readers":
            return self.config.depth + int(rest[0]) + 1
        return self.depth + 1 if part == "norm" else 0

    def resample(self, state: Mapping[str, Tensor], other: Backbone) -> dict[str, tuple[Tensor, str]]:
        """Positions, stretched from the grid of `other` to this one."""
        assert isinstance(other, CaiT)
        old, new = (part.tokenizer.grid(part.config.image_size) for part in (other, self))
        if old == new:
            return {}
        name, method = "positions.table", other.config.position_resample
        how = f"from {old[0]}×{old[1]} to {new[0]}×{new[1]} patches ({method})"
        return {name: (resample_table(state[name], old, new, method), how)}


def _truncated(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


FAMILIES = {"cait": CaiT}

_SIZES = {
    "xxs24": {"embed_dim": 192, "depth": 24, "num_heads": 4, "init_values": 1e-5},
    "xxs36": {"embed_dim": 192, "depth": 36, "num_heads": 4, "init_values": 1e-5},
    "xs24": {"embed_dim": 288, "depth": 24, "num_heads": 6, "init_values": 1e-5},
    "s24": {"embed_dim": 384, "depth": 24, "num_heads": 8, "init_values": 1e-5},
    "s36": {"embed_dim": 384, "depth": 36, "num_heads": 8, "init_values": 1e-6},
    "m36": {"embed_dim": 768, "depth": 36, "num_heads": 16, "init_values": 1e-6},
    "m48": {"embed_dim": 768, "depth": 48, "num_heads": 16, "init_values": 1e-6},
}


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _row(size: str, image: int, parameters: int) -> Variant:
    return Variant(
        family="cait",
        parameters=parameters,
        paper="2103.17239",
        settings={**_SIZES[size], "patch_size": 16, "image_size": image},
        preprocess={"crop_pct": 1.0, "interpolation": "bicubic", "mean": _MEAN, "std": _STD},
        sources=("timm", "original"),
    )


VARIANTS = {
    f"cait_{size}_{image}": _row(size, image, parameters)
    for size, image, parameters in [
        ("xxs24", 224, 11_956_264),
        ("xxs24", 384, 12_029_224),
        ("xxs36", 224, 17_299_720),
        ("xxs36", 384, 17_372_680),
        ("xs24", 384, 26_670_088),
        ("s24", 224, 46_916_200),
        ("s24", 384, 47_062_120),
        ("s36", 384, 68_366_632),
        ("m36", 384, 271_221_352),
        ("m48", 448, 356_460_520),
    ]
}

SMALL = {
    "cait": (
        "cait_xxs24_224",
        {
            "image_size": (32, 48),
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 3,
            "depth_token_only": 1,
            "init_values": 0.1,
        },
    )
}


class TimmCaiT(TimmLayout):
    """The class token's layers have a projection each for query, key and value; all others one for the three."""

    libraries = ("timm", "original")
    family = "cait"
    untold = ("num_heads",)
    same = (
        *("in_chans", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "depth_token_only"),
        *("mlp_ratio_token_only", "qkv_bias", "init_values", "drop_rate"),
        *("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    )

    def recognises(self, shapes: Shapes) -> bool:
        return "blocks_token_only.0.gamma_1" in shapes

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        width, channels, *patch = shapes.of("patch_embed.proj.weight", 4)
        return {
            "embed_dim": width,
            "in_chans": channels,
            "patch_size": tuple(patch),
            "partial_patches": "drop",
            "depth": shapes.count(r"blocks\.(\d+)\."),
            "depth_token_only": shapes.count(r"blocks_token_only\.(\d+)\."),
            "mlp_ratio": _ratio(shapes.of("blocks.0.mlp.fc1.weight", 2)[0], width),
            "mlp_ratio_token_only": _ratio(shapes.of("blocks_token_only.0.mlp.fc1.weight", 2)[0], width),
            "qkv_bias": shapes.count(r"blocks\.(\d+)\.attn\.qkv\.bias") > 0,
            "num_classes": shapes.outputs("head.bias"),
            "patches": shapes.of("pos_embed", 3)[1],
        }

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = [
            *same("backbone.tokenizer.projection", "patch_embed.proj"),
            one("backbone.class_token", "cls_token"),
            one("backbone.positions.table", "pos_embed"),
            *same("backbone.norm", "norm"),
        ]
        for i in range(backbone.depth):
            ours, theirs = f"backbone.encoder.blocks.{i}", f"blocks.{i}"
            rules += _branches(ours, theirs)
            rules += same(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", bias=backbone.qkv_bias)
            rules += same(f"{ours}.attention.before", f"{theirs}.attn.proj_l")
            rules += same(f"{ours}.attention.after", f"{theirs}.attn.proj_w")
        for i in range(backbone.depth_token_only):
            ours, theirs = f"backbone.readers.{i}", f"blocks_token_only.{i}"
            rules += _branches(ours, theirs)
            rules += fused(
                f"{ours}.attention.qkv", *(f"{theirs}.attn.{part}" for part in "qkv"), bias=backbone.qkv_bias
            )
        return rules + (same("head.classifier", "head") if head.num_classes else [])

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = [] if backbone.norm_eps == 1e-6 else [f"norm_eps={backbone.norm_eps:g} (only 1e-06)"]
        if head.global_pool == "both" or head.fc_norm or head.pre_logits is not None or head.distilled:
            refused.append("a head that is more than one dense layer on the class token or the mean of the patches")
        whole = all(side % patch == 0 for side, patch in zip(backbone.image_size, backbone.patch_size, strict=True))
        if backbone.partial_patches == "pad" and not whole:
            refused.append("partial_patches='pad' at an image size that patches do not divide (only 'drop')")
        return refused

    def arguments(self, backbone: Any, head: Any) -> tuple[str, dict[str, Any]]:
        arguments = {name: getattr(backbone, name) for name in self.same if name != "drop_rate"}
        arguments |= {"img_size": backbone.image_size, "global_pool": head.global_pool, "drop_rate": head.drop_rate}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
        return "cait_xxs24_224", plain


def _ratio(hidden: int, width: int) -> float:
    """A ratio whose product with `width`, cut to a whole number, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _branches(ours: str, theirs: str) -> list[Rule]:
    """What both kinds of layer have, apart from what makes queries, keys and values."""
    alike = [
        rule for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for rule in same(f"{ours}.{part}", f"{theirs}.{part}")
    ]
    scales = [one(f"{ours}.scale{k}.gamma", f"{theirs}.gamma_{k}") for k in (1, 2)]
    return [*alike, *scales, *same(f"{ours}.attention.out", f"{theirs}.attn.proj")]


LAYOUTS = {"timm/cait": TimmCaiT()}
