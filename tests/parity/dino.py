"""DINO: the teacher of a training checkpoint, and a backbone alone, at three sizes as the original stretches it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from parity import Case, Made
from vit_references import timm_cases

GOLDEN = Path(__file__).parents[1] / "data" / "goldens" / "dino-backbone"
LABELS = {"square": "square", "non-square": "wide", "other size": "larger"}


def _golden(file: str, view: str, **options: Any) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        case, io = json.loads((GOLDEN / "case.json").read_text()), load_file(GOLDEN / "io.safetensors")
        pixels, expected = io[f"input.{LABELS[view]}"], io[f"output.class_{LABELS[view]}"]
        size = (pixels.shape[-2], pixels.shape[-1])
        heads = case["configuration"]["num_heads"]
        return Made(
            GOLDEN / file, {"image_size": size, "source_size": 40, "num_heads": heads, **options}, pixels, expected
        )

    return make


_STRETCH = {"position_resample": "bicubic_factor"}
CASES = [
    *(Case("dino", "original", v, "original/dino", _golden("checkpoint.pth", v)) for v in LABELS),
    *(Case("dino_backbone", "original", v, "timm/vit", _golden("weights.safetensors", v, **_STRETCH)) for v in LABELS),
    *timm_cases("dino", "timm/vit", "vit_small_patch8_224", classes=0),
]
