"""Exported segmenters answer with logits at the network's size, and the class of every pixel of the picture."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from sightline.heads.segment import classes_at
from sightline.images.program import Side
from sightline.inference.outputs import Arrays, Outputs
from sightline.types import Placement


def _expected(output: Float[Tensor, "1 k rows columns"], place: Placement) -> tuple[Tensor, Tensor]:
    return output[0], classes_at(output[0], place).to(torch.uint8)


def _compute(
    output: Float[Tensor, "1 k rows columns"], sides: tuple[Side, Side]
) -> tuple[Float[Tensor, "k rows columns"], Tensor]:
    """As `classes_at`, with products of matrices in place of a grid of points."""
    down, across = (_between(side) for side in sides)
    maps = down @ output[0] @ rearrange(across, "w columns -> columns w")
    return output[0], maps.argmax(dim=0).to(torch.uint8)


def _between(side: Side) -> Float[Tensor, "n wanted"]:
    """What each row of the input contributes to each of the picture; beyond its edges the nearest row counts."""
    count = side.length.to(torch.int64).item()
    torch._check(count >= 1)
    centres = (torch.arange(count, dtype=torch.float64) + 0.5) * (side.scaled / side.length) - side.begin
    at = (centres - 0.5).clamp(0, side.wanted - 1)
    away = at[:, None] - torch.arange(side.wanted, dtype=torch.float64)
    return (1 - away.abs()).clamp(min=0).to(torch.float32)


def _chosen(arrays: Arrays) -> UInt8[np.ndarray, "h w"]:
    return arrays["classes"]


def _margins(arrays: Arrays, place: Placement, asked: np.ndarray) -> np.ndarray:
    logits = torch.from_numpy(arrays["logits"])
    at = []
    for places, scale, offset, side in zip(np.nonzero(asked), place.scale, place.offset, logits.shape[1:], strict=True):
        at.append(2 * ((torch.from_numpy(places) + 0.5) * scale + offset) / side - 1)
    grid = torch.stack([at[1], at[0]], dim=-1)[None, None].to(logits.dtype)
    read = F.grid_sample(logits[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0]
    if len(read) < 2:
        return np.full(read.shape[1], np.inf)
    two = read.topk(2, dim=0).values
    return (two[0] - two[1]).numpy()


OUTPUTS = {"segment": Outputs(("logits", "classes"), ("logits",), _compute, _expected, _chosen, _margins)}
