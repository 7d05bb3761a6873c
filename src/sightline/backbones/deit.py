"""DeiT (arXiv 2012.12877), with and without its distillation token, and DeiT III (arXiv 2204.07118)."""

from typing import Any

from sightline.backbones.vit_variants import SIZES
from sightline.registry import Variant

_SIZES = {**SIZES, "medium": {"embed_dim": 512, "depth": 12, "num_heads": 8}}
_THIRD = {"class_position": False, "init_values": 1e-6}


def _row(size: str, patch: int, image: int, parameters: int, paper: str, **more: Any) -> Variant:
    distilled = more.get("distillation_token", False)
    return Variant(
        family="vit",
        parameters=parameters,
        paper=paper,
        settings={**_SIZES[size], "patch_size": patch, "image_size": image, **more},
        head={"distilled": True} if distilled else {},
        preprocess={
            "crop_pct": 0.9 if image == 224 else 1.0,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        sources=("timm", "original") if more == _THIRD else ("timm", "transformers", "original"),
    )


VARIANTS = {
    **{
        f"deit_{size}_patch16_{image}": _row(size, 16, image, parameters, "2012.12877")
        for size, image, parameters in [
            ("tiny", 224, 5_717_416),
            ("small", 224, 22_050_664),
            ("base", 224, 86_567_656),
            ("base", 384, 86_859_496),
        ]
    },
    **{
        f"deit_{size}_distilled_patch16_{image}": _row(
            size, 16, image, parameters, "2012.12877", distillation_token=True
        )
        for size, image, parameters in [
            ("tiny", 224, 5_910_800),
            ("small", 224, 22_436_432),
            ("base", 224, 87_338_192),
            ("base", 384, 87_630_032),
        ]
    },
    **{
        f"deit3_{size}_patch{patch}_{image}": _row(size, patch, image, parameters, "2204.07118", **_THIRD)
        for size, patch, image, parameters in [
            ("small", 16, 224, 22_059_496),
            ("small", 16, 384, 22_205_416),
            ("medium", 16, 224, 38_849_512),
            ("base", 16, 224, 86_585_320),
            ("base", 16, 384, 86_877_160),
            ("large", 16, 224, 304_374_760),
            ("large", 16, 384, 304_763_880),
            ("huge", 14, 224, 632_126_440),
        ]
    },
}

_LITTLE = {"image_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL = {
    "deit": ("deit_tiny_patch16_224", _LITTLE),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", _LITTLE),
    "deit3": ("deit3_small_patch16_224", _LITTLE),
}
