"""DeiT as transformers stores it; timm and the original repository store it as a plain Vision Transformer."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sightline.checkpoints.vit_kinds import PLAIN, TransformersKind
from sightline.errors import UserError, printable
from sightline.layout import Rule, Shapes, one, same

_FREE = ("pre_logits", "distilled")


class TransformersDeiT(TransformersKind):
    """A class and a distillation token, always; one classifier on the first, or one on each."""

    model_type = "deit"
    base = "deit"
    outside = ("classifier.", "cls_classifier.", "distillation_classifier.")
    with_head = "DeiTForImageClassification"
    bare = "DeiTModel"
    also = ("DeiTForImageClassificationWithTeacher",)
    dropped = r"embeddings\.(mask_token|position_ids)"
    wanted: ClassVar[Mapping[str, Any]] = {name: value for name, value in PLAIN.items() if name not in _FREE} | {
        "distillation_token": True
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        **TransformersKind.defaults,
        "pooler_output_size": None,
        "pooler_act": "tanh",
    }

    def recognises(self, shapes: Shapes) -> bool:
        return "embeddings.distillation_token" in shapes

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        teacher = shapes.outputs("cls_classifier.bias")
        settings = super().measure(shapes, image_size)
        settings |= {"distilled": teacher > 0, "patches": shapes.of("embeddings.position_embeddings", 3)[1] - 2}
        settings["num_classes"] = teacher or settings["num_classes"]
        pooler = shapes.outputs("pooler.dense.bias")
        return settings | {"pre_logits": pooler or None if not settings["num_classes"] else None}

    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        if config["pooler_act"] != "tanh":
            raise UserError(f"{shapes.where}: pooler_act '{printable(config['pooler_act'])}' is not tanh")
        return super().told(config, shapes)

    def unused(self, shapes: Shapes) -> list[str]:
        pooler = any(shapes.outputs(f"{name}bias") for name in self.outside)  # a classifier does without it
        return super().unused(shapes) + [name for name in shapes if pooler and name.startswith("pooler.")]

    def place(self, backbone: Any) -> list[Rule]:
        return [
            *super().place(backbone),
            one("backbone.place.distillation_token", "embeddings.distillation_token"),
        ]

    def top(self, head: Any) -> list[Rule]:
        if head.distilled and head.num_classes:
            second = same("head.distillation_classifier", "distillation_classifier")
            return [*same("head.classifier", "cls_classifier"), *second]
        return super().top(head) + (same("head.pre_logits", "pooler.dense") if head.pre_logits is not None else [])

    def kind(self, backbone: Any, head: Any) -> str:
        return self.also[0] if head.distilled and head.num_classes else super().kind(backbone, head)

    def opened(self, backbone: Any, head: Any) -> dict[str, Any]:
        return {} if head.num_classes else {"add_pooling_layer": head.pre_logits is not None}

    def output(self, answer: Any, backbone: Any, head: Any) -> Tensor:
        return answer.pooler_output if head.pre_logits is not None else super().output(answer, backbone, head)

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = super().refusals(backbone, head)
        if head.pre_logits is not None and head.num_classes:
            refused.append("pre_logits before a classifier (num_classes=0 or another number of classes leaves it out)")
        if head.distilled and not head.num_classes:
            refused.append("distilled=True without classifiers (distilled=False gives the class token)")
        return refused

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        pooler = {"pooler_output_size": head.pre_logits, "pooler_act": "tanh"} if head.pre_logits else {}
        return super().config(backbone, head) | pooler


LAYOUTS = {"transformers/deit": TransformersDeiT()}
