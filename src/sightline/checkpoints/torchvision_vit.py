"""torchvision's `VisionTransformer`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from sightline.checkpoints.vit_kinds import PLAIN, unlike
from sightline.layout import Layout, Rule, Shapes, one, same

_WANTED = {name: value for name, value in PLAIN.items() if name != "pre_logits"} | {
    **{"activation": "gelu", "qkv_bias": True, "partial_patches": "drop", "norm_eps": 1e-6}
}


class TorchvisionViT(Layout):
    """Layers counted in full names, attention as the framework's own module has it, positions with aligned corners."""

    libraries = ("torchvision",)
    family = "vit"
    untold = ("num_heads",)
    former: ClassVar[Mapping[str, str]] = {r"\.mlp\.linear_1\.": ".mlp.0.", r"\.mlp\.linear_2\.": ".mlp.3."}

    def recognises(self, shapes: Shapes) -> bool:
        return "encoder.layers.encoder_layer_0.ln_1.weight" in shapes and "conv_proj.weight" in shapes

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        kernel = shapes.of("conv_proj.weight", 4)
        return {
            **_WANTED,
            "embed_dim": kernel[0],
            "in_chans": kernel[1],
            "patch_size": kernel[2:],
            "depth": shapes.count(r"encoder\.layers\.encoder_layer_(\d+)\."),
            "mlp_dim": shapes.of("encoder.layers.encoder_layer_0.mlp.0.bias", 1)[0],
            "position_resample": "bicubic_corners",
            "num_classes": shapes.outputs("heads.head.bias"),
            "pre_logits": shapes.outputs("heads.pre_logits.bias") or None,
            "patches": shapes.of("encoder.pos_embedding", 3)[1] - 1,
        }

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = [
            *same("backbone.tokenizer.projection", "conv_proj"),
            one("backbone.place.class_token", "class_token"),
            one("backbone.place.positions.table", "encoder.pos_embedding"),
        ]
        for i in range(backbone.depth):
            rules += _layer(f"backbone.encoder.blocks.{i}", f"encoder.layers.encoder_layer_{i}")
        rules += same("backbone.norm", "encoder.ln")
        rules += same("head.pre_logits", "heads.pre_logits") if head.pre_logits is not None else []
        return rules + (same("head.classifier", "heads.head") if head.num_classes else [])

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        wanted = {name: value for name, value in _WANTED.items() if name != "partial_patches"}
        sides = {*backbone.image_size}, {*backbone.patch_size}
        refused = unlike(backbone, head, wanted)
        if backbone.partial_patches == "drop" and any(
            side % patch for side, patch in zip(backbone.image_size, backbone.patch_size, strict=True)
        ):
            refused.append("an image size that patches do not divide")
        if not head.num_classes:
            refused.append("num_classes=0 (a classifier is always there)")
        return refused + ["images or patches of unequal sides"] * any(len(lengths) > 1 for lengths in sides)


def _layer(ours: str, theirs: str) -> list[Rule]:
    return [
        *same(f"{ours}.norm1", f"{theirs}.ln_1"),
        one(f"{ours}.attention.qkv.weight", f"{theirs}.self_attention.in_proj_weight"),
        one(f"{ours}.attention.qkv.bias", f"{theirs}.self_attention.in_proj_bias"),
        *same(f"{ours}.attention.out", f"{theirs}.self_attention.out_proj"),
        *same(f"{ours}.norm2", f"{theirs}.ln_2"),
        *same(f"{ours}.mlp.fc1", f"{theirs}.mlp.0"),
        *same(f"{ours}.mlp.fc2", f"{theirs}.mlp.3"),
    ]


LAYOUTS = {"torchvision/vit": TorchvisionViT()}
