"""Vision Transformers (arXiv 2010.11929) under torchvision's names, with the pixels that its weights expect."""

from sightline.backbones.vit_variants import SIZES
from sightline.registry import Variant

_SIZES = {size[0]: SIZES[size] for size in ("base", "large", "huge")}


def _row(size: str, patch: int, parameters: int, short: int, interpolation: str) -> Variant:
    return Variant(
        family="vit",
        parameters=parameters,
        paper="2010.11929",
        settings={
            **_SIZES[size],
            "patch_size": patch,
            "image_size": 224,
            "partial_patches": "drop",
            "position_resample": "bicubic_corners",
        },
        preprocess={
            "crop_pct": 224 / short,
            "interpolation": interpolation,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        sources=("torchvision",),
    )


VARIANTS = {
    f"vit_{size}_{patch}": _row(size, patch, parameters, short, interpolation)
    for size, patch, parameters, short, interpolation in [
        ("b", 16, 86_567_656, 256, "bilinear"),
        ("b", 32, 88_224_232, 256, "bilinear"),
        ("l", 16, 304_326_632, 242, "bilinear"),
        ("l", 32, 306_535_400, 256, "bilinear"),
        ("h", 14, 632_045_800, 224, "bicubic"),
    ]
}

SMALL = {
    "torchvision_vit": (
        "vit_b_16",
        {"image_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    )
}
