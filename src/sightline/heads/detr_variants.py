"""The published DETRs (arXiv 2005.12872, table 1), for the 91 numbers that COCO gives its classes."""

from typing import Any

from sightline.registry import Variant


def _row(layers: tuple[int, ...], parameters: int, **settings: Any) -> Variant:
    return Variant(
        family="resnet",
        parameters=parameters,
        paper="2005.12872",
        settings={"block": "bottleneck", "layers": layers, "frozen_norm": True, "image_size": (800, 1066), **settings},
        preprocess={
            "resize": "native",
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        num_classes=91,
        sources=("original", "transformers"),
        task="detect",
    )


VARIANTS = {
    "detr_resnet50": _row((3, 4, 6, 3), 41_524_768),
    "detr_resnet50_dc5": _row((3, 4, 6, 3), 41_524_768, dilated=True),
    "detr_resnet101": _row((3, 4, 23, 3), 60_464_672),
    "detr_resnet101_dc5": _row((3, 4, 23, 3), 60_464_672, dilated=True),
}
