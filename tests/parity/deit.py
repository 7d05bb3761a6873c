"""DeiT: one class token or a distillation token beside it; and DeiT III."""

from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
)

from vit_references import hub_cases, stretching, timm_cases


def _logits(model: nn.Module, pixels: Tensor, stretched: bool) -> Tensor:
    return stretching(model, pixels, stretched).logits


def _pooled(model: nn.Module, pixels: Tensor, stretched: bool) -> Tensor:
    return stretching(model, pixels, stretched).pooler_output


_HUB, _UNITS = "transformers/deit", {"intermediate_size": 40}
CASES = [
    *timm_cases("deit", "timm/vit", "deit_tiny_patch16_224"),
    *timm_cases("deit_distilled", "timm/vit", "deit_tiny_distilled_patch16_224"),
    *timm_cases("deit3", "timm/vit", "deit3_small_patch16_224"),
    *hub_cases("deit", _HUB, DeiTForImageClassification, DeiTConfig, _logits, **_UNITS),
    *hub_cases("deit_distilled", _HUB, DeiTForImageClassificationWithTeacher, DeiTConfig, _logits, **_UNITS),
    *hub_cases("deit_features", _HUB, DeiTModel, DeiTConfig, _pooled, **_UNITS),
]
