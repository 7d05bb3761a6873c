"""An explanation as a page needs it: everything that a hand may ask about one image, in one small answer."""

import base64
import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sightline.errors import UserError
from sightline.explanation.grids import Grid, Seats, handed_down
from sightline.explanation.render import fitted
from sightline.explanation.result import SHOWN, Explanation
from sightline.explanation.rollout import flow
from sightline.images.decode import image_size
from sightline.model import Model

LEAST = 320
"""Smaller pictures are enlarged, so that their pixels can be seen."""
MOST_CELLS = 16_000_000
"""Attention maps are sent unasked while they have at most this many values, a byte each; later layers first."""
MOST_ASKED = 64_000_000
"""No more values than these are sent, even where layers are asked for by name."""
MOST_DEPTHS = 16_000_000
MOST_POSITIONS = 4_000_000


class Explainer:
    """Explains images for the web."""

    def __init__(self, model: Model):
        self.model = model

    def arrays(self, image: bytes, layers: Sequence[int] | None) -> bytes:
        """All arrays of an explanation, as an `.npz` file."""
        named: dict[str, Any] = self.model.explain(image, layers=layers).arrays()
        file = BytesIO()
        np.savez_compressed(file, **named)
        return file.getvalue()

    def compact(self, source: bytes, layers: Sequence[int] | None) -> dict[str, Any]:
        """An explanation as JSON values: arrays are objects with `dtype`, `shape` and base64 `data`.

        Rows of attention are bytes, each row scaled by its largest share of a patch, which `scale` holds; so they are
        exact to 1/510 of that. `layers` are numbered from 0; where None, those that fit into `MOST_CELLS`.
        """
        view = self.model.explain(source, layers=layers)
        assert view.image is not None, "an explanation of an image file keeps the image"
        assert view.box is not None, "an explanation of an image file knows what the model saw"
        height, width = image_size(source)
        shown, box = fitted(view.image, view.box, LEAST, SHOWN)
        similarity = view.position_similarity
        if similarity is not None and similarity.size > MOST_POSITIONS:
            similarity = None
        last = (view.colours.shape[0], view.colours.shape[1])
        return {
            "picture": {"type": "image/jpeg", "data": _jpeg(shown), "width": shown.shape[1], "height": shown.shape[0]},
            "original": {"width": width, "height": height},
            "box": [round(float(edge), 4) for edge in box],
            "input": {"width": view.size[1], "height": view.size[0]},
            "origin": list(view.origin),
            "query": view.query,
            "grid": _grid(view.grid, view.stride, None),
            "rollout": None if view.rollout is None else _array(view.rollout),
            "layers": [_grid(grid, view.strides[i], _prefix(view, i)) for i, grid in enumerate(view.grids)],
            "distance": [[None if math.isnan(d) else round(float(d), 3) for d in row] for row in view.distance],
            "heads": [_heads(view, place) for place in _chosen(view, asked=layers is not None)],
            "depths": None if layers is not None else _depths(view),
            "positions": None if similarity is None else _array(_bytes_of((similarity + 1) / 2)),
            "activation": self._activation(view),
            "colours": {**_grid(last, view.stride_of(last), None), "cells": _array(_bytes_of(view.colours))},
            "prefix": list(view.prefix_names),
        }

    def _activation(self, view: Explanation) -> dict[str, Any] | None:
        if view.activation is None or view.activation_class is None:
            return None
        label = self.model.labels[view.activation_class] if self.model.labels else ""
        return {"label": label, "index": view.activation_class, "cells": _array(view.activation)}


def _grid(grid: Grid, stride: tuple[float, float], prefix: int | None) -> dict[str, Any]:
    cells = {"rows": grid[0], "columns": grid[1], "stride": list(stride)}
    return cells if prefix is None else {**cells, "prefix": prefix}


def _tokens(view: Explanation) -> dict[int, int]:
    """The number of tokens of each layer whose maps are kept."""
    return {layer: maps.shape[-1] for layer, maps in zip(view.layers, view.heads, strict=True)}


def _prefix(view: Explanation, layer: int) -> int | None:
    rows, columns = view.grids[layer]
    tokens = _tokens(view).get(layer)
    return None if tokens is None else tokens - rows * columns


def _chosen(view: Explanation, *, asked: bool) -> list[int]:
    """The places, among the kept layers, of those whose maps are sent."""
    most, cells, places = MOST_ASKED if asked else MOST_CELLS, 0, []
    for place in reversed(range(len(view.layers))):
        cells += view.heads[place].size
        if cells > most:
            if asked:
                raise UserError(f"the maps of these layers have more than {MOST_ASKED} values; ask for fewer layers")
            break
        places.append(place)
    return sorted(places)


def _heads(view: Explanation, place: int) -> dict[str, Any]:
    """One layer's maps: for each head and token that asks, its shares of the patches, and of the prefix tokens."""
    layer, maps = view.layers[place], view.heads[place]
    rows, columns = view.grids[layer]
    prefix = maps.shape[-1] - rows * columns
    cells, scale = _bytes(maps[..., prefix:])
    return {
        "layer": layer,
        "cells": _array(cells),
        "scale": _array(scale),
        "prefix": _array(_bytes_of(maps[..., :prefix])),
    }


def _depths(view: Explanation) -> list[dict[str, Any]] | None:
    """Rollout from every token of every layer down to the finest grid; None where the maps are too many.

    In pyramids a token's row begins with the mean over the finer cells it was made of (`handed_down`).
    """
    if not view.layers or len(view.layers) < len(view.grids):
        return None
    finest = view.grids[0][0] * view.grids[0][1]
    if sum(_tokens(view).values()) * finest > MOST_DEPTHS:
        return None
    found: list[dict[str, Any]] = []
    through: Float[Tensor, "1 n m"] | None = None
    seats: Seats | None = None
    for layer, maps in zip(view.layers, view.heads, strict=True):
        rows, columns = view.grids[layer]
        own = Seats(maps.shape[-1] - rows * columns, (rows, columns))
        step = flow(torch.from_numpy(np.ascontiguousarray(maps))[None])
        through = step if through is None or seats is None else handed_down(step, own, seats) @ through
        seats = own
        first = view.heads[0].shape[-1] - finest
        cells, scale = _bytes(through[0, :, first:].numpy())
        found.append({"layer": layer, "cells": _array(cells), "scale": _array(scale)})
    return found


def _bytes(rows: Float[np.ndarray, "*n m"]) -> tuple[np.ndarray, np.ndarray]:
    """Rows as bytes from 0 to the largest of each, and these largest values."""
    scale = rows.max(axis=-1)
    return _bytes_of(rows / np.maximum(scale, np.finfo(np.float32).tiny)[..., None]), scale.astype(np.float32)


def _bytes_of(shares: Float[np.ndarray, "*n"]) -> np.ndarray:
    """Values from 0 to 1 as bytes."""
    return (shares * 255).round().clip(0, 255).astype(np.uint8)


def _array(values: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(values, dtype=np.uint8 if values.dtype == np.uint8 else "<f4")
    kind = "uint8" if data.dtype == np.uint8 else "float32"
    return {"dtype": kind, "shape": list(data.shape), "data": base64.b64encode(data.tobytes()).decode()}


def _jpeg(image: np.ndarray) -> str:
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()
