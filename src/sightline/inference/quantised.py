"""A network for the processor whose dense layers multiply whole numbers of 8 bits (arXiv 1712.05877, section 2)."""

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
from sightline.layers.encoder import Block

SMALL = 2**13
"""Weights of a layer below which 8 bits are no gain: the heads of talking heads, say."""
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


Grids = Mapping[str, Grid]
"""The grid of each layer by the name of the layer in the packed network."""


def calibrated(network: nn.Module, batches: Iterable[Float[Tensor, "b 3 h w"]]) -> dict[str, Grid]:
    """The grid of every dense layer of the backbone that is large enough to gain: it covers all that was read.

    Unlike channels are made more alike before: what a layer reads and its weights share their unlikeness evenly
    (arXiv 2211.10438, equation 4 with α = 0.5), but not where another layer gives whole numbers, which have one step.
    Layers that read anything but numbers are left out, as those that were not used.
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
    inside = {f"{name}.fc2" for name, part in copy.named_modules() if isinstance(part, PackedMlp)}
    return {
        name: seen.grid(None if name in inside else layers[name].weight.float())
        for name, seen in met.items()
        if seen.finite
    }


def quantised(network: nn.Module, grids: Grids) -> nn.Module:
    """A copy of a network for inference on the processor, its backbone's layers in `grids` in 8 bits, the rest in bf16.

    Weights have a step for each output, symmetric about zero; what a layer reads has the step of its grid, so that the
    other images of a batch do not matter. Products are summed in 32 bits. What is added up over the layers, the norms
    and the head stay in fp32, attention maps and convolutions in bf16.
    """
    copy = packed(network, torch.bfloat16)
    places, done = list(copy.named_modules()), set[int]()
    for name, owner in places:  # from the outside to the inside
        for kind, part in [] if id(owner) in done else list(owner.named_children()):
            here = f"{name}.{kind}" if name else kind
            if isinstance(part, PackedMlp) and {f"{here}.fc1", f"{here}.fc2"} <= grids.keys():
                other: nn.Module = QuantisedMlp(part, grids[f"{here}.fc1"], grids[f"{here}.fc2"])
            elif type(part) is Attention and f"{here}.qkv" in grids:
                other = QuantisedAttention(part, grids[f"{here}.qkv"], grids.get(f"{here}.out"))
            elif isinstance(part, PackedLinear) and here in grids:
                other = QuantisedLinear(part, grids[here])
            else:
                continue
            setattr(owner, kind, other)
            done.add(id(part))
    for _, part in places:
        if type(part) is Block:
            _join_norms(part)
    return copy


class QuantisedLinear(nn.Module):
    """A dense layer in 8 bits, with what follows it computed on the way. It reads whole numbers of its grid as well.

    `dtype` is that of what it gives; where it is given, `then` is the grid whose whole numbers it gives instead.
    `rows` are factors of the outputs.
    """

    norm: "WholeNorm | None"

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
        weight = (layer.weight if layer.dense is None else layer.dense).float()
        bias = None if layer.bias is None else layer.bias.float()
        if grid.channels is not None:
            weight = weight * grid.channels
        if rows is not None:
            weight, bias = weight * rows[:, None], None if bias is None else bias * rows
        self.grid, self.out_features = grid, layer.out_features
        self.factor, self.norm = grid.factor(), None
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

    def takes(self, norm: nn.LayerNorm) -> None:
        """Lets the layer compute the norm before it, in steps of its own."""
        self.norm = WholeNorm(norm, self.grid)

    def forward(self, x: Float[Tensor, "... i"] | UInt8[Tensor, "... i"]) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        elif x.dtype != torch.uint8:
            x = _cut(x.float().mul(self.factor).add_(self.grid.zero + 0.5))
        return self.product(x)


class QuantisedMlp(nn.Module):
    """Two dense layers in 8 bits: what the first gives are the whole numbers that the second reads."""

    def __init__(self, mlp: PackedMlp, first: Grid, second: Grid):
        super().__init__()
        self.fc1 = QuantisedLinear(mlp.fc1, first, then=second)
        self.fc2 = QuantisedLinear(mlp.fc2, second, torch.float32)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.fc2(self.fc1(x))


class QuantisedAttention(Attention):
    """Self-attention whose projections are in 8 bits; its map is in bf16, and the queries come scaled."""

    def __init__(self, attention: Attention, inner: Grid, outer: Grid | None):
        nn.Module.__init__(self)
        layer, out = cast(PackedLinear, attention.qkv), cast(PackedLinear, attention.out)
        self.heads, self.drop, self.fused = attention.heads, attention.drop, attention.fused
        self.q_bias = self.v_bias = None
        width = layer.out_features // 3
        rows = torch.ones(layer.out_features)
        rows[:width] = (width // self.heads) ** -0.5
        self.qkv: Any = QuantisedLinear(layer, inner, rows=rows)
        self.out: Any = out if outer is None else QuantisedLinear(out, outer, torch.float32)
        self.out_drop = attention.out_drop

    def project(
        self, query: Float[Tensor, "b n d"], key: Tensor | None, value: Tensor | None
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


def _join_norms(block: Block) -> None:
    """Lets the layers behind the norms of a block compute these, where nothing else reads what they give."""
    if block.norm != "pre":
        return
    first = getattr(block.mlp, "fc1", None)
    if isinstance(block.attention, QuantisedAttention):
        block.attention.qkv.takes(block.norm1)
        block.norm1 = cast(Any, nn.Identity())
    if isinstance(first, QuantisedLinear):
        first.takes(block.norm2)
        block.norm2 = cast(Any, nn.Identity())


class _Met:
    """The least and the largest number of each channel that a layer has read."""

    def __init__(self) -> None:
        self.lows = self.highs = torch.zeros(())

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        lows, highs = inputs[0].float().flatten(0, -2).aminmax(dim=0)
        self.lows, self.highs = torch.minimum(self.lows, lows), torch.maximum(self.highs, highs)

    @property
    def finite(self) -> bool:
        """Whether the layer was used, and read numbers only."""
        return self.lows.ndim > 0 and bool((self.lows.isfinite() & self.highs.isfinite()).all())

    def grid(self, weight: Float[Tensor, "o i"] | None) -> Grid:
        """The grid of all that was read, its channels shared with these weights if there are any."""
        if weight is None:
            return Grid(float(self.lows.min()), float(self.highs.max()))
        read, weighed = torch.maximum(self.highs, -self.lows), weight.abs().amax(dim=0)
        shares = (read.clamp(min=1e-5) / weighed.clamp(min=1e-5)).sqrt()
        channels = shares / shares.log().mean().exp()
        return Grid(float((self.lows / channels).min()), float((self.highs / channels).max()), channels)


def _in_backbone(name: str) -> bool:
    return "backbone" in name.split(".")
