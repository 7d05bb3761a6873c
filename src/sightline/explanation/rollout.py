"""Attention rollout: how much of each input patch arrives at a token of the last layer (arXiv 2005.00928).

The maps of the layers are multiplied, A_last … A_1. Asked for few rows of that product, one walks from the last layer
to the first and never needs a matrix beside the layer's own. Where the grid changes on the way, the rows are brought to
that of the layer before (`sightline.explanation.grids.handed_down`).
"""

from collections.abc import Iterable
from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

Fusion = Literal["mean", "max", "min"]


def flow(
    weights: Float[Tensor, "b h n n"], *, residual: float = 0.5, fusion: Fusion = "mean"
) -> Float[Tensor, "b n n"]:
    """One layer's share of every token in every other: the heads fused, each row summing to 1.

    `residual`, from 0 to below 1, is the weight of the identity, which stands for the skip connection around the
    attention: the attention has the rest (arXiv 2005.00928, section 3.1: 0.5 A + 0.5 I). Rows are scaled afterwards,
    which changes nothing where the heads are averaged.
    """
    fused = reduce(weights, "b h n m -> b n m", fusion)
    if residual:
        fused = (1 - residual) * fused + residual * torch.eye(fused.shape[-1], device=fused.device)
    return fused / fused.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(fused.dtype).tiny)


def rollout(
    maps: Iterable[Float[Tensor, "b h n n"]],
    queries: Float[Tensor, "b q n"],
    *,
    residual: float = 0.5,
    fusion: Fusion = "mean",
) -> Float[Tensor, "b q n"]:
    """The shares of the input tokens in what `queries` read of the last layer (arXiv 2005.00928, equation 1).

    `maps` come from the last layer to the first and are used one at a time. Each row of `queries` weighs the tokens of
    the last layer; the identity gives the whole matrix.
    """
    for weights in maps:
        queries = queries @ flow(weights, residual=residual, fusion=fusion)
        del weights  # before the next one is computed
    return queries


def on_grid(rows: Float[Tensor, "*b n"], grid: tuple[int, int], prefix: int) -> Float[Tensor, "*b rows columns"]:
    """The patches' part of rows over all tokens, as maps on their grid; the prefix tokens' part is left out."""
    return rearrange(rows[..., prefix:], "... (r c) -> ... r c", r=grid[0], c=grid[1])


def scaled(maps: Float[Tensor, "*b rows columns"]) -> Float[Tensor, "*b rows columns"]:
    """Maps divided by their largest value, for display: 0 to 1."""
    return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
