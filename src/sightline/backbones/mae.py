"""The encoders of masked autoencoders (arXiv 2111.06377): Vision Transformers whose positions are not learned."""

from sightline.backbones.vit_variants import SIZES
from sightline.registry import Variant


def _row(size: str, patch: int, parameters: int) -> Variant:
    return Variant(
        family="vit",
        parameters=parameters,
        paper="2111.06377",
        settings={
            **SIZES[size],
            "patch_size": patch,
            "image_size": 224,
            "positions": "sincos2d",
            "position_resample": "bicubic",
        },
        preprocess={
            "crop_pct": 224 / 256,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        num_classes=0,
        sources=("transformers", "original"),  # timm's files name the plain ViT that they fit
    )


VARIANTS = {
    f"mae_vit_{size}_patch{patch}_224": _row(size, patch, parameters)
    for size, patch, parameters in [("base", 16, 85_798_656), ("large", 16, 303_301_632), ("huge", 14, 630_764_800)]
}

SMALL = {
    "mae": (
        "mae_vit_base_patch16_224",
        {"image_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    )
}
