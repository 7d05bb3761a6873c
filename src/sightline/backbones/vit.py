"""The Vision Transformer (arXiv 2010.11929) and, as configurations of it, its relatives."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sightline.backbones.backbone import Backbone
from sightline.errors import printable, suggest
from sightline.layers.attention import Apart
from sightline.layers.canvas import on_canvas, real_pixels, real_tokens
from sightline.layers.encoder import ACTIVATIONS, Encoder
from sightline.layers.positions import (
    RELATIVE_RESAMPLERS,
    RESAMPLERS,
    FixedPositions,
    LearnedPositions,
    RelativePositions,
    resample_relative,
    resample_table,
)
from sightline.registry import find
from sightline.schema import require
from sightline.types import Tokens

Grid = tuple[int, int]


@dataclass(frozen=True)
class ViTConfig:
    """The settings of a `ViT`, under the names that timm's users know.

    `image_size` and `patch_size` are (height, width) in pixels. `partial_patches` says what happens where patches do
    not divide the image: the rest is padded with zeros, or dropped. `patch_bias` is that of the patch embedding.

    `mlp_dim` overrides `mlp_ratio`; with `mlp="swiglu"` it counts gates and values together, as timm's ratio does, and
    `activation` has no part in it. `key_bias=False` leaves queries and values their bias and the keys none (BEiT).
    `norm="post"` with `activation="relu"` and `positions="sincos1d"` is the encoder of arXiv 1706.03762; `pre_norm`
    normalises what enters the encoder (CLIP). `init_values` turns layer scale on.

    Before the patches stand, where wanted, the class token, the `distillation_token` (arXiv 2012.12877) and
    `reg_tokens` registers (arXiv 2309.16588). The first two have a row in the table of positions unless
    `class_position` is off (timm's `no_embed_class`); registers have none. `positions="relative"` has a table for
    every layer, "relative_shared" one for all. `position_resample` is a key of `RESAMPLERS`, and for relative
    positions of `RELATIVE_RESAMPLERS`; tables for another grid than the image's, which `position_grid` then names as
    (rows, columns), are stretched each time. `mask_token` keeps a learned token for patches that are hidden.

    Rates of dropout and stochastic depth lie in [0, 1). Raises UserError for values out of range.
    """

    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    tokenizer: str = "patch"
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)
    patch_size: tuple[int, int] = (16, 16)
    partial_patches: Literal["pad", "drop"] = "pad"
    patch_bias: bool = True
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    mlp_dim: int | None = None
    mlp: Literal["mlp", "swiglu"] = "mlp"
    qkv_bias: bool = True
    key_bias: bool = True
    norm: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    pre_norm: bool = False
    activation: str = "gelu"
    init_values: float | None = None
    class_token: bool = True
    distillation_token: bool = False
    reg_tokens: int = 0
    mask_token: bool = False
    class_position: bool = True
    positions: Literal["learned", "sincos2d", "sincos1d", "relative", "relative_shared", "none"] = "learned"
    position_resample: str = "bicubic_antialias"
    position_grid: tuple[int, int] | None = None
    final_norm: bool = True
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "in_chans", "patch_size", "embed_dim", "depth", "num_heads"):
            value = getattr(self, name)
            require(min(value if isinstance(value, tuple) else (value,)) > 0, f"{name} must be positive, not {value}")
        require(min(self.position_grid or (1,)) > 0, f"position_grid must be positive, not {self.position_grid}")
        require(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}",
        )
        require(0 < self.mlp_ratio < 1024, f"mlp_ratio must lie between 0 and 1024, not {self.mlp_ratio}")
        require(self.hidden > 0, f"mlp_ratio {self.mlp_ratio} leaves no hidden units")
        whole = self.mlp != "swiglu" or self.hidden % 2 == 0
        require(whole, f"mlp='swiglu' halves its hidden units, and {self.hidden} are not even")
        require(self.reg_tokens >= 0, f"reg_tokens must not be negative, and is {self.reg_tokens}")
        require(self.class_token or not self.distillation_token, "distillation_token needs a class_token before it")
        require(0 <= self.norm_eps < 1, f"norm_eps must lie in [0, 1), not {self.norm_eps}")
        require(
            self.activation in ACTIVATIONS,
            f"activation '{printable(self.activation)}' is not one of {', '.join(ACTIVATIONS)}",
        )
        methods = RELATIVE_RESAMPLERS if self.positions.startswith("relative") else RESAMPLERS
        require(
            self.position_resample in methods,
            f"position_resample '{printable(self.position_resample)}' is not one of {', '.join(methods)}",
        )
        for name in ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), not {getattr(self, name)}")
        halves = self.positions != "sincos2d" or self.embed_dim % 4 == 0
        require(halves, f"positions '{self.positions}' need an embed_dim that 4 divides")

    @property
    def hidden(self) -> int:
        """Width of the hidden layer of each MLP."""
        return self.mlp_dim if self.mlp_dim is not None else int(self.embed_dim * self.mlp_ratio)

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return int(self.class_token) + int(self.distillation_token) + self.reg_tokens

    @property
    def placed(self) -> int:
        """How many of these have a row in a table of positions."""
        return int(self.class_token) + int(self.distillation_token) if self.class_position else 0


class Place(nn.Module):
    """Puts the prefix tokens before the patches and adds to each token where it stands.

    Registers start apart from each other: equal ones would be taught alike and stay equal.
    """

    def __init__(self, config: ViTConfig, grid: Grid):
        super().__init__()
        width, resample = config.embed_dim, config.position_resample
        self.prefix = config.prefix
        self.class_token = _token(width, deviation=0.0) if config.class_token else None
        self.distillation_token = _token(width) if config.distillation_token else None
        self.register_tokens = _token(width, count=config.reg_tokens) if config.reg_tokens else None
        self.mask_token = _token(width) if config.mask_token else None
        self.positions: LearnedPositions | FixedPositions | None = None
        if config.positions == "learned":
            self.positions = LearnedPositions(width, grid, prefix=config.placed, resample=resample)
        elif config.positions in ("sincos2d", "sincos1d"):
            kind = config.positions
            self.positions = FixedPositions(width, grid, prefix=config.placed, kind=kind, resample=resample)
        self.drop = nn.Dropout(config.pos_drop_rate)

    def forward(
        self, tokens: Tokens, grids: Sequence[Grid] | None = None, mask: Bool[Tensor, "b patches"] | None = None
    ) -> Tokens:
        """Tokens with their prefix and positions; `grids` gives each image's own grid where the sizes are unlike.

        The patches at which `mask` is True give way to the mask token, before positions are added.
        """
        x = tokens.x
        if mask is not None:
            assert self.mask_token is not None, "patches can be hidden only with mask_token=True"
            x = torch.where(mask[..., None], self.mask_token, x)
        named: list[Tensor] = [t for t in (self.class_token, self.distillation_token) if t is not None]
        if self.positions is not None:
            placed = self.positions.prefix
            table = self._table(tokens.grid, grids)
            named = [token + table[:1, i : i + 1] for i, token in enumerate(named)] if placed else named
            x = x + table[:, placed:]
        if self.register_tokens is not None:
            named = [*named, self.register_tokens]
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in named), x], dim=1)
        real = None if grids is None else real_tokens(grids, tokens.grid, self.prefix).to(x.device)
        return Tokens(self.drop(x), tokens.grid, self.prefix, real)

    def _table(self, grid: Grid, grids: Sequence[Grid] | None) -> Float[Tensor, "b n d"]:
        assert self.positions is not None
        if grids is None:
            return self.positions(grid)
        return torch.cat([on_canvas(self.positions(own), own, grid, self.positions.prefix) for own in grids])


def _token(width: int, deviation: float = 0.02, count: int = 1) -> nn.Parameter:
    token = nn.Parameter(torch.zeros(1, count, width))
    if deviation:
        nn.init.normal_(token, std=deviation)
    return token


class ViT(Backbone):
    """A Vision Transformer: tokenizer, place (class token and positions), encoder, final norm.

    The parts are public, so that an objective can stand between them. Initialised as the paper's code does it: dense
    layers uniform by Glorot's rule, positions normal with deviation 0.02, class token zero.
    """

    Config = ViTConfig

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, self.width, self.depth = config, config.embed_dim, config.depth
        self.tokenizer = _tokenizer(config)
        grid = self.tokenizer.grid(config.image_size)
        require(
            min(grid) > 0,
            f"patches of {config.patch_size[0]}×{config.patch_size[1]} pixels do not fit into an image of "
            f"{config.image_size[0]}×{config.image_size[1]}",
        )
        placed = self.table_grid
        self.place = Place(config, placed)
        self.relative = nn.ModuleList(
            RelativePositions(config.num_heads, placed, prefix=config.prefix, resample=config.position_resample)
            for _ in range(_tables(config))
        )
        self.pre_norm = nn.LayerNorm(self.width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.encoder = Encoder(
            config.depth,
            width=config.embed_dim,
            heads=config.num_heads,
            hidden=config.hidden,
            norm=config.norm,
            eps=config.norm_eps,
            mlp=config.mlp,
            activation=config.activation,
            qkv_bias=config.qkv_bias,
            key_bias=config.key_bias,
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
        return self.config.prefix

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches at the image size it was made for."""
        return self.tokenizer.grid(self.config.image_size)

    @property
    def table_grid(self) -> Grid:
        """Rows and columns of the patches that its tables of positions are for."""
        return self.config.position_grid or self.grid

    @property
    def local(self) -> bool:
        """Whether the tokenizer makes each patch of its own pixels alone, so that a mask can hide a patch."""
        return getattr(self.tokenizer, "local", True)

    def embed(
        self,
        pixels: Float[Tensor, "b c h w"],
        sizes: Int[Tensor, "b 2"] | None = None,
        mask: Bool[Tensor, "b patches"] | None = None,
    ) -> tuple[Tokens, list[Tensor] | Tensor | None]:
        """The tokens that enter the encoder, and the bias of its attention (relative positions, padding).

        The patches at which `mask` is True give way to the mask token, before positions are added. Raises
        AssertionError where the network has none, or where `sizes` meet a tokenizer that is not `local`.
        """
        grids = None
        if sizes is not None:
            assert self.local, f"the tokenizer '{self.config.tokenizer}' reads images of unlike sizes one by one"
            grids = [self.tokenizer.grid((int(h), int(w))) for h, w in sizes.tolist()]
            pixels = pixels * real_pixels(sizes.to(pixels.device), pixels.shape[-2], pixels.shape[-1])
        tokens = self.place(self.tokenizer(pixels), grids, mask)
        return tokens._replace(x=self.pre_norm(tokens.x)), self._bias(tokens, grids)

    def _bias(self, tokens: Tokens, grids: Sequence[Grid] | None) -> list[Tensor] | Tensor | None:
        if tokens.mask is None or grids is None:
            return self._each_layer([table(tokens.grid)[None] for table in self.relative])
        hidden = torch.zeros_like(tokens.mask, dtype=tokens.x.dtype).masked_fill(~tokens.mask, -torch.inf)
        hidden = rearrange(hidden, "b m -> b 1 1 m")
        if not self.relative:
            return hidden
        return self._each_layer([hidden + self._relative_on_canvas(table, tokens, grids) for table in self.relative])

    def _each_layer(self, biases: list[Tensor]) -> list[Tensor] | Tensor | None:
        """One for every layer, or the one that all share, or none."""
        return biases[0] if self.config.positions == "relative_shared" else biases or None

    def _relative_on_canvas(self, table: nn.Module, tokens: Tokens, grids: Sequence[Grid]) -> Float[Tensor, "b h n n"]:
        assert tokens.mask is not None
        n = tokens.x.shape[1]
        canvas = tokens.x.new_zeros(len(grids), self.config.num_heads, n, n)
        for image, (grid, mask) in enumerate(zip(grids, tokens.mask, strict=True)):
            real = mask.nonzero()[:, 0]
            canvas[image, :, real[:, None], real] = table(grid).to(canvas.dtype)
        return canvas

    def grid_of(self, size: Grid) -> Grid:
        return self.tokenizer.grid(size)

    def stages(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> list[Tokens]:
        if sizes is not None and (not self.local or self.merges):
            return self._stages_one_by_one(pixels, sizes)
        tokens, bias = self.embed(pixels, sizes)
        return [tokens._replace(x=x) for x in self.encoder.each(tokens.x, bias)]

    def forward(
        self,
        pixels: Float[Tensor, "b c h w"],
        sizes: Int[Tensor, "b 2"] | None = None,
        mask: Bool[Tensor, "b patches"] | None = None,
    ) -> Tokens:
        if sizes is not None and (not self.local or self.merges):
            assert mask is None, "patches are hidden in images of one size only"
            return self._one_by_one(pixels, sizes)
        tokens, bias = self.embed(pixels, sizes, mask)
        if tokens.mask is not None and self.joins:
            return tokens._replace(x=self._through_one_sequence(tokens.x, tokens.mask))
        return tokens._replace(x=self.norm(self.encoder(tokens.x, bias)))

    @property
    def joins(self) -> bool:
        """Whether images of unlike sizes go through the encoder one behind the other, without what fills them up.

        Depth that is dropped at random is dropped for a whole image, which a sequence of several is not; relative
        positions are made on the canvas; and whoever looks into the encoder finds a row for each image.
        """
        random = self.training and self.config.drop_path_rate > 0
        watched = any(part._forward_pre_hooks or part._forward_hooks for part in self.encoder.modules())
        return not (self.relative or random or watched)

    def _through_one_sequence(self, x: Float[Tensor, "b n d"], real: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The encoder and the norm for the real tokens alone; zeros for what fills up (arXiv 2307.06304)."""
        joined = self.norm(self.encoder(x[real][None], Apart(real.sum(dim=1).tolist())))
        out = joined.new_zeros(x.shape)
        out[real] = joined[0]
        return out

    @property
    def merges(self) -> bool:
        return bool(self.encoder.merging)

    def merge(self, r: int) -> None:
        require(r >= 0, f"the number of tokens to merge must not be negative, and is {r}")
        require(
            not self.relative or r == 0,
            "tokens cannot be merged where attention has relative positions (BEiT): a merged token has no one place",
        )
        self.encoder.merging, self.encoder.protected = (r,) * self.depth if r else (), self.prefix

    def layer_of(self, parameter: str) -> int:
        part, *rest = parameter.split(".")
        if part == "encoder":
            return int(rest[1]) + 1
        if part == "relative" and self.config.positions == "relative":
            return int(rest[0]) + 1
        return 0 if part in ("tokenizer", "place", "pre_norm") else self.depth + 1

    def resample(self, state: Mapping[str, Tensor], other: Backbone) -> dict[str, tuple[Tensor, str]]:
        """Positions, stretched from the grid of `other` to this one by the method of their source."""
        assert isinstance(other, ViT)
        old, new, method = other.table_grid, self.table_grid, other.config.position_resample
        if old == new:
            return {}
        relative = {name: table for name, table in state.items() if name.startswith("relative.")}
        how = f"from {old[0]}×{old[1]} to {new[0]}×{new[1]} patches ({method})"
        changed = {name: (resample_relative(table, old, new, method), how) for name, table in relative.items()}
        if (absolute := "place.positions.table") in state:
            changed[absolute] = resample_table(state[absolute], old, new, method), how
        return changed

    @classmethod
    def tokens(cls, config: ViTConfig) -> int:
        grids = (_tokenizer(config).grid(config.image_size), config.position_grid or (0, 0))
        return config.prefix + max(map(math.prod, grids))

    @classmethod
    def computed(cls, config: ViTConfig) -> int:
        """The index of offsets of each table of relative positions: a number for every pair of tokens."""
        return _tables(config) * cls.tokens(config) ** 2

    @classmethod
    def settle(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        named = super().settle(settings)
        if "no_embed_class" in named:
            named["class_position"] = not named.pop("no_embed_class")
        return named

    @classmethod
    def split(cls, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        mine, others = super().split(settings)
        if others.get("global_pool") == "avg" and "final_norm" not in mine:
            # As in timm, averaging moves the final norm behind the pooling unless it is told to stay.
            others.setdefault("fc_norm", True)
            mine["final_norm"] = not others["fc_norm"]
        return mine, others


def _tables(config: ViTConfig) -> int:
    """How many tables of relative positions there are."""
    return {"relative": config.depth, "relative_shared": 1}.get(config.positions, 0)


def _tokenizer(config: ViTConfig) -> Any:
    """What makes tokens of pixels. Raises UserError for options that it does not have."""
    kind = find("tokenizers", "TOKENIZERS", config.tokenizer, "tokenizer")
    given = inspect.signature(kind).parameters.values()
    usual = {"in_chans", "patch_size", "partial", "bias"}
    known = {option.name for option in given if option.kind is option.KEYWORD_ONLY} - usual
    own = any(option.kind is option.VAR_KEYWORD for option in given)  # it knows its options itself
    for name in config.tokenizer_options:
        words = f"tokenizer_options: the tokenizer '{config.tokenizer}' has no option '{printable(name)}'."
        require(name in known or (own and name not in usual), words + suggest(name, known))
    plain = config.patch_bias or own or any(option.name == "bias" for option in given)
    require(plain, f"patch_bias=False: the tokenizer '{config.tokenizer}' has no such setting")
    return kind(
        config.embed_dim,
        in_chans=config.in_chans,
        patch_size=config.patch_size,
        partial=config.partial_patches,
        **({} if config.patch_bias else {"bias": False}),
        **config.tokenizer_options,
    )


def _glorot(module: nn.Module) -> None:
    if isinstance(module, nn.Linear) and not module.weight.is_meta:
        # Query, key and value share one matrix; each is a dense layer of its own to the rule.
        for rows in module.weight.data.split(min(module.weight.shape), dim=0):
            nn.init.xavier_uniform_(rows)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


FAMILIES = {"vit": ViT}
