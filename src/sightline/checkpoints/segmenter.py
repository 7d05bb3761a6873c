"""Segmenter as its original repository stores it (arXiv 2105.05633)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from sightline.checkpoints.vit_kinds import PLAIN, OriginalViT
from sightline.layout import Rule, Shapes, one, same


class OriginalSegmenter(OriginalViT):
    """A Vision Transformer under `encoder`, whose own classifiers compute nothing, and a decoder.

    The repository gives the mask transformer one head for every 64 channels.
    """

    task = "segment"
    resample = "bilinear"
    wanted: ClassVar[Mapping[str, Any]] = {
        name: value
        for name, value in PLAIN.items()
        if name not in ("fc_norm", "global_pool", "pre_logits", "distilled", "distillation_token")
    } | {"activation": "gelu", "qkv_bias": True}
    dropped = r"encoder\.head(_dist)?\.(weight|bias)"

    def recognises(self, shapes: Shapes) -> bool:
        return "encoder.cls_token" in shapes and ("decoder.cls_emb" in shapes or "decoder.head.weight" in shapes)

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        inner = {name.removeprefix("encoder."): shape for name, shape in shapes.items() if name.startswith("encoder.")}
        encoder = Shapes(inner, shapes.where, lambda name: shapes.named(f"encoder.{name}"))
        distilled = "dist_token" in encoder
        masks = "decoder.cls_emb" in shapes
        classes = shapes.of("decoder.cls_emb", 3)[1] if masks else shapes.of("decoder.head.weight", 2)[0]
        return {
            **super().measure(encoder, image_size),
            "distillation_token": distilled,
            "norm_eps": 1e-5,
            "partial_patches": "pad",
            "patches": encoder.of("pos_embed", 3)[1] - 1 - distilled,
            "decoder": "mask" if masks else "linear",
            "decoder_layers": shapes.count(r"decoder\.blocks\.(\d+)\.") if masks else 2,
            "num_classes": classes,
        }

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = [
            *same("backbone.tokenizer.projection", "patch_embed.proj"),
            one("backbone.place.class_token", "cls_token"),
            *self.place(backbone),
        ]
        for i in range(backbone.depth):
            rules += self.layer(f"backbone.encoder.blocks.{i}", f"blocks.{i}", backbone)
        rules += same("backbone.norm", "norm")
        rules = [
            Rule(rule.ours, tuple(f"encoder.{name}" for name in rule.theirs), rule.load, rule.save) for rule in rules
        ]
        if head.decoder == "linear":
            return rules + same("head.classifier", "decoder.head")
        for i in range(head.decoder_layers):
            rules += self.layer(f"head.decoder.blocks.{i}", f"decoder.blocks.{i}", backbone)
        return [
            *rules,
            *same("head.projection", "decoder.proj_dec"),
            one("head.class_tokens", "decoder.cls_emb"),
            *same("head.norm", "decoder.decoder_norm"),
            one("head.patch_projection", "decoder.proj_patch"),
            one("head.class_projection", "decoder.proj_classes"),
            *same("head.mask_norm", "decoder.mask_norm"),
        ]

    def place(self, backbone: Any) -> list[Rule]:
        token = [one("backbone.place.distillation_token", "dist_token")] if backbone.distillation_token else []
        return [*super().place(backbone), *token]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        settings = {**vars(head), **vars(backbone)}
        wanted = {**self.wanted, "norm_eps": 1e-5, "partial_patches": "pad", "cells": 1}
        refused = [
            f"{name}={settings[name]!r} (only {only!r})" for name, only in wanted.items() if settings[name] != only
        ]
        if head.norm_eps != 1e-5:
            refused.append(f"norm_eps={head.norm_eps:g} of the head (only 1e-05)")
        usual = max(backbone.embed_dim // 64, 1)
        if head.decoder == "mask" and head.decoder_heads not in (None, usual):
            refused.append(f"decoder_heads={head.decoder_heads} of the head (only {usual})")
        return refused


LAYOUTS = {"original/segmenter": OriginalSegmenter()}
