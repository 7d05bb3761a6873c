"""The Swin Transformer (arXiv 2103.14030): attention in shifted windows, at four resolutions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sightline.backbones.backbone import Backbone
from sightline.errors import printable
from sightline.layers.attention import Attention
from sightline.layers.canvas import on_canvas, real_tokens
from sightline.layers.dense import Dense
from sightline.layers.encoder import ACTIVATIONS, DropPath, Mlp
from sightline.layers.positions import RELATIVE_RESAMPLERS, RelativePositions, resample_relative
from sightline.layers.windows import Grid, Padding, Windows
from sightline.registry import Variant
from sightline.schema import require
from sightline.tokenizers.patch import PatchEmbedding
from sightline.types import Tokens

Fit = Literal["axis", "image_size", "side", "never", "always"]


@dataclass(frozen=True)
class SwinConfig:
    """The settings of a `Swin`, under the names that timm's users know.

    `image_size`, `patch_size` and `window_size` are (height, width), the first two in pixels and the last in tokens.
    `depths` and `num_heads` have one number for each stage; stage i is `embed_dim`·2^i wide. `partial_patches` is that
    of `PatchEmbedding`. `norm_eps` is that of the layers and the final norm; the norms after the patch embedding and in
    patch merging have 1e-5 always, as in every library.

    `window_fit` says what becomes of the windows on a grid that is no larger than they are. "axis": along such an axis
    they shrink to the grid and are not shifted. "image_size": so, but by the grid that `image_size` has, whatever image
    comes (timm). "side": where the shorter side is no larger, windows are squares of that side and not shifted (the
    original code, transformers). "never": they keep their size, padded, and are not shifted along such an axis
    (torchvision). "always": they keep their size and are shifted (timm's `always_partition`).

    A stage whose windows shrink at `image_size` has a smaller table of relative positions, unless `full_table` is on
    (transformers); a window smaller than its table reads the middle of it, and none is ever larger. `padding` is that
    of `Windows`; `position_resample` a key of `RELATIVE_RESAMPLERS`.

    Rates of dropout and stochastic depth lie in [0, 1). Raises UserError for values out of range or that do not go
    together.
    """

    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    patch_size: tuple[int, int] = (4, 4)
    partial_patches: Literal["pad", "drop"] = "pad"
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: tuple[int, int] = (7, 7)
    window_fit: Fit = "axis"
    padding: Padding = "hidden"
    full_table: bool = False
    position_resample: str = "bicubic"
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    norm_eps: float = 1e-5
    activation: str = "gelu"
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "in_chans", "patch_size", "embed_dim", "depths", "num_heads", "window_size"):
            value = getattr(self, name)
            positive = min(value if isinstance(value, tuple) else (value,), default=0) > 0
            require(positive, f"{name} must be positive, not {printable(value)}")
        require(len(self.depths) == len(self.num_heads), "depths and num_heads need one number each for every stage")
        require(len(self.depths) <= 10 and sum(self.depths) <= 1024, "at most 10 stages and 1024 layers are possible")
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            require(width % heads == 0, f"a stage is {width} wide, which is not a multiple of its num_heads {heads}")
        cells = self.window_size[0] * self.window_size[1]
        require(cells <= 1024, f"a window of window_size {self.window_size} has more than 1024 tokens")
        square = self.window_fit != "side" or self.window_size[0] == self.window_size[1]
        require(square, f"window_fit='side' needs square windows, not window_size {self.window_size}")
        require(0 < self.mlp_ratio < 1024, f"mlp_ratio must lie between 0 and 1024, not {self.mlp_ratio}")
        require(int(self.embed_dim * self.mlp_ratio) > 0, f"mlp_ratio {self.mlp_ratio} leaves no hidden units")
        require(0 <= self.norm_eps < 1, f"norm_eps must lie in [0, 1), not {self.norm_eps}")
        for name, known in (("activation", ACTIVATIONS), ("position_resample", RELATIVE_RESAMPLERS)):
            value = getattr(self, name)
            require(value in known, f"{name} '{printable(value)}' is not one of {', '.join(known)}")
        for name in ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), not {getattr(self, name)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The size of the tokens of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of tokens of each stage, at the image size it was made for."""
        pixels, patch = self.image_size, self.patch_size
        up = patch[0] - 1, patch[1] - 1
        if self.partial_patches == "drop":
            up = 0, 0
        grids = [((pixels[0] + up[0]) // patch[0], (pixels[1] + up[1]) // patch[1])]
        while len(grids) < len(self.depths):
            grids.append(halved(grids[-1]))
        return tuple(grids)

    def table(self, stage: int) -> Grid:
        """Rows and columns of the largest window that a stage's table of relative positions is for."""
        return self.window_size if self.full_table else self._fitted(self.grids[stage], self.window_size)[0]

    def windows(self, stage: int, grid: Grid, shifted: bool) -> Windows:
        """How a stage cuts a grid of (rows, columns) in every other layer, and, `shifted`, in those between."""
        by = self.grids[stage] if self.window_fit == "image_size" else grid
        window, shift = self._fitted(by, self.table(stage))
        return Windows(grid, window, shift if shifted else (0, 0), self.padding)

    def _fitted(self, grid: Grid, window: Grid) -> tuple[Grid, Grid]:
        """Windows for a grid that are at most so large, and their shift."""
        half = window[0] // 2, window[1] // 2
        if self.window_fit == "always":
            return window, half
        if self.window_fit == "side":
            side = min(grid)
            return ((side, side), (0, 0)) if side <= min(window) else (window, half)
        shift = half[0] * (grid[0] > window[0]), half[1] * (grid[1] > window[1])
        if self.window_fit == "never":
            return window, shift
        return (min(grid[0], window[0]), min(grid[1], window[1])), shift


def halved(grid: Grid) -> Grid:
    """Rows and columns that are left after a `PatchMerging`."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


class PatchMerging(nn.Module):
    """Every four neighbours become one token of twice the width (arXiv 2103.14030, section 3.1).

    They stand side by side in the order upper left, lower left, upper right, lower right. Odd grids get a row or column
    of zeros.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=1e-5)
        self.reduction = Dense(4 * width, 2 * width, bias=False)

    def forward(self, x: Float[Tensor, "b r c d"]) -> Float[Tensor, "b r2 c2 d2"]:
        rows, columns = x.shape[1:3]
        if rows % 2 or columns % 2:
            x = F.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
        return self.reduction(self.norm(rearrange(x, "b (r h) (c w) d -> b r c (w h d)", h=2, w=2)))


class WindowBlock(nn.Module):
    """One layer: attention within windows and MLP, each on a residual branch (arXiv 2103.14030, equation 3).

    `window` is the largest (rows, columns) it can attend to at once.
    """

    def __init__(self, config: SwinConfig, width: int, heads: int, window: Grid, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.relative = RelativePositions(heads, window, prefix=0, resample=config.position_resample)
        self.attention = Attention(
            width, heads, qkv_bias=config.qkv_bias, drop=config.attn_drop_rate, out_drop=config.proj_drop_rate
        )
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        hidden = int(width * config.mlp_ratio)
        self.mlp = Mlp(width, hidden, activation=config.activation, drop=config.proj_drop_rate)
        self.drop_path = DropPath(drop_path)
        nn.init.trunc_normal_(self.relative.table, std=0.02)

    def forward(
        self, x: Float[Tensor, "b r c d"], windows: Windows, mask: Float[Tensor, "w 1 m m"] | None
    ) -> Float[Tensor, "b r c d"]:
        """`mask` is that of `windows`, which the layers of a stage share."""
        bias = self.bias(windows.window)
        if mask is not None:
            bias = repeat(bias + mask, "w h q k -> (b w) h q k", b=x.shape[0])
        mixed = self.attention(windows.cut(self.norm1(x)), bias=bias)
        x = x + self.drop_path(windows.join(mixed))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def bias(self, window: Grid) -> Float[Tensor, "1 h m m"]:
        """What is added to the logits for the offset between query and key in a window of (rows, columns)."""
        index, (rows, columns) = self.relative.index, window
        if window != self.relative.grid:
            # The offsets of a smaller window lie in the middle of the table, where the larger one's corner has them.
            index = rearrange(index, "(a b) (c d) -> a b c d", a=self.relative.grid[0], c=self.relative.grid[0])
            index = rearrange(index[:rows, :columns, :rows, :columns], "a b c d -> (a b) (c d)")
        return rearrange(self.relative.table[index], "q k h -> 1 h q k")


class Stage(nn.Module):
    """The layers of one resolution, after the patch merging that leads to it; windows are shifted in every second one.

    With `checkpointing` set, activations are recomputed in the backward pass instead of kept.
    """

    def __init__(self, config: SwinConfig, number: int):
        super().__init__()
        self.config, self.number, self.checkpointing = config, number, False
        width, heads, depth = config.widths[number], config.num_heads[number], config.depths[number]
        self.downsample = PatchMerging(width // 2) if number else None
        before, total = sum(config.depths[:number]), sum(config.depths)
        rates = [config.drop_path_rate * i / max(total - 1, 1) for i in range(before, before + depth)]
        window = config.table(number)
        self.blocks = nn.ModuleList(WindowBlock(config, width, heads, window, rate) for rate in rates)

    def forward(self, x: Float[Tensor, "b r c d"]) -> Float[Tensor, "b r2 c2 d2"]:
        if self.downsample is not None:
            x = self.downsample(x)
        grid = (x.shape[1], x.shape[2])
        kinds = [self.config.windows(self.number, grid, shifted) for shifted in (False, True)]
        masks = [windows.mask(x.device) for windows in kinds]
        for i, block in enumerate(self.blocks):
            arguments = x, kinds[i % 2], masks[i % 2]
            again = self.checkpointing and self.training
            x = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        return x


class Swin(Backbone):
    """A Swin Transformer: patches, stages of layers with attention in windows, final norm.

    There are no prefix tokens. `depth` counts the layers of all stages; `stages` has one entry for each resolution.
    Initialised as the original code does it: dense layers and relative positions normal with deviation 0.02, cut off
    at two.
    """

    Config = SwinConfig
    prefix = 0

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.config, self.width, self.depth = config, config.widths[-1], sum(config.depths)
        require(
            min(config.grids[0]) > 0,
            f"patches of {config.patch_size[0]}×{config.patch_size[1]} pixels do not fit into an image of "
            f"{config.image_size[0]}×{config.image_size[1]}",
        )
        self.tokenizer = PatchEmbedding(
            config.embed_dim, in_chans=config.in_chans, patch_size=config.patch_size, partial=config.partial_patches
        )
        self.patch_norm = nn.LayerNorm(config.embed_dim, eps=1e-5)
        self.drop = nn.Dropout(config.pos_drop_rate)
        self.layers = nn.ModuleList(Stage(config, number) for number in range(len(config.depths)))
        self.norm = nn.LayerNorm(self.width, eps=config.norm_eps)
        self.layers.apply(_small)

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches at the image size it was made for, before any merging."""
        return self.config.grids[0]

    def _each(self, pixels: Float[Tensor, "b c h w"]) -> Iterator[Tokens]:
        """The tokens at the end of each stage."""
        tokens = self.tokenizer(pixels)
        x = self.drop(self.patch_norm(tokens.x))
        x = rearrange(x, "b (r c) d -> b r c d", r=tokens.grid[0])
        for stage in self.layers:
            x = stage(x)
            yield Tokens(rearrange(x, "b r c d -> b (r c) d"), (x.shape[1], x.shape[2]))

    def stages(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> list[Tokens]:
        if sizes is None:
            return list(self._each(pixels))
        # Windows are laid from the edges of each image, so each goes alone.
        alone = [self._each(image[None, :, :h, :w]) for image, (h, w) in zip(pixels, sizes.tolist(), strict=True)]
        return [_together(stage) for stage in zip(*alone, strict=True)]

    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Tokens:
        tokens = self.stages(pixels, sizes)[-1]
        return tokens._replace(x=self.norm(tokens.x))

    def whole(
        self, name: str, weights: Float[Tensor, "bw h m m"], size: tuple[int, int], *, shares: bool = True
    ) -> tuple[Float[Tensor, "b h n n"], Grid]:
        """The attention maps of a layer's windows as one map over all tokens of its stage, and their rows and columns.

        `name` is that of the layer's `Attention` in the backbone, `size` the (height, width) of the image in pixels.
        Tokens that share no window have weight 0; every row sums to 1, unless the numbers are no `shares`.
        """
        _, stage, _, block, *_ = name.split(".")
        grid = self.tokenizer.grid(size)
        for _ in range(int(stage)):
            grid = halved(grid)
        windows = self.config.windows(int(stage), grid, shifted=int(block) % 2 == 1)
        return windows.whole(weights, shares=shares), grid

    def layer_of(self, parameter: str) -> int:
        """Layers are counted through all stages; patch merging goes with the layer before it (arXiv 2111.09886)."""
        part, *rest = parameter.split(".")
        if part == "layers":
            before = sum(self.config.depths[: int(rest[0])])
            return before if rest[1] == "downsample" else before + int(rest[2]) + 1
        return self.depth + 1 if part == "norm" else 0

    def resample(self, state: Mapping[str, Tensor], other: Backbone) -> dict[str, tuple[Tensor, str]]:
        """Tables of relative positions, stretched from the windows of `other` to those here."""
        assert isinstance(other, Swin)
        method, changed = other.config.position_resample, {}
        for stage, depth in enumerate(self.config.depths):
            old, new = other.config.table(stage), self.config.table(stage)
            how = f"from windows of {old[0]}×{old[1]} to {new[0]}×{new[1]} tokens ({method})"
            for name in (f"layers.{stage}.blocks.{i}.relative.table" for i in range(depth if old != new else 0)):
                changed[name] = resample_relative(state[name], old, new, method), how
        return changed

    @classmethod
    def computed(cls, config: SwinConfig) -> int:
        """Each layer's index of offsets: a number for every pair of cells of its largest window."""
        return sum(math.prod(config.table(stage)) ** 2 * depth for stage, depth in enumerate(config.depths))

    @classmethod
    def settle(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        named = super().settle(settings)
        if isinstance(named.get("window_size"), int):
            named["window_size"] = (named["window_size"],) * 2
        return named


def _together(alone: Sequence[Tokens]) -> Tokens:
    """The tokens of single images on one canvas."""
    grids = [tokens.grid for tokens in alone]
    canvas = max(rows for rows, _ in grids), max(columns for _, columns in grids)
    x = torch.cat([on_canvas(tokens.x, tokens.grid, canvas, 0) for tokens in alone])
    return Tokens(x, canvas, 0, real_tokens(grids, canvas, 0).to(x.device))


def _small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


FAMILIES = {"swin": Swin}

_SIZES = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}


def _row(size: str, parameters: int, image: int = 224, window: int = 7, resize: int | None = None) -> Variant:
    """A published network; `resize` is what torchvision shrinks the shorter side to before it crops."""
    crop = 0.9 if image == 224 else 1.0
    settings: dict[str, Any] = {**_SIZES[size], "patch_size": 4, "image_size": image, "window_size": (window, window)}
    if resize is not None:
        settings |= {"window_fit": "never", "padding": "seen", "partial_patches": "drop"}
    return Variant(
        family="swin",
        parameters=parameters,
        paper="2103.14030",
        settings=settings,
        head={"global_pool": "avg"},
        preprocess={
            "crop_pct": crop if resize is None else image / resize,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        sources=("timm", "transformers", "original") if resize is None else ("torchvision",),
    )


VARIANTS = {
    "swin_tiny_patch4_window7_224": _row("tiny", 28_288_354),
    "swin_small_patch4_window7_224": _row("small", 49_606_258),
    "swin_base_patch4_window7_224": _row("base", 87_768_224),
    "swin_base_patch4_window12_384": _row("base", 87_903_584, 384, 12),
    "swin_large_patch4_window7_224": _row("large", 196_532_476),
    "swin_large_patch4_window12_384": _row("large", 196_735_516, 384, 12),
    "swin_t": _row("tiny", 28_288_354, resize=232),
    "swin_s": _row("small", 49_606_258, resize=246),
    "swin_b": _row("base", 87_768_224, resize=238),
}

SMALL = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"image_size": (32, 48), "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "window_size": 4},
    )
}
