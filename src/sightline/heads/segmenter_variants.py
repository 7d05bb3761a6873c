"""The published Segmenters (arXiv 2105.05633, table 1), for the 150 classes of ADE20K."""

from sightline.registry import Variant


def _row(width: int, depth: int, heads: int, size: int, decoder: str, parameters: int) -> Variant:
    return Variant(
        family="vit",
        parameters=parameters,
        paper="2105.05633",
        settings={
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "image_size": size,
            "norm_eps": 1e-5,
            "position_resample": "bilinear",
        },
        head={"decoder": decoder},
        preprocess={"resize": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"},
        num_classes=150,
        sources=("original",),
        task="segment",
    )


VARIANTS = {
    "segmenter_tiny_patch16_512": _row(192, 12, 3, 512, "mask", 6_713_388),
    "segmenter_small_patch16_512": _row(384, 12, 6, 512, "mask", 26_033_964),
    "segmenter_base_patch16_512": _row(768, 12, 12, 512, "mask", 102_497_580),
    "segmenter_large_patch16_640": _row(1024, 24, 16, 640, "mask", 333_234_476),
    "segmenter_tiny_patch16_512_linear": _row(192, 12, 3, 512, "linear", 5_712_342),
    "segmenter_small_patch16_512_linear": _row(384, 12, 6, 512, "linear", 22_041_366),
    "segmenter_base_patch16_512_linear": _row(768, 12, 12, 512, "linear", 86_549_910),
    "segmenter_large_patch16_640_linear": _row(1024, 24, 16, 640, "linear", 304_893_078),
}
