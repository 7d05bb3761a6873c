"""What a network looked at in one image, as arrays."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import UserError
from sightline.explanation.activation import class_activation
from sightline.explanation.filters import Filters, patch_filters
from sightline.explanation.grids import Grid, Pair, Seats, lattice, strides
from sightline.explanation.maps import Layer, evaluating, laid_out, record
from sightline.explanation.positions import position_similarity
from sightline.explanation.render import Box, View, overlay
from sightline.explanation.rollout import Fusion, Query, on_grid, query_row, scaled
from sightline.explanation.trace import Maps, trace
from sightline.types import Tokens

HEADS_BYTES = 256 * 2**20
"""Per-head maps of all layers are kept where they take at most this much memory, otherwise those of the last layer."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What one image made a network attend to. All arrays are float32.

    `rollout` is the share of each patch in what `query` (the tokens that the head reads) holds after the last layer;
    `rollout_raw` the same without the skip connections. Both sum to 1 together with the prefix tokens' share, and lie
    on `grid`, the grid of the first layer with attention, the finest of a pyramid. Both are None without attention.

    `heads` are the attention maps of the layers numbered in `layers` (from 0), prefix tokens first in rows and columns.
    Where layers have unlike numbers of heads or tokens, as in pyramids, it is a tuple with an array for each of them.
    `grids` has the rows and columns of every layer, kept or not. `distance` is the mean attention distance of every
    layer and head, in pixels of the model's input of `size` (height, width); where a layer has fewer heads than others,
    or its patches do not ask, it is NaN. `strides` has the step of every layer's grid in these pixels, (down, right),
    `stride` that of `grid`, whose first cell begins at `origin`; `prefix` is the number of prefix tokens after the last
    layer.

    `activation` is the class activation map of the class with index `activation_class`, the most probable: what each
    place adds to its logit, on the grid of the last layer (arXiv 1512.04150). None where the head is more than the mean
    of the patches and a dense layer. `gaze` are the maps of the head's own attention, the mean over its heads, for each
    of `gaze_words`: the objects that a detector found, or the classes that a mask transformer told apart; None for
    heads without attention. `position_similarity` is the cosine between position vectors, and `filters` the
    principal components of the first convolution; None for models without them. `text_similarity` is the cosine between
    each patch and each of `texts`, for networks that were asked about them; None for others.
    """

    rollout: Float[np.ndarray, "rows columns"] | None
    rollout_raw: Float[np.ndarray, "rows columns"] | None
    heads: Maps
    layers: tuple[int, ...]
    grids: tuple[Grid, ...]
    strides: tuple[Pair, ...]
    distance: Float[np.ndarray, "layers heads"]
    grid: Grid
    prefix: int
    query: Query
    size: Grid
    stride: Pair
    origin: Pair
    activation: Float[np.ndarray, "_ _"] | None
    activation_class: int | None
    gaze: Float[np.ndarray, "asking rows columns"] | None
    gaze_words: tuple[str, ...]
    position_similarity: Float[np.ndarray, "rows columns rows columns"] | None
    filters: Filters | None
    text_similarity: Float[np.ndarray, "texts rows columns"] | None = None
    texts: tuple[str, ...] = ()

    @property
    def rollout_scaled(self) -> Float[np.ndarray, "rows columns"] | None:
        """The rollout divided by its largest value, as it is drawn."""
        return None if self.rollout is None else scaled(torch.from_numpy(self.rollout)).numpy()

    @property
    def shown(self) -> Float[np.ndarray, "_ _"] | None:
        """The map that says most briefly where the network looked, not negative.

        The rollout; without attention, what speaks for the most probable class; None where there is neither.
        """
        if self.rollout is not None:
            return self.rollout
        return None if self.activation is None else self.activation.clip(min=0)

    @property
    def head_maps(self) -> Float[np.ndarray, "kept heads rows columns"] | tuple[Float[np.ndarray, "_ _ _"], ...]:
        """What each head of the kept layers gives to every patch when `query` asks; a tuple where `heads` is one.

        In layers in which these tokens read no patch, because they come later, the mean of the patches asks.
        """
        given = [self._asked(maps, self.grids[layer]) for layer, maps in zip(self.layers, self.heads, strict=True)]
        return np.stack(given) if isinstance(self.heads, np.ndarray) else tuple(given)

    def _asked(self, heads: Float[np.ndarray, "heads n n"], grid: Grid) -> Float[np.ndarray, "heads rows columns"]:
        maps, tokens = torch.from_numpy(heads), heads.shape[-1]
        prefix = tokens - grid[0] * grid[1]
        given = on_grid((query_row(tokens, prefix, self.query) @ maps)[:, 0], grid, prefix)
        if not given.any():
            given = on_grid((query_row(tokens, prefix, "mean of patches") @ maps)[:, 0], grid, prefix)
        return given.numpy()

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name, as `save` writes it; what the model does not have is left out.

        Where `heads` is a tuple, its arrays are called `heads_layer_01` and so on, by the layer's number from 1.
        """
        pairs = {"grid": self.grid, "size": self.size, "layers": self.layers}
        named: dict[str, np.ndarray] = {name: np.array(value, dtype=np.int64) for name, value in pairs.items()}
        named["prefix"] = np.array(self.prefix)
        named["grids"] = np.array(self.grids, dtype=np.int64).reshape(-1, 2)
        named["stride"], named["origin"] = (np.array(pair, dtype=np.float32) for pair in (self.stride, self.origin))
        named["strides"] = np.array(self.strides, dtype=np.float32).reshape(-1, 2)
        named["distance"] = self.distance
        if isinstance(self.heads, np.ndarray):
            named["heads"] = self.heads
        else:
            kept = zip(self.layers, self.heads, strict=True)
            named |= {f"heads_layer_{layer + 1:02}": maps for layer, maps in kept}
        maps = {
            "rollout": self.rollout,
            "rollout_scaled": self.rollout_scaled,
            "rollout_raw": self.rollout_raw,
            "activation": self.activation,
            "gaze": self.gaze,
            "text_similarity": self.text_similarity,
            "position_similarity": self.position_similarity,
        }
        named |= {name: cells for name, cells in maps.items() if cells is not None}
        if self.activation_class is not None:
            named["activation_class"] = np.array(self.activation_class)
        if self.filters is not None:
            named["filters"] = self.filters.directions
            named["filters_variance"] = self.filters.variance
            named["filters_pictures"] = self.filters.pictures
        return named

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all arrays to one `.npz` file, whole or not at all, which `numpy.load` reads without pickles.

        Raises WorkError where it cannot be written.
        """
        arrays: dict[str, Any] = self.arrays()
        write_atomic(Path(path), lambda file: np.savez(file, **arrays))

    def view(self, height: int, width: int, box: Box | None = None, *, grid: Grid | None = None) -> View:
        """Where a grid, `self.grid` unless another is given, lies on an image of this size.

        The model saw `box` of the image; all of it where None.
        """
        whole = (0.0, 0.0, float(width), float(height)) if box is None else box
        return View(whole, self.size, self.stride_of(self.grid if grid is None else grid), self.origin)

    def stride_of(self, grid: Grid) -> Pair:
        """The step in pixels, (down, right), of a grid that one of the maps has; any other covers the whole input."""
        steps = {**dict(zip(self.grids, self.strides, strict=True)), self.grid: self.stride}
        return steps.get(grid, (self.size[0] / grid[0], self.size[1] / grid[1]))

    def overlay(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        cells: Float[np.ndarray, "rows columns"] | None = None,
        *,
        box: Box | None = None,
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The upright image with a map over it, `shown` unless another is given; the bare image where there is none.

        `box` is the region of the image that the model saw, (left, top, right, bottom) in its pixels (`seen_box`
        computes it); the rest is dimmed.
        """
        cells = self.shown if cells is None else cells
        if cells is None:
            return image
        height, width = image.shape[:2]
        return overlay(image, cells, self.view(height, width, box, grid=(cells.shape[0], cells.shape[1])))


def explain(
    network: Any,
    pixels: Float[Tensor, "*b 3 h w"],
    *,
    layers: Sequence[int] | None = None,
    fusion: Fusion = "mean",
    labels: Sequence[str] | None = None,
) -> Explanation:
    """Looks inside a network (a backbone and a head) while it reads one image, pixels [3, h, w] or [1, 3, h, w].

    `layers` are those whose per-head maps are kept, from 0, or from the end where negative; an empty list keeps none,
    None all where they take at most `HEADS_BYTES`, otherwise the last. `fusion` says how the rollout joins heads,
    `labels` are the names of the classes.
    Rollout asks what the head reads: the class token, the mean of class and distillation token, or the mean of the
    patches where it pools these or there is no class token. It begins with the tokens that enter the first layer of
    attention: how a tokenizer mixes pixels before, by convolutions or otherwise, is not followed. In pyramids a merged
    token's share is spread over those it was made of (`handed_down`).

    Beside the kept maps, one layer's maps are held at a time, and of these laid out over all tokens one head's: about 7
    arrays of [tokens, tokens] in float32, 275 MB for the 3136 tokens of Swin at 224×224. Raises UserError for several
    images, for layers that do not exist, and for a family that does not say how its maps lie side by side; WorkError
    where the attention is not finite.
    """
    batch = pixels[None] if pixels.ndim == 3 else pixels
    if batch.ndim != 4 or len(batch) != 1:
        raise UserError(f"explain looks at one image, [3, h, w] or [1, 3, h, w], not at {list(pixels.shape)}")
    first = next(network.parameters())
    size = (batch.shape[-2], batch.shape[-1])
    with evaluating(network):
        backbone: Any = network.backbone
        head: Any = network.head
        tokens, calls = record(backbone, batch.to(first.device, first.dtype))
        gaze, words = _gaze(network, tokens, size, labels)
        reads = hasattr(network, "similarity")
        found = [laid_out(backbone, call, size) for call in calls]
        chosen = _choose(found, layers)
        grids = tuple(layer.seats.grid for layer in found)
        grid = grids[0] if grids else tokens.grid
        place = lattice(backbone, size, grid)
        steps = strides(place.stride, grids)
        query = _query(head, tokens.prefix)
        seats = Seats(tokens.prefix, tokens.grid)
        asked = query_row(seats.tokens, seats.prefix, query).to(first.device)
        traced = trace(found, steps, asked, seats, chosen, fusion)
        activation = class_activation(head, tokens)
        similarity = position_similarity(backbone, grid)
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
            query=query,
            size=size,
            stride=place.stride,
            origin=place.origin,
            activation=None if activation is None else activation.cells.cpu().numpy(),
            activation_class=None if activation is None else activation.index,
            gaze=gaze,
            gaze_words=words,
            position_similarity=None if similarity is None else similarity.cpu().numpy(),
            filters=patch_filters(backbone),
            text_similarity=network.similarity(tokens).float().cpu().numpy() if reads else None,
            texts=tuple(labels or ()) if reads else (),
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
        return "mean of patches"
    return "class and distillation tokens" if getattr(config, "distilled", False) else "class token"


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
