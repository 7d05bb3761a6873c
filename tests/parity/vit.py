"""The Vision Transformer of the paper: timm, transformers, and Google's files by their formulas."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import zoom
from transformers import ViTConfig, ViTForImageClassification

from google_reference import big_vision, google_arrays, google_logits
from parity import VIEWS, Case, Made
from vit_references import SIZES, hub_cases, pixels_of, stretching, timm_cases

_TABLE = "Transformer/posembed_input/pos_embedding"


def _google(view: str, prefix: str | None) -> Callable[[Path], Made]:
    """A file of the original code, or with a prefix of big_vision; the original zooms its table of positions."""

    def write(folder: Path) -> Made:
        size, path = SIZES[view], folder / "weights.npz"
        made_for = (32, 32) if view == "other size" else size
        grid, new = ((side[0] // 8, side[1] // 8) for side in (made_for, size))
        arrays = google_arrays(grid)
        np.savez(path, **(arrays if prefix is None else big_vision(arrays, prefix)))
        plane = arrays[_TABLE][0, 1:].reshape(*grid, -1)
        plane = zoom(plane, (new[0] / grid[0], new[1] / grid[1], 1), order=1).reshape(1, new[0] * new[1], -1)
        stretched = {**arrays, _TABLE: np.concatenate([arrays[_TABLE][:, :1], plane], axis=1)}
        pixels = pixels_of(size)
        return Made(path, {"image_size": size, "source_size": made_for}, pixels, google_logits(stretched, pixels))

    return write


CASES = [
    *timm_cases("vit", "timm/vit", "vit_tiny_patch16_224"),
    *hub_cases(
        "vit",
        "transformers/vit",
        ViTForImageClassification,
        ViTConfig,
        lambda model, pixels, stretched: stretching(model, pixels, stretched).logits,
        intermediate_size=40,
    ),
    *(Case("vit", "google", view, "google/vit", _google(view, None)) for view in VIEWS),
    *(Case("vit", "big_vision", view, "big_vision/vit", _google(view, "params/")) for view in VIEWS),
]
