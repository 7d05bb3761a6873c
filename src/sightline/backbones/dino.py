"""DINO's backbones (arXiv 2104.14294): plain Vision Transformers, stretched to other sizes in a way of their own."""

from typing import Any

from sightline.backbones.vit_variants import SIZES
from sightline.registry import Variant


def _row(size: str, patch: int, parameters: int, crop: float, sources: tuple[str, ...], **more: Any) -> Variant:
    return Variant(
        family="vit",
        parameters=parameters,
        paper="2104.14294",
        settings={**SIZES[size], "patch_size": patch, "image_size": 224, **more},
        preprocess={
            "crop_pct": crop,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        num_classes=0,
        sources=sources,
    )


VARIANTS = {
    "vit_small_patch8_224": _row("small", 8, 21_670_272, 0.9, ("timm",)),
    **{
        f"dino_vit{size[0]}{patch}": _row(
            size, patch, parameters, 224 / 256, ("original", "transformers"), position_resample="bicubic_factor"
        )
        for size, patch, parameters in [
            ("small", 16, 21_665_664),
            ("small", 8, 21_670_272),
            ("base", 16, 85_798_656),
            ("base", 8, 85_807_872),
        ]
    },
}

SMALL = {
    "dino": ("dino_vits8", {"image_size": (32, 48), "embed_dim": 24, "depth": 2, "num_heads": 3}),
}
