"""What a network looked at in one image, as arrays."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import UserError
from sightline.explanation.distance import mean_distance, patch_stride
from sightline.explanation.filters import Filters, patch_filters
from sightline.explanation.maps import Call, evaluating, record
from sightline.explanation.positions import position_similarity
from sightline.explanation.render import Box, View, overlay
from sightline.explanation.rollout import Fusion, Query, flow, on_grid, query_row, scaled

HEADS_BYTES = 256 * 2**20
"""Per-head maps of all layers are kept where they take at most this much memory, otherwise those of the last layer."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What one image made a network attend to. All arrays are float32.

    `rollout` is the share of each patch in what `query` (the token that the head reads) holds after the last layer;
    `rollout_raw` the same without the skip connections. Both sum to 1 together with the prefix tokens' share.
    `heads` are the attention maps of the layers numbered in `layers` (from 0), prefix tokens first in rows and
    columns. `distance` is the mean attention distance of every layer and head, in pixels of the model's input of `size`
    (height, width), on which the grid has steps of `stride` (down, right). `position_similarity` is the cosine between
    position vectors, and `filters` the principal components of the patch embedding; None for models without them.
    """

    rollout: Float[np.ndarray, "rows columns"]
    rollout_raw: Float[np.ndarray, "rows columns"]
    heads: Float[np.ndarray, "kept heads n n"]
    layers: tuple[int, ...]
    distance: Float[np.ndarray, "layers heads"]
    grid: tuple[int, int]
    prefix: int
    query: Query
    size: tuple[int, int]
    stride: tuple[float, float]
    position_similarity: Float[np.ndarray, "rows columns rows columns"] | None
    filters: Filters | None

    @property
    def rollout_scaled(self) -> Float[np.ndarray, "rows columns"]:
        """The rollout divided by its largest value, as it is drawn."""
        return scaled(torch.from_numpy(self.rollout)).numpy()

    @property
    def head_maps(self) -> Float[np.ndarray, "kept heads rows columns"]:
        """What each head of the kept layers gives to every patch when `query` asks."""
        row = query_row(self.heads.shape[-1], self.prefix, self.query)
        return on_grid(row @ torch.from_numpy(self.heads), self.grid, self.prefix)[:, :, 0].numpy()

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name, as `save` writes it; what the model does not have is left out."""
        named = {
            "rollout": self.rollout,
            "rollout_scaled": self.rollout_scaled,
            "rollout_raw": self.rollout_raw,
            "heads": self.heads,
            "layers": np.array(self.layers),
            "distance": self.distance,
            "grid": np.array(self.grid),
            "prefix": np.array(self.prefix),
            "size": np.array(self.size),
            "stride": np.array(self.stride, dtype=np.float32),
        }
        if self.position_similarity is not None:
            named["position_similarity"] = self.position_similarity
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

    def view(self, height: int, width: int, box: Box | None = None) -> View:
        """Where the grid lies on an image of this size, of which the model saw `box`; all of it where None."""
        return View((0.0, 0.0, float(width), float(height)) if box is None else box, self.size, self.stride)

    def overlay(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        cells: Float[np.ndarray, "rows columns"] | None = None,
        *,
        box: Box | None = None,
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The upright image with a map over it, the rollout unless another is given.

        `box` is the region of the image that the model saw, (left, top, right, bottom) in its pixels (`seen_box`
        computes it); the rest is dimmed.
        """
        return overlay(image, self.rollout if cells is None else cells, self.view(*image.shape[:2], box))


def explain(
    network: nn.Module,
    pixels: Float[Tensor, "*b 3 h w"],
    *,
    layers: Sequence[int] | None = None,
    fusion: Fusion = "mean",
) -> Explanation:
    """Looks inside a network (a backbone and a head) while it reads one image, pixels [3, h, w] or [1, 3, h, w].

    `layers` are those whose per-head maps are kept, from 0, or from the end where negative; None keeps all where they
    take at most `HEADS_BYTES`, otherwise the last. `fusion` says how the rollout joins heads. Rollout asks what the
    head reads: the class token, or the mean of the patches where it pools these or there is no class token. Whatever
    the model's size, one layer's maps are held at a time beside those kept. Raises UserError for several images, for
    layers that do not exist, and for a model that never attends over the whole image; WorkError where the attention
    is not finite.
    """
    batch = pixels[None] if pixels.ndim == 3 else pixels
    if batch.ndim != 4 or len(batch) != 1:
        raise UserError(f"explain looks at one image, [3, h, w] or [1, 3, h, w], not at {list(pixels.shape)}")
    first = next(network.parameters())
    with evaluating(network):
        backbone: Any = network.backbone
        tokens, calls = record(backbone, batch.to(first.device, first.dtype))
        grid, prefix = tokens.grid, tokens.prefix
        _check_global(calls, prefix + grid[0] * grid[1])
        chosen = _choose(calls, layers)
        stride = patch_stride(backbone, (batch.shape[-2], batch.shape[-1]), grid)
        query: Query = "class token" if prefix and _pooling(network) != "avg" else "mean of patches"
        skipping = raw = query_row(tokens.x.shape[1], prefix, query).to(first.device)
        heads: dict[int, Tensor] = {}
        distance: list[Tensor] = []
        for layer in reversed(range(len(calls))):
            weights = calls[layer].weights()
            skipping = skipping @ flow(weights, residual=True, fusion=fusion)
            raw = raw @ flow(weights, residual=False, fusion=fusion)
            distance.insert(0, mean_distance(weights, grid, prefix, stride).cpu())
            if layer in chosen:
                heads[layer] = weights[0].cpu()
            del weights  # before the next layer's are computed
        similarity = position_similarity(backbone, grid)
        return Explanation(
            rollout=on_grid(skipping[0, 0], grid, prefix).cpu().numpy(),
            rollout_raw=on_grid(raw[0, 0], grid, prefix).cpu().numpy(),
            heads=torch.stack([heads[layer] for layer in chosen]).numpy(),
            layers=tuple(chosen),
            distance=torch.stack(distance).numpy(),
            grid=grid,
            prefix=prefix,
            query=query,
            size=(batch.shape[-2], batch.shape[-1]),
            stride=stride,
            position_similarity=None if similarity is None else similarity.cpu().numpy(),
            filters=patch_filters(backbone),
        )


def _pooling(network: Any) -> str | None:
    return getattr(getattr(network.head, "config", None), "global_pool", None)


def _check_global(calls: Sequence[Call], tokens: int) -> None:
    for call in calls:
        batch, _, queries, keys = call.shape
        if batch != 1 or queries != tokens or keys != tokens:
            raise UserError(
                f"layer '{call.name}' does not attend over the whole image at once, and rollout is defined only where "
                "every layer does"
            )


def _choose(calls: Sequence[Call], layers: Sequence[int] | None) -> list[int]:
    depth = len(calls)
    if layers is None:
        total = sum(4 * int(np.prod(call.shape)) for call in calls)
        return list(range(depth)) if total <= HEADS_BYTES else [depth - 1]
    if not layers:
        raise UserError("explain needs at least one layer to show")
    for layer in layers:
        if not -depth <= layer < depth:
            raise UserError(f"there is no layer {layer}: the model has {depth}, 0 to {depth - 1}")
    return sorted({layer % depth for layer in layers})
