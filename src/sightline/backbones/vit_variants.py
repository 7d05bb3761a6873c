"""Every published size of the plain Vision Transformer (arXiv 2010.11929), and a few of our own."""

from typing import Any

from sightline.registry import Variant

SMALL = {"vit": ("vit_femto_patch4_32", {"image_size": (32, 48), "embed_dim": 24, "num_heads": 3})}

SIZES: dict[str, dict[str, Any]] = {
    # Sizes of our own, for small images and few of them.
    "femto": {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
    "pico": {"embed_dim": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0},
    "nano": {"embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}


def _row(size: str, patch: int, image: int, parameters: int) -> Variant:
    half = (0.5, 0.5, 0.5)
    return Variant(
        family="vit",
        parameters=parameters,
        paper="2010.11929",
        settings={**SIZES[size], "patch_size": patch, "image_size": image},
        preprocess={"crop_pct": 0.9 if image == 224 else 1.0, "interpolation": "bicubic", "mean": half, "std": half},
        sources=("timm", "transformers", "google") if image >= 224 else (),
    )


VARIANTS = {
    f"vit_{size}_patch{patch}_{image}": _row(size, patch, image, parameters)
    for size, patch, image, parameters in [
        ("femto", 4, 32, 139_432),
        ("pico", 4, 32, 206_376),
        ("nano", 4, 32, 938_856),
        ("tiny", 16, 224, 5_717_416),
        ("tiny", 16, 384, 5_790_376),
        ("small", 32, 224, 22_878_952),
        ("small", 32, 384, 22_915_432),
        ("small", 16, 224, 22_050_664),
        ("small", 16, 384, 22_196_584),
        ("base", 32, 224, 88_224_232),
        ("base", 32, 384, 88_297_192),
        ("base", 16, 224, 86_567_656),
        ("base", 16, 384, 86_859_496),
        ("base", 8, 224, 86_576_872),
        ("large", 32, 224, 306_535_400),
        ("large", 32, 384, 306_632_680),
        ("large", 16, 224, 304_326_632),
        ("large", 16, 384, 304_715_752),
        ("large", 14, 224, 304_203_752),
        ("huge", 14, 224, 632_045_800),
    ]
}
