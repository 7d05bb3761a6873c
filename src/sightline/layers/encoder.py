"""The Transformer encoder, pre-norm as in the Vision Transformer or post-norm as in the original Transformer."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sightline.layers.attention import Apart, Attention
from sightline.layers.dense import Dense
from sightline.layers.merging import Crowd, merge

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}
"""Exact GELU (timm, DeiT, …), its tanh form (the original JAX code), the sigmoid form (OpenAI CLIP), ReLU, SiLU."""

Bias = Float[Tensor, "#b #h #n #n"] | Apart


class Mlp(nn.Module):
    """Two dense layers with an activation between, applied to every token alone."""

    def __init__(self, width: int, hidden: int, *, activation: str = "gelu", drop: float = 0.0):
        super().__init__()
        self.fc1 = Dense(width, hidden)
        self.fc2 = Dense(hidden, width)
        self.activation = activation
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.drop(self.fc2(self.drop(ACTIVATIONS[self.activation](self.fc1(x)))))


class SwiGLU(nn.Module):
    """A gated MLP: the SiLU of one half of the hidden units multiplies the other half (arXiv 2002.05202, equation 6).

    `hidden` counts both halves, which share one input matrix, rows in the order gate, value; it is even.
    """

    def __init__(self, width: int, hidden: int, *, drop: float = 0.0):
        super().__init__()
        self.fc1 = Dense(width, hidden)
        self.fc2 = Dense(hidden // 2, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(F.silu(gate) * value)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch, small at first (arXiv 2103.17239, equation 3)."""

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for a whole sample with probability `rate` (arXiv 1603.09382).

    Inside `rows_of(start, total)` the noise is drawn for all `total` samples of the global batch and the rows of this
    part are taken, so that splitting a batch over processes or micro-batches changes nothing. Where several views of
    each sample come together, one view of all samples after the other, each has noise of its own.
    """

    part: tuple[int, int, int | None] | None = None

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self.rate == 0.0 or not self.training:
            return x
        start, total, rows = DropPath.part or (0, x.shape[0], None)
        rows = rows or x.shape[0]
        noise = torch.rand(x.shape[0] // rows, total, device=x.device)[:, start : start + rows].flatten()
        keep = (noise >= self.rate).to(x.dtype) / (1 - self.rate)
        return x * keep.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


@contextmanager
def rows_of(start: int, total: int, rows: int | None = None) -> Generator[None]:
    """Tells every `DropPath` that the batches inside are rows `start …` of a global batch of `total` samples.

    `rows` says how many samples that are, where a batch may hold several views of each; None: as many as it has.
    """
    before, DropPath.part = DropPath.part, (start, total, rows)
    try:
        yield
    finally:
        DropPath.part = before


class Block(nn.Module):
    """One encoder layer: attention and MLP, each on a residual branch (arXiv 2010.11929, equations 2 and 3).

    `norm="pre"` normalises the input of each branch; `norm="post"` the sum after it (arXiv 1706.03762, section 3.1).
    `mlp="swiglu"` takes a `SwiGLU`, whose activation is its own.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        norm: Literal["pre", "post"] = "pre",
        eps: float = 1e-6,
        mlp: Literal["mlp", "swiglu"] = "mlp",
        activation: str = "gelu",
        qkv_bias: bool = True,
        key_bias: bool = True,
        layer_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm = norm
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, qkv_bias=qkv_bias, key_bias=key_bias, drop=attn_drop, out_drop=drop)
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        gated = mlp == "swiglu"
        self.mlp = SwiGLU(width, hidden, drop=drop) if gated else Mlp(width, hidden, activation=activation, drop=drop)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"], bias: Bias | None = None) -> Float[Tensor, "b n d"]:
        return self._after_mlp(self._after_attention(x, self.attention(self._asking(x), bias=bias)))

    def merged(self, crowd: Crowd, r: int, prefix: int) -> Crowd:
        """The block with `r` patches merged between attention and MLP (arXiv 2210.09461, section 3)."""
        mixed, keys = self.attention.with_keys(self._asking(crowd.x), bias=crowd.bias())
        crowd = merge(crowd._replace(x=self._after_attention(crowd.x, mixed)), keys, r, prefix)
        return crowd._replace(x=self._after_mlp(crowd.x))

    def _asking(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return x if self.norm == "post" else self.norm1(x)

    def _after_attention(self, x: Float[Tensor, "b n d"], mixed: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.drop_path(self.scale1(mixed))
        return self.norm1(x) if self.norm == "post" else x

    def _after_mlp(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if self.norm == "post":
            return self.norm2(x + self.drop_path(self.scale2(self.mlp(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class Encoder(nn.Module):
    """A stack of blocks; the rate of `drop_path` grows linearly from 0 at the first to its value at the last.

    `bias` is added to the attention logits: one tensor for all layers, or a sequence with one for each.
    With `checkpointing` set, activations are recomputed in the backward pass instead of kept.

    `merging` says how many patches each layer merges, the `protected` tokens before them never (none where it is
    empty). What comes out has the first number of tokens again: those that were merged are equal.
    """

    def __init__(self, depth: int, *, drop_path: float = 0.0, **block):
        super().__init__()
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(drop_path=rate, **block) for rate in rates)
        self.checkpointing = False
        self.merging: tuple[int, ...] = ()
        self.protected = 0

    def crowds(self, x: Float[Tensor, "b n d"], bias: Bias | Sequence[Bias] | None = None) -> Iterator[Crowd]:
        """The tokens after each block in turn, as they are merged."""
        assert bias is None, "merged tokens have no place that a bias could speak of"
        crowd = Crowd.of(x)
        for block, r in zip(self.blocks, self.merging, strict=True):
            assert isinstance(block, Block)
            crowd = block.merged(crowd, r, self.protected)
            yield crowd

    def each(self, x: Float[Tensor, "b n d"], bias: Bias | Sequence[Bias] | None = None) -> Iterator[Tensor]:
        """The tokens after each block in turn, [b, n, d]."""
        if self.merging:
            yield from (crowd.spread() for crowd in self.crowds(x, bias))
            return
        shared = bias is None or isinstance(bias, (Tensor, Apart))
        for i, block in enumerate(self.blocks):
            own = bias if shared else bias[i]
            if self.checkpointing and self.training:
                x = checkpoint(block, x, own, use_reentrant=False)
            else:
                x = block(x, own)
            yield x

    def forward(self, x: Float[Tensor, "b n d"], bias: Bias | Sequence[Bias] | None = None) -> Float[Tensor, "b n d"]:
        if self.merging:
            return deque(self.crowds(x, bias), maxlen=1).pop().spread()
        return deque(self.each(x, bias), maxlen=1).pop()  # only the last is kept
