"""Tokens-to-token: an image cut three times into overlapping windows, with attention between (arXiv 2101.11986)."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sightline.layers.dense import Dense
from sightline.layers.encoder import Mlp
from sightline.registry import Variant
from sightline.schema import from_json, require
from sightline.types import Tokens

STRIDE = (16, 16)
"""Pixels from one token to the next: strides of 4, 2 and 2."""

_EPS = 1e-5


@dataclass(frozen=True)
class Options:
    """What may stand in `tokenizer_options`.

    `attention` is linear in the number of tokens ("performer") or exact ("transformer"); `token_dim` is the width of
    what leaves it, 2 or more; `drop` is the dropout of its two branches, in [0, 1). Raises UserError for other values.
    """

    attention: Literal["performer", "transformer"] = "performer"
    token_dim: int = 64
    drop: float = 0.0

    def __post_init__(self) -> None:
        require(1 < self.token_dim <= 2**20, f"token_dim must lie between 2 and {2**20}, not {self.token_dim}")
        require(0 <= self.drop < 1, f"drop must lie in [0, 1), not {self.drop}")


class TokensToToken(nn.Module):
    """The tokens-to-token module (arXiv 2101.11986, section 3.1 and figure 3).

    Windows of 7×7 pixels every 4 pixels become tokens; attention over all of them makes them `token_dim` wide; windows
    of 3×3 of these, every second one, become tokens again, twice, and a dense layer makes the last ones `width` wide.
    What lies outside counts as zero. `options` are the fields of `Options`.

    An image whose sides 4 does not divide is filled with zeros below and to the right (`partial="pad"`), or loses what
    no window holds, as in the original ("drop"). A token depends on the whole image, so that images of unlike sizes
    cannot be padded into one batch. Raises UserError for a `patch_size` other than 16×16, and for unknown options.
    """

    local = False
    origin = (-6.5, -6.5)
    """Where the first cell of 16×16 pixels begins: the middle of what the first token is made of lies at 1.5."""

    def __init__(
        self,
        width: int,
        *,
        in_chans: int = 3,
        patch_size: tuple[int, int] = STRIDE,
        partial: Literal["pad", "drop"] = "pad",
        **options: Any,
    ):
        super().__init__()
        require(patch_size == STRIDE, f"the tokenizer 't2t' cuts 16×16 pixels, not {'×'.join(map(str, patch_size))}")
        given = from_json(Options, options, "tokenizer 't2t'")
        self.partial = partial
        layer = TokenPerformer if given.attention == "performer" else TokenTransformer
        self.attention1 = layer(in_chans * 7 * 7, given.token_dim, drop=given.drop)
        self.attention2 = layer(given.token_dim * 3 * 3, given.token_dim, drop=given.drop)
        self.projection = Dense(given.token_dim * 3 * 3, width)
        self.apply(_truncated)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image of (height, width) pixels."""
        rows, columns = (-(-windows // 4) for windows in self._windows(size))
        return rows, columns

    def _windows(self, size: tuple[int, int]) -> tuple[int, int]:
        """How often the first window fits below and beside itself."""
        more = 3 if self.partial == "pad" else 1
        rows, columns = ((pixels + more) // 4 for pixels in size)
        return rows, columns

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Tokens:
        height, width = pixels.shape[-2:]
        rows, columns = self._windows((height, width))
        if self.partial == "pad":
            pixels = F.pad(pixels, (0, 4 * columns - width, 0, 4 * rows - height))
        x = F.unfold(pixels, kernel_size=7, stride=4, padding=2)
        for attention in (self.attention1, self.attention2):
            x = attention(rearrange(x, "b d n -> b n d"))
            plane = rearrange(x, "b (r c) d -> b d r c", r=rows)
            x = F.unfold(plane, kernel_size=3, stride=2, padding=1)
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return Tokens(self.projection(rearrange(x, "b d n -> b n d")), (rows, columns))


class TokenTransformer(nn.Module):
    """Attention with one head, which makes tokens of `inside` numbers `width` wide, and an MLP.

    Queries, keys and values are as wide as the result, so that the skip connection runs from the values, not from what
    came in. The logits are divided by the square root of `inside`, as in the original.
    """

    qkv_bias = False

    def __init__(self, inside: int, width: int, *, drop: float = 0.0):
        super().__init__()
        self.scale = inside**-0.5
        self.norm1 = nn.LayerNorm(inside, eps=_EPS)
        self.qkv = Dense(inside, 3 * width, bias=self.qkv_bias)
        self.out = Dense(width, width)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b n inside"]) -> Float[Tensor, "b n width"]:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = value + self.drop(self.out(self.mix(query, key, value)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def mix(
        self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b n d"], value: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n d"]:
        """Each query's mean of the values, weighted by how well its key fits."""
        return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=self.scale)[:, 0]


class TokenPerformer(TokenTransformer):
    """The same with attention whose cost grows linearly with the number of tokens (arXiv 2009.14794, equation 5).

    Half as many random `features` as the tokens are wide stand for the exponential of query times key. They are
    orthogonal, drawn once and never learned; checkpoints carry them and counts include them. Logits are not divided.
    """

    qkv_bias = True

    def __init__(self, inside: int, width: int, *, drop: float = 0.0):
        super().__init__(inside, width, drop=drop)
        count = width // 2
        self.features = nn.Parameter(torch.empty(count, width), requires_grad=False)
        nn.init.orthogonal_(self.features, gain=math.sqrt(count))

    def mix(
        self, query: Float[Tensor, "b n d"], key: Float[Tensor, "b n d"], value: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n d"]:
        """Each query's mean of the values; exponentials and their sums are taken in single precision."""
        with _in_full(query):
            queries, keys = self._felt(query.float()), self._felt(key.float())
            sums = torch.einsum("b n m, b n d -> b m d", keys, value.float())
            total = torch.einsum("b n m, b m -> b n", queries, keys.sum(dim=1))
            mean = torch.einsum("b n m, b m d -> b n d", queries, sums) / (total[..., None] + 1e-8)
        return mean.to(value.dtype)

    def _felt(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n m"]:
        """The positive features whose products estimate the kernel."""
        half = x.square().sum(dim=-1, keepdim=True) / 2
        return torch.exp(x @ self.features.T.to(x.dtype) - half) / math.sqrt(self.features.shape[0])


def _in_full(x: Tensor) -> AbstractContextManager[object]:
    """Where no tensor is computed in half precision; without memory none is computed at all."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _truncated(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


TOKENIZERS = {"t2t": TokensToToken}


def options(attention: str, token_dim: int = 64) -> dict[str, Any]:
    """The options with which the original builds every network of one kind."""
    return {"attention": attention, "token_dim": token_dim, "drop": 0.1 if attention == "performer" else 0.0}


def _row(attention: str, width: int, depth: int, parameters: int) -> Variant:
    return Variant(
        family="vit",
        parameters=parameters,
        paper="2101.11986",
        settings={
            "tokenizer": "t2t",
            "tokenizer_options": options(attention),
            "embed_dim": width,
            "depth": depth,
            "num_heads": width // 64,
            "mlp_ratio": 2.0 if width == 256 else 3.0,
            "patch_size": 16,
            "qkv_bias": False,
            "norm_eps": _EPS,
            "positions": "sincos1d",
            "position_resample": "bicubic",
        },
        preprocess={
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        sources=("original",),
    )


VARIANTS = {
    name: _row("transformer" if "_t_" in name else "performer", width, depth, parameters)
    for name, width, depth, parameters in [
        ("t2t_vit_7", 256, 7, 4_310_222),
        ("t2t_vit_10", 256, 10, 5_889_230),
        ("t2t_vit_12", 256, 12, 6_941_902),
        ("t2t_vit_14", 384, 14, 21_545_550),
        ("t2t_vit_19", 448, 19, 39_177_422),
        ("t2t_vit_24", 512, 24, 64_105_934),
        ("t2t_vit_t_14", 384, 14, 21_541_070),
        ("t2t_vit_t_19", 448, 19, 39_172_942),
        ("t2t_vit_t_24", 512, 24, 64_101_454),
    ]
}

SMALL = {
    "t2t": (
        "t2t_vit_7",
        {
            "image_size": (32, 48),
            "tokenizer_options": {"attention": "performer", "token_dim": 16},
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
        },
    )
}
