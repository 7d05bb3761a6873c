"""BEiT: relative positions in every layer or one table for all; three ways to stretch them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor, nn
from transformers import BeitConfig, BeitForImageClassification, BeitModel

from parity import VIEWS, Case, Made, spread
from vit_references import LITTLE, SIZES, hub_cases, pixels_of, stretching, timm_cases

NAME = "beit_base_patch16_224"


def spread_out(old: int, new: int) -> np.ndarray:
    """Where the offsets of `old` patches are put so that they reach as far as those of `new`: ever further apart."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio**i for i in range(old - 1)) > new - 1 else (ratio, high)
    away = np.cumsum([ratio**i for i in range(old - 1)])
    return np.concatenate([-away[::-1], [0], away])


def unilm_resize(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table as microsoft/unilm stretches it, by scipy: a spline over unevenly spaced offsets, head after head."""
    axes = [spread_out(a, b) for a, b in zip(old, new, strict=True)]
    wanted = [np.clip(np.arange(1 - n, n), at[0], at[-1]) for n, at in zip(new, axes, strict=True)]
    planes = table[:-3].double().numpy().reshape(2 * old[0] - 1, 2 * old[1] - 1, -1)
    heads = [RectBivariateSpline(*axes, planes[..., head], s=0)(*wanted) for head in range(planes.shape[-1])]
    return torch.cat([torch.from_numpy(np.stack(heads, axis=-1).reshape(-1, len(heads))).float(), table[-3:]])


def _original(view: str) -> Callable[[Path], Made]:
    """The original's tensors, which are timm's and, in each layer, an index."""

    def make(folder: Path) -> Made:
        size = SIZES[view]
        made_for = (32, 32) if view == "other size" else size
        model = spread(timm.create_model(NAME, img_size=made_for, num_classes=5, **LITTLE))
        tables = {name: t.clone() for name, t in model.state_dict().items() if "bias_table" in name}
        indices = {
            f"blocks.{i}.attn.relative_position_index": block.attn.relative_position_index
            for i, block in enumerate(model.blocks)
        }
        torch.save({"model": {**model.state_dict(), **indices}}, folder / "beit.pth")
        if size != made_for:
            model.set_input_size(size)
            grids = [(s[0] // 8, s[1] // 8) for s in (made_for, size)]
            stretched = {name: unilm_resize(table, *grids) for name, table in tables.items()}
            model.load_state_dict(stretched, strict=False)
        with torch.no_grad():
            expected = model(pixels_of(size))
        options = {"image_size": size, "source_size": made_for, "num_heads": 3}
        return Made(folder / "beit.pth", options, pixels_of(size), expected)

    return make


def _logits(model: nn.Module, pixels: Tensor, stretched: bool) -> Tensor:
    return stretching(model, pixels, stretched).logits


def _pooled(model: nn.Module, pixels: Tensor, stretched: bool) -> Tensor:
    return stretching(model, pixels, stretched).pooler_output


_HUB, _UNITS = "transformers/beit", {"intermediate_size": 40}
_OWN, _SHARED = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
_ONE_TABLE = {"positions": "relative_shared"}
_TOKEN = {"use_mean_pooling": False, "use_mask_token": True}
CASES = [
    *timm_cases("beit", "timm/beit", NAME),
    *timm_cases(
        "beit_shared", "timm/beit", NAME, given=_ONE_TABLE, use_rel_pos_bias=False, use_shared_rel_pos_bias=True
    ),
    *(Case("beit", "original", view, "original/beit", _original(view)) for view in VIEWS),
    *hub_cases("beit", _HUB, BeitForImageClassification, BeitConfig, _logits, **_UNITS, **_OWN),
    *hub_cases("beit_features", _HUB, BeitModel, BeitConfig, _pooled, **_UNITS, **_OWN),
    *hub_cases("beit_shared", _HUB, BeitModel, BeitConfig, _pooled, **_UNITS, **_SHARED, **_TOKEN),
]
