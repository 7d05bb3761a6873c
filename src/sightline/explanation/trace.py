"""One walk through the layers of a network, from the last to the first, that reads each attention map once."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sightline.explanation.distance import mean_distance, patch_distances
from sightline.explanation.grids import Pair, Seats, handed_down
from sightline.explanation.maps import Layer
from sightline.explanation.rollout import Fusion, flow

Maps = Float[np.ndarray, "kept heads n n"] | tuple[Float[np.ndarray, "_ _ _"], ...]
"""Attention maps of several layers: one array where all layers of the network are alike, otherwise one for each."""


class Trace(NamedTuple):
    """What the walk collected.

    `skipping` are the shares of the first layer's tokens in what was asked for, `raw` the same without the skip
    connections. `heads` are the maps of the kept layers. `distance` is NaN where a layer has fewer heads than others,
    or its patches do not ask.
    """

    skipping: Float[Tensor, "1 1 n"]
    raw: Float[Tensor, "1 1 n"]
    heads: Maps
    distance: Float[np.ndarray, "layers heads"]


def trace(
    layers: Sequence[Layer],
    strides: Sequence[Pair],
    asked: Float[Tensor, "1 1 m"],
    seats: Seats,
    keep: Collection[int],
    fusion: Fusion,
) -> Trace:
    """Follows the shares `asked` of the last tokens, which lie on `seats`, back to the first layer's.

    `strides` are the steps of the layers' grids in pixels; `keep` numbers the layers, from 0, whose maps are kept.
    """
    skipping = raw = asked
    kept: dict[int, np.ndarray] = {}
    distance = np.full((len(layers), max((layer.heads for layer in layers), default=0)), math.nan, dtype=np.float32)
    for number in reversed(range(len(layers))):
        layer = layers[number]
        read = _read(layer, strides[number], fusion, keep=number in keep)
        skipping, raw = (handed_down(rows, seats, layer.seats) for rows in (skipping, raw))
        skipping = skipping @ flow(read.fused)
        raw = raw @ flow(read.fused, residual=False)
        seats = layer.seats
        if layer.asking:
            distance[number, : layer.heads] = read.distance
        if read.heads is not None:
            kept[number] = read.heads
        del read  # before the next layer's maps are computed
    maps = [kept[number] for number in sorted(kept)]
    alike = len({(layer.heads, layer.seats.tokens) for layer in layers}) == 1
    return Trace(skipping, raw, np.stack(maps) if maps and alike else tuple(maps), distance)


class _Read(NamedTuple):
    fused: Float[Tensor, "1 1 n n"]
    distance: list[float]
    heads: Float[np.ndarray, "heads n n"] | None


def _read(layer: Layer, stride: Pair, fusion: Fusion, *, keep: bool) -> _Read:
    """One layer's heads, joined as `fusion` says; the mean distance of each; and, where they are to be kept, all."""
    join = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}[fusion]
    heads = torch.empty(layer.heads, *[layer.seats.tokens] * 2) if keep else None
    fused, between, distance = None, None, []
    for head, weights in enumerate(layer.maps()):
        between = patch_distances(layer.seats.grid, stride).to(weights.device) if between is None else between
        distance.append(float(mean_distance(weights, between)))
        if heads is not None:
            heads[head] = weights[0, 0]
        fused = weights if fused is None else join(fused, weights)
    assert fused is not None, "attention has at least one head"
    fused = fused / layer.heads if fusion == "mean" else fused
    return _Read(fused, distance, None if heads is None else heads.numpy())
