"""The one attention of every model here: fused when it computes, explicit when it is looked at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sightline.layers.dense import Dense, dense

CPU = torch.device("cpu")
LARGEST_MAP = 2**20
"""Numbers of one attention map up to which it may be written out: beyond 1024 tokens the fused kernel is no slower."""


def writes_maps_out(dtype: torch.dtype, device: torch.device = CPU) -> bool:
    """Whether attention is faster as three products than in torch's fused kernel.

    Measured in bf16 with AVX-512 and without AMX, where the kernel multiplies in fp32: two to six times, both ways.
    """
    return dtype == torch.bfloat16 and device.type == "cpu" and not getattr(torch.cpu, "_is_amx_tile_supported", bool)()


@dataclass(frozen=True)
class Apart:
    """Images one after the other in one sequence, of so many tokens each, which attend to their own image alone.

    What a bias would be that hides all others (arXiv 2307.06304, section 3.1), without computing what is hidden.
    """

    lengths: Sequence[int]

    def parts(self, *whole: Float[Tensor, "b h n k"]) -> Iterator[tuple[Tensor, ...]]:
        """Of queries, keys and values those of each image."""
        return zip(*(x.split(list(self.lengths), dim=2) for x in whole), strict=True)


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (arXiv 1706.03762, section 3.2.2).

    `width` is the size of a token and a multiple of `heads`; `drop` is the dropout of the attention map, `out_drop`
    that of the output. Raises AssertionError where the heads do not divide the width.

    The three input projections share one matrix, rows in the order query, key, value. `qkv_bias` gives them a bias;
    without `key_bias` only queries and values have one, as in BEiT (one of the keys shifts all logits of a query alike
    and changes no map). Windows are put into the batch axis by the caller; masks and relative positions go into
    `bias`, which is added to the logits (minus infinity hides a key). `Apart` in its place keeps images apart that
    share a sequence.

    `fused` may be set to False for inference where the map written out is faster; while the network learns,
    `writes_maps_out` decides. These are the same sums, in another order.
    """

    fused = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        key_bias: bool = True,
        drop: float = 0.0,
        out_drop: float = 0.0,
    ):
        super().__init__()
        assert width % heads == 0, f"width {width} is not a multiple of {heads} heads"
        self.heads = heads
        self.drop = drop
        self.qkv = Dense(width, 3 * width, bias=qkv_bias and key_bias)
        apart = qkv_bias and not key_bias
        self.q_bias = nn.Parameter(torch.zeros(width)) if apart else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if apart else None
        self.out = Dense(width, width)
        self.out_drop = nn.Dropout(out_drop)

    def project(
        self, query: Float[Tensor, "b n d"], key: Tensor | None, value: Tensor | None
    ) -> tuple[Float[Tensor, "b h n k"], Float[Tensor, "b h m k"], Float[Tensor, "b h m k"]]:
        """Queries, keys and values of each head. Keys default to the queries' tokens, values to the keys'."""
        if key is None and value is None:
            mixed = self.qkv(query) if self.q_bias is None else dense(query, self.qkv.weight, self._bias())
            q, k, v = rearrange(mixed, "b n (three h k) -> three b h n k", three=3, h=self.heads)
            return q, k, v
        key = query if key is None else key
        value = key if value is None else value
        bias = self._bias()
        biases = bias.chunk(3) if bias is not None else (None, None, None)
        parts = zip((query, key, value), self.qkv.weight.chunk(3), biases, strict=True)
        q, k, v = (rearrange(dense(x, w, b), "b n (h k) -> b h n k", h=self.heads) for x, w, b in parts)
        return q, k, v

    def _bias(self) -> Float[Tensor, " n"] | None:
        if self.q_bias is None or self.v_bias is None:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(
        self,
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b m d"] | None = None,
        value: Float[Tensor, "b m d"] | None = None,
        *,
        bias: Float[Tensor, "#b #h #n #m"] | Apart | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Each query's mean of the values, weighted by how well its key fits; the map is never materialised."""
        return self._mixed(*self.project(query, key, value), bias)

    def with_keys(
        self, query: Float[Tensor, "b n d"], *, bias: Float[Tensor, "#b #h #n #n"] | None = None
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n k"]]:
        """What `forward` gives for `query` alone, and the mean of its keys over the heads."""
        q, k, v = self.project(query, None, None)
        return self._mixed(q, k, v, bias), k.mean(dim=1)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | Apart | None) -> Float[Tensor, "b n d"]:
        if isinstance(bias, Apart):
            mixed = torch.cat([self._of_values(*part, None) for part in bias.parts(q, k, v)], dim=2)
        else:
            mixed = self._of_values(q, k, v, None if bias is None else bias.to(q.dtype))
        return self.out_drop(self.out(rearrange(mixed, "b h n k -> b n (h k)")))

    def _of_values(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Float[Tensor, "b h n k"]:
        written = writes_maps_out(q.dtype, q.device) if self.training else not self.fused
        if written and q.shape[-2] * k.shape[-2] <= LARGEST_MAP:
            return F.dropout(self._map(q, k, bias), self.drop, self.training) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.drop if self.training else 0.0)

    def weights(
        self,
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b m d"] | None = None,
        value: Float[Tensor, "b m d"] | None = None,
        *,
        bias: Float[Tensor, "#b #h #n #m"] | None = None,
    ) -> Float[Tensor, "b h n m"]:
        """The attention map that `forward` applies for the same arguments, without dropout; every row sums to 1."""
        q, k, _ = self.project(query, key, value)
        return self._map(q, k, bias)

    def _map(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Float[Tensor, "b h n m"]:
        logits = q @ rearrange(k, "b h m k -> b h k m") * q.shape[-1] ** -0.5
        return torch.softmax(logits if bias is None else logits + bias, dim=-1)

    def weights_gradient(
        self,
        gradient: Float[Tensor, "b n d"],
        query: Float[Tensor, "b n d"],
        key: Float[Tensor, "b m d"] | None = None,
        value: Float[Tensor, "b m d"] | None = None,
        *,
        bias: Float[Tensor, "#b #h #n #m"] | None = None,
    ) -> Float[Tensor, "b h n m"]:
        """The gradient of any number by the attention map, given its `gradient` by what `out` reads.

        The other arguments are those of `forward`. A head's mixture is the map times its values, so that no map need be
        kept for the way back.
        """
        _, _, v = self.project(query, key, value)
        return rearrange(gradient, "b n (h k) -> b h n k", h=self.heads) @ rearrange(v, "b h m k -> b h k m")
