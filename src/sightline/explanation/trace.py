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
    connections, `last` what the last layer alone gives, all for the heads' fusion. `heads` are the maps of the kept
    layers. `distance` is NaN where a layer has fewer heads than others, or its patches do not ask.
    """

    skipping: Float[Tensor, "1 1 n"]
    raw: Float[Tensor, "1 1 n"]
    last: Float[Tensor, "1 1 m"]
    heads: Maps
    distance: Float[np.ndarray, "layers heads"]


def trace(
    layers: Sequence[Layer],
    strides: Sequence[Pair],
    asked: Float[Tensor, "1 1 m"],
    seats: Seats,
    keep: Collection[int],
    fusion: Fusion = "mean",
    residual: float = 0.5,
) -> Trace:
    """Follows the shares `asked` of the last tokens, which lie on `seats`, back to the first layer's.

    `strides` are the steps of the layers' grids in pixels; `keep` numbers the layers, from 0, whose maps are kept;
    `residual` is the weight of the skip connections.
    """
    skipping = raw = last = asked
    alike = len({(layer.heads, layer.seats.tokens) for layer in layers}) == 1
    numbers, kept = sorted(keep), {}
    if alike and numbers:  # one array from the beginning, for putting many together would take the memory twice
        whole = np.empty((len(numbers), layers[0].heads, *[layers[0].seats.tokens] * 2), dtype=np.float32)
        kept = dict(zip(numbers, whole, strict=True))
    else:
        kept = {n: np.empty((layers[n].heads, *[layers[n].seats.tokens] * 2), dtype=np.float32) for n in numbers}
        whole = tuple(kept.values())
    distance = np.full((len(layers), max((layer.heads for layer in layers), default=0)), math.nan, dtype=np.float32)
    for number in reversed(range(len(layers))):
        layer = layers[number]
        fused, far = _read(layer, strides[number], fusion, kept.get(number))
        skipping, raw = (handed_down(rows, seats, layer.seats) for rows in (skipping, raw))
        alone = flow(fused, residual=0.0)
        raw = raw @ alone
        last = raw if number == len(layers) - 1 else last
        skipping = skipping @ flow(fused, residual=residual)
        seats = layer.seats
        if layer.asking:
            distance[number, : layer.heads] = far
        del fused, alone  # before the next layer's maps are computed
    return Trace(skipping, raw, last, whole, distance)


def _read(
    layer: Layer, stride: Pair, fusion: Fusion, into: Float[np.ndarray, "heads n n"] | None
) -> tuple[Float[Tensor, "1 1 n n"], list[float]]:
    """One layer's heads, joined as `fusion` says, and the mean distance of each; all go `into` an array if there is."""
    join = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}[fusion]
    fused, between, distance = None, None, []
    for head, weights in enumerate(layer.maps()):
        between = patch_distances(layer.seats.grid, stride).to(weights.device) if between is None else between
        distance.append(float(mean_distance(weights, between)))
        if into is not None:
            into[head] = weights[0, 0].cpu().numpy()
        fused = weights if fused is None else join(fused, weights)
    assert fused is not None, "attention has at least one head"
    return fused / layer.heads if fusion == "mean" else fused, distance
