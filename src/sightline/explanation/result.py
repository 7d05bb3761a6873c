"""What was found in one image, as arrays and as a picture."""

import base64
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import UserError
from sightline.explanation.features import standing_out
from sightline.explanation.filters import Filters
from sightline.explanation.grids import Grid, Pair, Seats
from sightline.explanation.queries import MEAN, Query, query_row, settled
from sightline.explanation.render import Box, View, colours, overlay, png
from sightline.explanation.rollout import Fusion, on_grid, scaled
from sightline.explanation.segmentation import MASS, mass_mask
from sightline.explanation.trace import Maps

SHOWN = 1024
"""The most pixels of the longer side of an image that an explanation keeps."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What one image made a network attend to. All arrays are float32.

    `rollout` is the share of each patch in what `query` (the tokens that the head reads, unless another was asked for)
    holds after the last layer, with `fusion` of the heads and the weight `residual` of the skip connections;
    `rollout_raw` the same without these. Both sum to 1 together with the prefix tokens' share, and lie on `grid`, the
    grid of the first layer with attention, the finest of a pyramid. `attention` is what the last layer alone gives to
    each patch, on that layer's grid, the last. All three are None without attention. `relevance`, on `grid`, is what
    each patch adds to the class `relevance_class` by way of attention and its gradient (`sightline.explanation
    .relevance`); None unless it was asked for.

    `heads` are the attention maps of the layers numbered in `layers` (from 0), prefix tokens first in rows and columns.
    Where layers have unlike numbers of heads or tokens, as in pyramids, it is a tuple with an array for each of them.
    `grids` has the rows and columns of every layer, kept or not. `distance` is the mean attention distance of every
    layer and head, in pixels of the model's input of `size` (height, width); where a layer has fewer heads than others,
    or its patches do not ask, it is NaN. `strides` has the step of every layer's grid in these pixels, (down, right),
    `stride` that of `grid`, whose first cell begins at `origin`; `prefix` is the number of prefix tokens after the last
    layer, and `prefix_names` are their names; `head_query` says which tokens the head reads.

    `activation` is the class activation map of the class with index `activation_class`, the most probable: what each
    place adds to its logit, on the grid of the last layer (arXiv 1512.04150). None where the head is more than the mean
    of the patches and a dense layer. `gaze` are the maps of the head's own attention, the mean over its heads, for each
    of `gaze_words`: the objects that a detector found, or the classes that a mask transformer told apart; None for
    heads without attention. `position_similarity` is the cosine between position vectors, and `filters` the
    principal components of the first convolution; None for models without them.

    `features` are the last patches as the head reads them, on the last grid. `colours` shows their first three
    principal components as red, green and blue from 0 to 1, and `colours_variance` has these components' shares of the
    variance. `norms` are the Euclidean norms of the last patches before the final norm, `prefix_norms` those of the
    prefix tokens. `text_similarity` is the cosine between each patch and each of `texts`, for networks that were asked
    about them; None for others. `image` is the upright image, at most `SHOWN` pixels long, and `box` the part of it
    that the model saw; None where only pixels were given.
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
    attention: Float[np.ndarray, "_ _"] | None
    relevance: Float[np.ndarray, "rows columns"] | None
    relevance_class: int | None
    prefix_names: tuple[str, ...]
    head_query: Query
    fusion: Fusion
    residual: float
    features: Float[np.ndarray, "_ _ d"]
    colours: Float[np.ndarray, "_ _ 3"]
    colours_variance: Float[np.ndarray, " 3"]
    norms: Float[np.ndarray, "_ _"]
    prefix_norms: Float[np.ndarray, " prefix"]
    text_similarity: Float[np.ndarray, "texts rows columns"] | None = None
    texts: tuple[str, ...] = ()
    image: UInt8[np.ndarray, "h w 3"] | None = None
    box: Box | None = None

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
        given = [self.attended(layer) for layer in self.layers]
        return np.stack(given) if isinstance(self.heads, np.ndarray) else tuple(given)

    def attended(
        self, layer: int = -1, query: str | tuple[int, int] | None = None
    ) -> Float[np.ndarray, "heads rows columns"]:
        """What each head of a kept layer gives to every patch when a token asks, on that layer's grid.

        `layer` counts from 0, or from the end. `query` is `self.query` where None; the name of a token, such as "class
        token" or "register 2" (`prefix_names`); "mean of patches"; or a patch of `grid` as (row, column) from 0. Where
        the token reads no patch in this layer, because it comes later, the mean of the patches asks. Raises UserError
        for a layer that was not kept and a token that there is not.
        """
        number = layer % len(self.grids) if self.grids and -len(self.grids) <= layer < len(self.grids) else layer
        if number not in self.layers:
            kept = ", ".join(map(str, self.layers)) or "none"
            raise UserError(
                f"the maps of layer {layer} were not kept (kept: {kept}); explain(…, layers=[{layer}]) does"
            )
        maps, grid = torch.from_numpy(self.heads[self.layers.index(number)]), self.grids[number]
        seats = Seats(maps.shape[-1] - grid[0] * grid[1], grid)
        name = self.query if query is None else settled(query, self.prefix_names, self.grid)
        for asking in (name, MEAN):
            row = query_row(seats, asking, self.prefix_names, finest=self.grid)
            given = on_grid((row @ maps)[:, 0], grid, seats.prefix)
            if given.any():
                break
        return given.numpy()

    def masks(self, mass: float = MASS) -> Bool[np.ndarray, "heads rows columns"]:
        """For each head of the last kept layer, the patches that hold `mass` of what it gives to patches, as in DINO.

        Raises UserError where no layer's maps were kept.
        """
        if not self.layers:
            raise UserError(
                "there are no maps of heads to be thresholded: none was kept, or the model has no attention"
            )
        return mass_mask(self.attended(self.layers[-1]), mass)

    @property
    def outliers(self) -> Bool[np.ndarray, "_ _"]:
        """The patches whose norm stands out (`sightline.explanation.features.standing_out`), as registers' would."""
        return standing_out(self.norms)

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
            "attention": self.attention,
            "relevance": self.relevance,
            "activation": self.activation,
            "gaze": self.gaze,
            "text_similarity": self.text_similarity,
            "features": self.features,
            "colours": self.colours,
            "colours_variance": self.colours_variance,
            "norms": self.norms,
            "prefix_norms": self.prefix_norms,
            "outliers": self.outliers,
            "position_similarity": self.position_similarity,
        }
        named |= {name: cells for name, cells in maps.items() if cells is not None}
        if self.activation_class is not None:
            named["activation_class"] = np.array(self.activation_class)
        if self.relevance_class is not None:
            named["relevance_class"] = np.array(self.relevance_class)
        if self.filters is not None:
            named["filters"] = self.filters.directions
            named["filters_variance"] = self.filters.variance
            named["filters_pictures"] = self.filters.pictures
        return named

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all arrays to one `.npz` file, whole or not at all, which `numpy.load` reads without pickles.

        Raises WorkError where it cannot be written.
        """
        write_arrays(Path(path), self.arrays())

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

    @property
    def picture(self) -> Image.Image | None:
        """What was looked at: the image with `shown` over it, or the map alone where there is no image."""
        if self.image is not None:
            return Image.fromarray(self.overlay(self.image, box=self.box))
        if self.shown is None:
            return None
        cells = colours(self.shown / max(float(self.shown.max()), np.finfo(np.float32).tiny))
        scale = max(1, 240 // max(self.shown.shape))
        return Image.fromarray(cells.repeat(scale, axis=0).repeat(scale, axis=1))

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows where it shows no HTML: `picture`."""
        return None if self.picture is None else png(self.picture)

    def _repr_html_(self) -> str:
        """What a notebook shows: `picture`, and in words what it is."""
        kind = "Attention rollout" if self.rollout is not None else "Class activation"
        asked = f", asked by the {escape(self.query)}" if self.rollout is not None else ""
        layers = f"{len(self.grids)} layers of attention, " if self.grids else ""
        words = f"{kind}{asked}. {layers}a grid of {self.grid[0]}×{self.grid[1]}, {self.size[0]}×{self.size[1]} pixels."
        data = base64.b64encode(self._repr_png_() or b"").decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{kind}" style="max-width:24em">' if data else ""
        return f"<figure style='margin:0'>{image}<figcaption>{words}</figcaption></figure>"


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Writes arrays to one `.npz` file, whole or not at all. Raises WorkError where it cannot be written."""
    write_atomic(path, lambda file: np.savez(file, **arrays))
