"""DINO's own training checkpoints; its published backbones and timm's are stored as a plain Vision Transformer."""

from collections.abc import Mapping
from typing import Any, ClassVar

from sightline.checkpoints.vit_kinds import PLAIN, OriginalViT
from sightline.layout import Shapes


class OriginalDino(OriginalViT):
    """The student or the teacher of facebookresearch/dino: a backbone, and a projection head that is left out."""

    wanted: ClassVar[Mapping[str, Any]] = {**PLAIN, "activation": "gelu", "num_classes": 0}
    resample = "bicubic_factor"
    dropped = r"head\..*"
    former: ClassVar[Mapping[str, str]] = {r"^backbone\.": ""}

    def recognises(self, shapes: Shapes) -> bool:
        return "cls_token" in shapes and any(name.startswith("head.last_layer.") for name in shapes)


LAYOUTS = {"original/dino": OriginalDino()}
