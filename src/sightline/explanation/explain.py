"""What a network looked at in one image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sightline.errors import UserError
from sightline.explanation.activation import class_activation
from sightline.explanation.features import before_norm, patch_features, principal_colours, token_norms
from sightline.explanation.filters import patch_filters
from sightline.explanation.grids import Grid, Seats, lattice, strides
from sightline.explanation.maps import Layer, evaluating, laid_out, record
from sightline.explanation.positions import position_similarity
from sightline.explanation.queries import BOTH, CLASS, MEAN, Query, query_row, settled, token_names
from sightline.explanation.relevance import classifies, pulls, relevance
from sightline.explanation.result import Explanation
from sightline.explanation.rollout import Fusion, on_grid
from sightline.explanation.trace import trace
from sightline.types import Tokens

HEADS_BYTES = 256 * 2**20
"""Per-head maps of all layers are kept where they take at most this much memory, otherwise those of the last layer."""


def explain(
    network: Any,
    pixels: Float[Tensor, "*b 3 h w"],
    *,
    layers: Sequence[int] | None = None,
    fusion: Fusion = "mean",
    residual: float = 0.5,
    query: str | tuple[int, int] | None = None,
    gradients: bool = False,
    target: int | None = None,
    labels: Sequence[str] | None = None,
) -> Explanation:
    """Looks inside a network (a backbone and a head) while it reads one image, pixels [3, h, w] or [1, 3, h, w].

    `layers` are those whose per-head maps are kept, from 0, or from the end where negative; an empty list keeps none,
    None all where they take at most `HEADS_BYTES`, otherwise the last. `fusion` says how the rollout joins heads, and
    `residual`, from 0 to below 1, how much of each layer it gives to the skip connection. `labels` are the names of the
    classes.

    Rollout asks what the head reads: the class token, the mean of class and distillation token, or the mean of the
    patches where it pools these or there is no class token; or it asks `query`, a token by its name ("class token",
    "register 1", …), "mean of patches", or a patch of the first layer's grid as (row, column) from 0. It begins with
    the tokens that enter the first layer of attention: how a tokenizer mixes pixels before, by convolutions or
    otherwise, is not followed. In pyramids a merged token's share is spread over those it was made of (`handed_down`).

    `gradients` also computes `relevance`, by one pass forward and back, where the head tells classes apart
    (`classifies`). It and the class activation map speak for the class with index `target`, the most probable where
    that is None.

    Beside the kept maps, one layer's maps are held at a time, and of these laid out over all tokens one head's: about 7
    arrays of [tokens, tokens] in float32, 275 MB for the 3136 tokens of Swin at 224×224. Raises UserError for several
    images, for layers, tokens and classes that do not exist, for a `residual` out of range, and for a family that does
    not say how its maps lie side by side; WorkError where the attention or a gradient is not finite.
    """
    if network.backbone.merges:
        raise UserError("a model that merges tokens cannot be explained: explain the model without merging")
    batch = pixels[None] if pixels.ndim == 3 else pixels
    if batch.ndim != 4 or len(batch) != 1:
        raise UserError(f"explain looks at one image, [3, h, w] or [1, 3, h, w], not at {list(pixels.shape)}")
    if not 0 <= residual < 1:
        raise UserError(f"the weight of the skip connections lies from 0 to below 1, and is {residual}")
    first = next(network.parameters())
    batch = batch.to(first.device, first.dtype)
    size = (batch.shape[-2], batch.shape[-1])
    backbone: Any = network.backbone
    head: Any = network.head
    felt, pulled = pulls(network, batch, target) if gradients and classifies(network) else (None, [])
    with evaluating(network):
        with before_norm(backbone) as entered:
            tokens, calls = record(backbone, batch)
        gaze, words = _gaze(network, tokens, size, labels)
        asked_texts = hasattr(network, "similarity")
        found = [laid_out(backbone, call, size) for call in calls]
        chosen = _choose(found, layers)
        grids = tuple(layer.seats.grid for layer in found)
        grid = grids[0] if grids else tokens.grid
        place = lattice(backbone, size, grid)
        steps = strides(place.stride, grids)
        names = token_names(backbone, tokens.prefix)
        reads = _query(head, tokens.prefix)
        asking = reads if query is None else settled(query, names, grid)
        seats = Seats(tokens.prefix, tokens.grid)
        asked = query_row(seats, asking, names, finest=grid).to(first.device)
        speaks = relevance(pulled, asked, seats) if pulled else None
        del pulled
        traced = trace(found, steps, asked, seats, chosen, fusion, residual)
        activation = class_activation(head, tokens, target)
        similarity = position_similarity(backbone, grid)
        features = patch_features(tokens)
        shades = principal_colours([features])
        norms = token_norms(entered, tokens)
        return Explanation(
            rollout=_patches(traced.skipping, found[0].seats) if found else None,
            rollout_raw=_patches(traced.raw, found[0].seats) if found else None,
            heads=traced.heads,
            layers=tuple(chosen),
            grids=grids,
            strides=steps if found else (),
            distance=traced.distance,
            grid=grid,
            prefix=tokens.prefix,
            query=asking,
            size=size,
            stride=place.stride,
            origin=place.origin,
            activation=None if activation is None else activation.cells.cpu().numpy(),
            activation_class=None if activation is None else activation.index,
            gaze=gaze,
            gaze_words=words,
            position_similarity=None if similarity is None else similarity.cpu().numpy(),
            filters=patch_filters(backbone),
            attention=_patches(traced.last, found[-1].seats) if found else None,
            relevance=None if speaks is None else _patches(speaks, found[0].seats),
            relevance_class=None if speaks is None else felt,
            prefix_names=names,
            head_query=reads,
            fusion=fusion,
            residual=residual,
            features=features,
            colours=shades.pictures[0],
            colours_variance=shades.variance,
            norms=norms.patches,
            prefix_norms=norms.prefix,
            text_similarity=network.similarity(tokens).float().cpu().numpy() if asked_texts else None,
            texts=tuple(labels or ()) if asked_texts else (),
        )


def _gaze(
    network: Any, tokens: Tokens, size: Grid, labels: Sequence[str] | None
) -> tuple[Float[np.ndarray, "asking rows columns"] | None, tuple[str, ...]]:
    """The maps of the head's own attention that it says are worth a look."""
    if not hasattr(network.head, "gaze"):
        return None, ()
    output, calls = record(network.head, tokens, network.area(tokens, size))
    names = labels or [str(i) for i in range(network.head.config.num_classes)]
    if (asked := network.head.gaze(output, names)) is None:
        return None, ()
    call = next(call for call in calls if call.name == asked.layer)
    weights = call.weights()[0].mean(dim=0)
    cells = tokens.grid[0] * tokens.grid[1]
    maps = weights[asked.rows][:, asked.first : asked.first + cells]
    return maps.reshape(-1, *tokens.grid).cpu().numpy(), tuple(asked.words)


def _patches(row: Float[Tensor, "1 1 n"], seats: Seats) -> Float[np.ndarray, "rows columns"]:
    return on_grid(row[0, 0], seats.grid, seats.prefix).cpu().numpy()


def _query(head: Any, prefix: int) -> Query:
    """What a head reads of the last tokens, of which `prefix` come before the patches."""
    config = getattr(head, "config", None)
    if not prefix or getattr(config, "global_pool", "avg") == "avg":
        return MEAN
    return BOTH if getattr(config, "distilled", False) else CLASS


def _choose(found: Sequence[Layer], layers: Sequence[int] | None) -> list[int]:
    depth = len(found)
    if layers is None:
        total = sum(4 * layer.heads * layer.seats.tokens**2 for layer in found)
        return list(range(depth)) if total <= HEADS_BYTES else [depth - 1]
    for layer in layers:
        if not -depth <= layer < depth:
            raise UserError(no_layer(layer, depth, 0))
    return sorted({layer % depth for layer in layers})


def no_layer(layer: int, depth: int, first: int) -> str:
    """What to say of a layer of attention that does not exist, where they are counted from `first`."""
    if depth == 0:
        return f"there is no layer {layer}: the model has no attention"
    return f"there is no layer {layer}: the model has {depth}, counted from {first}"
