"""A network for the processor whose dense layers multiply whole numbers of 8 bits (arXiv 1712.05877, section 2)."""

import math
from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sightline.inference.packed import PackedLinear, PackedMlp, packed
from sightline.layers.attention import LARGEST_MAP, Attention
from sightline.layers.encoder import Block, Encoder

SMALL = 2**12
"""Weights of a layer below which 8 bits are no gain: the heads of talking heads, say."""
ROWS = 512
"""Tokens of which a layer's choice is made; its least and largest number are those of all."""
SMOOTH = (0.0, 0.5, 0.75)
"""Of the difficulty of unlike channels, how much may go from what a layer reads into its weights: one is chosen."""
CLIPS = (1.0, 0.9, 0.8, 0.65, 0.5)
"""Parts of the range that a layer has met which its whole numbers may cover: one is chosen."""
_LEAST = 1e-12


@cache
def multiplies_int8() -> bool:
    """Whether this torch and this processor multiply 8-bit numbers, found out by doing it with a small matrix.

    Without instructions for it (VNNI) sums of two products are cut at 16 bits, and there is no gain.
    """
    try:
        if not torch.cpu._is_vnni_supported():
            return False
        layer, x = nn.Linear(64, 32), torch.rand(3, 64)
        with torch.inference_mode():
            found = QuantisedLinear(PackedLinear(layer, torch.bfloat16, "gelu"), Grid(0.0, 1.0))(x)
            return torch.allclose(found.float(), F.gelu(layer(x)), atol=0.05)
    except (AttributeError, RuntimeError):
        return False


class Grid(NamedTuple):
    """What a dense layer reads as whole numbers: 0 to 255 for `low` to `high`, and what is beyond as the end.

    Each channel is divided by its number in `channels` first, if there are any (arXiv 2211.10438, equation 3).
    """

    low: float
    high: float
    channels: Float[Tensor, " i"] | None = None

    @property
    def step(self) -> float:
        """The distance of two neighbours."""
        return max(self.high - self.low, _LEAST) / 255

    @property
    def zero(self) -> int:
        """The whole number that stands for 0."""
        return round(-self.low / self.step)

    def factor(self) -> Float[Tensor, " i"] | float:
        """What numbers are multiplied by to be counted in steps."""
        return 1 / self.step if self.channels is None else 1 / (self.step * self.channels)

    def whole(self, x: Float[Tensor, "... i"]) -> UInt8[Tensor, "... i"]:
        """The nearest whole numbers."""
        return _cut(x.float().mul(self.factor()).add_(self.zero + 0.5))

    def rounded(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... i"]:
        """What the whole numbers stand for."""
        values = (self.whole(x).float() - self.zero) * self.step
        return values if self.channels is None else values * self.channels


Grids = Mapping[str, Grid]
"""The grid of each layer by the name of the layer in the packed network."""


def calibrated(network: nn.Module, batches: Iterable[Float[Tensor, "b 3 h w"]]) -> dict[str, Grid]:
    """For every dense layer of the backbone that gains by it, the grid on which it errs least on these images.

    What comes out for some of the tokens is compared, in the mean of squares, for a few parts of the range and a few
    ways to share the unlikeness of channels between the layer and what it reads; the range is that of all tokens. Each
    layer is judged alone. It is empty where no layer is large enough, or none is dense.
    """
    copy = packed(network, torch.bfloat16)
    layers = {name: part for name, part in copy.named_modules() if isinstance(part, PackedLinear)}
    met = {name: _Met() for name, part in layers.items() if part.weight.numel() >= SMALL and _in_backbone(name)}
    hooks = [layers[name].register_forward_pre_hook(seen) for name, seen in met.items()]
    with torch.inference_mode():
        for pixels in batches:
            copy(pixels)
        for hook in hooks:
            hook.remove()
        inside = _read_inside(copy)
        found = {name: seen.best(layers[name].weight.float(), name not in inside) for name, seen in met.items()}
    return {name: grid for name, grid in found.items() if grid is not None}


def quantised(network: nn.Module, grids: Grids) -> nn.Module:
    """A copy of a network for inference on the processor, its backbone's layers in `grids` in 8 bits, the rest in bf16.

    Weights have a step for each output, symmetric about zero; what a layer reads has the step of its grid, so that the
    other images of a batch do not matter. Products are summed in 32 bits. What is added up over the layers, the norms
    and the head stay in fp32, attention maps and convolutions in bf16.
    """
    copy = packed(network, torch.bfloat16)
    names = {id(part): name for name, part in copy.named_modules()}
    places = list(copy.named_modules())
    for name, owner in places:
        for kind, part in list(owner.named_children()):
            grid = grids.get(names[id(part)])
            below = f"{name}.{kind}.fc2" if name else f"{kind}.fc2"
            if isinstance(part, PackedMlp) and {f"{below[:-1]}1", below} <= grids.keys():
                setattr(owner, kind, QuantisedMlp(part, grids[f"{below[:-1]}1"], grids[below]))
            elif isinstance(part, PackedLinear) and grid is not None and not isinstance(owner, QuantisedMlp):
                setattr(owner, kind, QuantisedLinear(part, grid, torch.float32 if kind == "out" else torch.bfloat16))
    for _, owner in places:
        for kind, part in list(owner.named_children()):
            if type(part) is Attention and isinstance(part.qkv, QuantisedLinear):
                setattr(owner, kind, QuantisedAttention(part))
    for _, part in places:
        if isinstance(part, Encoder) and not part.merging:
            for block in part.blocks:
                _join_norms(block)
    return copy


class QuantisedLinear(nn.Module):
    """A dense layer in 8 bits, with what follows it computed on the way. It reads whole numbers of its grid as well.

    `dtype` is that of what it gives; where it is given, `then` is the grid whose whole numbers it gives instead.
    `rows` are factors of the outputs.
    """

    def __init__(
        self,
        layer: PackedLinear,
        grid: Grid,
        dtype: torch.dtype = torch.bfloat16,
        *,
        then: Grid | None = None,
        rows: Float[Tensor, " o"] | None = None,
    ):
        super().__init__()
        weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
        if grid.channels is not None:
            weight = weight * grid.channels
        if rows is not None:
            weight, bias = weight * rows[:, None], None if bias is None else bias * rows
        self.layer, self.grid, self.out_features = layer, grid, layer.out_features
        self.factor = grid.factor()
        scales, whole = whole_weights(weight)
        name, kind = layer.activation
        self.product: Any = partial(
            torch.ops.onednn.qlinear_pointwise,
            x_scale=grid.step,
            x_zero_point=grid.zero,
            qw=torch.ops.onednn.qlinear_prepack(whole.contiguous(), None),
            w_scale=scales,
            w_zero_point=torch.zeros(len(weight), dtype=torch.int64),
            bias=bias,
            output_scale=1.0 if then is None else then.step,
            output_zero_point=0 if then is None else then.zero,
            output_dtype=dtype if then is None else torch.uint8,
            post_op_name=name,
            post_op_args=[],
            post_op_algorithm=kind,
        )

    def forward(self, x: Float[Tensor, "... i"] | UInt8[Tensor, "... i"]) -> Tensor:
        if x.dtype != torch.uint8:
            x = _cut(x.float().mul(self.factor).add_(self.grid.zero + 0.5))
        return self.product(x)


class QuantisedMlp(nn.Module):
    """Two dense layers in 8 bits: what the first gives are the whole numbers that the second reads."""

    def __init__(self, mlp: PackedMlp, first: Grid, second: Grid):
        super().__init__()
        self.fc1 = QuantisedLinear(mlp.fc1, first, then=second)
        self.fc2 = QuantisedLinear(mlp.fc2, second, torch.float32)

    def forward(self, x: Float[Tensor, "... d"] | UInt8[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.fc2(self.fc1(x))


class QuantisedAttention(Attention):
    """Self-attention whose projections are in 8 bits; its map is in bf16, and the queries come scaled."""

    def __init__(self, attention: Attention):
        nn.Module.__init__(self)
        assert isinstance(attention.qkv, QuantisedLinear)
        self.heads, self.drop, self.fused = attention.heads, attention.drop, attention.fused
        self.q_bias = self.v_bias = None
        layer, grid = attention.qkv.layer, attention.qkv.grid
        width = layer.out_features // 3
        rows = torch.ones(layer.out_features)
        rows[:width] = (width // self.heads) ** -0.5
        self.qkv: Any = QuantisedLinear(layer, grid, rows=rows)
        self.out, self.out_drop = attention.out, attention.out_drop

    def project(
        self, query: Float[Tensor, "b n d"] | UInt8[Tensor, "b n d"], key: Tensor | None, value: Tensor | None
    ) -> tuple[Float[Tensor, "b h n k"], Float[Tensor, "b h m k"], Float[Tensor, "b h m k"]]:
        assert key is value is None, "layers that read two sequences are not in 8 bits"
        mixed = rearrange(self.qkv(query), "b n (three h k) -> three b h n k", three=3, h=self.heads)
        q, k, v = mixed.contiguous()  # products of parts that lie apart take twice the time
        return q, k, v

    def _of_values(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Float[Tensor, "b h n k"]:
        if not self.fused and q.shape[-2] * k.shape[-2] <= LARGEST_MAP:
            return self._map(q, k, bias) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)

    def _map(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Float[Tensor, "b h n m"]:
        logits = q @ k.transpose(-1, -2)
        return torch.softmax(logits if bias is None else logits + bias, dim=-1)


class WholeNorm(nn.Module):
    """A layer norm that gives the whole numbers that the layer behind it reads."""

    def __init__(self, norm: nn.LayerNorm, grid: Grid):
        super().__init__()
        factor = torch.as_tensor(grid.factor())
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight = (norm.weight.detach() * factor).contiguous()
        self.bias = norm.bias.detach() * factor + (grid.zero + 0.5)

    def forward(self, x: Float[Tensor, "... d"]) -> UInt8[Tensor, "... d"]:
        return _cut(F.layer_norm(x.float(), self.shape, self.weight, self.bias, self.eps))


def whole_weights(weight: Float[Tensor, "o i"]) -> tuple[Float[Tensor, " o"], Tensor]:
    """The step of each output and its weights in steps, from -127 to 127."""
    scales = weight.abs().amax(dim=1).clamp(min=_LEAST) / 127
    return scales, torch.round(weight / scales[:, None]).clamp(-127, 127).to(torch.int8)


def _cut(x: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Numbers that are half too large as whole ones: the rest behind the point is cut off."""
    return x.clamp_(0, 255).to(torch.uint8)


def _join_norms(block: nn.Module) -> None:
    """Lets the norms of a block give whole numbers, where only one layer reads what they give."""
    if type(block) is not Block or block.norm != "pre":
        return
    attention, mlp = block.attention, block.mlp
    if isinstance(attention, QuantisedAttention):
        block.norm1 = cast(Any, WholeNorm)(block.norm1, attention.qkv.grid)
    first = getattr(mlp, "fc1", None)
    if isinstance(first, QuantisedLinear):
        block.norm2 = cast(Any, WholeNorm)(block.norm2, first.grid)


class _Met:
    """What a layer has read: the least and the largest number of each channel, and some of its tokens."""

    def __init__(self) -> None:
        self.lows: Tensor | None = None
        self.highs: Tensor | None = None
        self.rows: list[Tensor] = []
        self.kept = 0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float().flatten(0, -2)
        lows, highs = x.aminmax(dim=0)
        self.lows = lows if self.lows is None else torch.minimum(self.lows, lows)
        self.highs = highs if self.highs is None else torch.maximum(self.highs, highs)
        rows = x[:: max(len(x) // 64, 1)][: max(ROWS - self.kept, 0)].bfloat16()
        if len(rows):
            self.rows.append(rows)
            self.kept += len(rows)

    def best(self, weight: Float[Tensor, "o i"], smooth: bool) -> Grid | None:
        """Of a few grids the one on which a layer's answers lie nearest to its own; None where it was not used."""
        if self.lows is None or self.highs is None or not (self.lows.isfinite() & self.highs.isfinite()).all():
            return None
        rows = torch.cat(self.rows).float()
        exact = rows @ weight.T
        found, least = None, math.inf
        for strength in SMOOTH if smooth else (0.0,):
            channels = _shares(torch.maximum(self.highs, -self.lows), weight, strength)
            divisor = torch.ones(()) if channels is None else channels
            low, high = min(float((self.lows / divisor).min()), 0.0), max(float((self.highs / divisor).max()), 0.0)
            scales, whole = whole_weights(weight * divisor)
            near = scales[:, None] * whole / divisor
            for clip in CLIPS:
                grid = Grid(clip * low, clip * high, channels)
                error = float((grid.rounded(rows) @ near.T - exact).square().mean())
                if error < least:
                    found, least = grid, error
        return found


def _in_backbone(name: str) -> bool:
    return "backbone" in name.split(".")


def _read_inside(copy: nn.Module) -> set[str]:
    """Layers that read what another layer gives them as whole numbers: their channels have one step."""
    return {f"{name}.fc2" for name, part in copy.named_modules() if isinstance(part, PackedMlp)}


def _shares(read: Float[Tensor, " i"], weight: Float[Tensor, "o i"], strength: float) -> Float[Tensor, " i"] | None:
    """What each channel is divided by: large where what is read is large and the weights are not (arXiv 2211.10438)."""
    if strength == 0.0:
        return None
    largest = weight.abs().amax(dim=0).clamp(min=1e-5)
    shares = read.clamp(min=1e-5) ** strength / largest ** (1 - strength)
    return shares / shares.log().mean().exp()
