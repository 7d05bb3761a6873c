"""BEiT (arXiv 2106.08254): relative positions in every layer, keys without a bias, layer scale."""

from sightline.registry import Variant

_SIZES = {
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "init_values": 0.1},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5},
}


def _row(size: str, image: int, parameters: int) -> Variant:
    half = (0.5, 0.5, 0.5)
    return Variant(
        family="vit",
        parameters=parameters,
        paper="2106.08254",
        settings={
            **_SIZES[size],
            "patch_size": 16,
            "image_size": image,
            "key_bias": False,
            "positions": "relative",
            "position_resample": "geometric_linear",
        },
        head={"global_pool": "avg"},
        preprocess={"crop_pct": 0.9 if image == 224 else 1.0, "interpolation": "bicubic", "mean": half, "std": half},
        sources=("timm", "transformers", "original"),
    )


VARIANTS = {
    f"beit_{size}_patch16_{image}": _row(size, image, parameters)
    for size, image, parameters in [
        ("base", 224, 86_530_984),
        ("base", 384, 86_744_104),
        ("large", 224, 304_430_568),
        ("large", 384, 304_998_888),
        ("large", 512, 305_674_728),
    ]
}

SMALL = {
    "beit": (
        "beit_base_patch16_224",
        {"image_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    )
}
