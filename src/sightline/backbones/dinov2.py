"""DINOv2 (arXiv 2304.07193), and the same with registers (arXiv 2309.16588).

timm's networks with registers have added the position of the class token to it; the original repository's names stand
for networks as it stores them, with that row and with the mask token of pre-training.
"""

from typing import Any

from sightline.backbones.vit_variants import SIZES
from sightline.registry import Variant

_SIZES: dict[str, dict[str, Any]] = {
    **SIZES,
    "giant": {
        **{"embed_dim": 1536, "depth": 40, "num_heads": 24},
        **{"mlp": "swiglu", "mlp_ratio": 2 * 2.66667, "activation": "silu"},
    },
}


def _row(size: str, parameters: int, paper: str, crop: float, sources: tuple[str, ...], **more: Any) -> Variant:
    return Variant(
        family="vit",
        parameters=parameters,
        paper=paper,
        settings={**_SIZES[size], "patch_size": 14, "image_size": 518, "init_values": 1e-5, **more},
        preprocess={
            "crop_pct": crop,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        num_classes=0,
        sources=sources,
    )


_FIRST, _SECOND = "2304.07193", "2309.16588"
VARIANTS = {
    **{
        f"vit_{size}_patch14_dinov2": _row(size, parameters, _FIRST, 1.0, ("timm",))
        for size, parameters in [
            ("small", 22_056_192),
            ("base", 86_579_712),
            ("large", 304_367_616),
            ("giant", 1_136_479_232),
        ]
    },
    **{
        f"vit_{size}_patch14_reg4_dinov2": _row(
            size, parameters, _SECOND, 1.0, ("timm",), reg_tokens=4, class_position=False
        )
        for size, parameters in [
            ("small", 22_057_344),
            ("base", 86_582_016),
            ("large", 304_370_688),
            ("giant", 1_136_483_840),
        ]
    },
    **{
        f"dinov2_vit{size[0]}14": _row(
            size,
            parameters,
            _FIRST,
            1.0,
            ("original", "transformers"),
            mask_token=True,
            position_resample="bicubic_factor",
        )
        for size, parameters in [
            ("small", 22_056_576),
            ("base", 86_580_480),
            ("large", 304_368_640),
            ("giant", 1_136_480_768),
        ]
    },
    **{
        f"dinov2_vit{size[0]}14_reg": _row(
            size, parameters, _SECOND, 1.0, ("original", "transformers"), mask_token=True, reg_tokens=4
        )
        for size, parameters in [
            ("small", 22_058_112),
            ("base", 86_583_552),
            ("large", 304_372_736),
            ("giant", 1_136_486_912),
        ]
    },
}

_LITTLE = {"image_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL = {
    "dinov2": ("vit_small_patch14_dinov2", _LITTLE),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", _LITTLE),
    "dinov2_giant": ("vit_giant_patch14_dinov2", _LITTLE),
}
