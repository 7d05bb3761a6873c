"""CLIP (arXiv 2103.00020) under open_clip's names, and its image towers alone under timm's.

Names that end in `-quickgelu` are the networks that OpenAI published; those without are the same with the exact GELU,
as LAION and DataComp trained them.
"""

from typing import Any

from sightline.backbones.vit_variants import SIZES
from sightline.registry import Variant

_PAPER = "2103.00020"
_PIXELS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_TEXTS: dict[str, dict[str, Any]] = {
    "base": {"projection_dim": 512, "text_width": 512, "text_heads": 8},
    "large": {"projection_dim": 768, "text_width": 768, "text_heads": 12},
}


def _tower(size: str, patch: int, image: int, activation: str) -> dict[str, Any]:
    return {
        **SIZES[size],
        **{"patch_size": patch, "image_size": image, "activation": activation, "norm_eps": 1e-5},
        **{"pre_norm": True, "patch_bias": False, "partial_patches": "drop"},
    }


def _pair(size: str, patch: int, image: int, parameters: int, activation: str) -> Variant:
    return Variant(
        family="vit",
        parameters=parameters,
        paper=_PAPER,
        settings=_tower(size, patch, image, activation),
        head={**_TEXTS[size], "text_activation": activation},
        preprocess={"crop_pct": 1.0, "interpolation": "bicubic", **_PIXELS},
        sources=("openai", "open_clip", "transformers"),
        task="clip",
    )


def _image(size: str, patch: int, image: int, parameters: int, activation: str, classes: int, crop: float) -> Variant:
    pixels = _PIXELS if activation == "quick_gelu" or size == "base" else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return Variant(
        family="vit",
        parameters=parameters,
        paper=_PAPER,
        settings=_tower(size, patch, image, activation),
        preprocess={"crop_pct": crop, "interpolation": "bicubic", **pixels},
        num_classes=classes,
        sources=("timm",),
    )


_ROWS = {
    "ViT-B-32": ("base", 32, 224, 151_277_313),
    "ViT-B-16": ("base", 16, 224, 149_620_737),
    "ViT-L-14": ("large", 14, 224, 427_616_513),
    "ViT-L-14-336": ("large", 14, 336, 427_944_193),
}

VARIANTS = {
    **{f"{name}-quickgelu": _pair(*row, "quick_gelu") for name, row in _ROWS.items()},
    **{name: _pair(*row, "gelu") for name, row in _ROWS.items()},
    **{
        f"vit_{size}_patch{patch}_clip_{image}": _image(size, patch, image, parameters, "gelu", 1000, crop)
        for size, patch, image, parameters, crop in [
            ("base", 32, 224, 88_225_000, 0.9),
            ("base", 16, 224, 86_568_424, 0.95),
            ("large", 14, 224, 304_204_776, 1.0),
            ("large", 14, 336, 304_532_456, 1.0),
        ]
    },
    **{
        f"vit_{size}_patch{patch}_clip_quickgelu_{image}": _image(
            size, patch, image, parameters, "quick_gelu", classes, crop
        )
        for size, patch, image, parameters, classes, crop in [
            ("base", 32, 224, 87_849_728, 512, 0.9),
            ("base", 16, 224, 86_193_152, 512, 1.0),
            ("large", 14, 224, 303_966_976, 768, 1.0),
            ("large", 14, 336, 304_294_656, 768, 1.0),
        ]
    },
}
