"""T2T-ViT as its original repository stores it (arXiv 2101.11986)."""

from typing import Any

import torch
from torch import Tensor

from sightline.checkpoints.vit_kinds import PLAIN, OriginalViT, unlike
from sightline.layout import Rule, Shapes, one, same
from sightline.tokenizers.t2t import options

_MODULE = "tokens_to_token"


class OriginalT2T(OriginalViT):
    """`tokens_to_token` before the blocks of a Vision Transformer; sinusoids and random features lie in the file.

    The performer's three projections share one matrix whose rows are in the order key, query, value.
    """

    resample = "bicubic"
    wanted = dict(PLAIN) | {
        "tokenizer": "t2t",
        "positions": "sincos1d",
        "qkv_bias": False,
        "norm_eps": 1e-5,
        "activation": "gelu",
    }

    def recognises(self, shapes: Shapes) -> bool:
        return f"{_MODULE}.project.weight" in shapes

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        width, windows = shapes.of(f"{_MODULE}.project.weight", 2)
        attention = "performer" if f"{_MODULE}.attention1.w" in shapes else "transformer"
        return {
            **self.wanted,
            "tokenizer_options": options(attention, windows // 9),
            "in_chans": shapes.of(f"{_MODULE}.attention1.norm1.weight", 1)[0] // 49,
            "patch_size": (16, 16),
            "partial_patches": "drop",
            "embed_dim": width,
            "depth": shapes.count(r"blocks\.(\d+)\."),
            "mlp_dim": shapes.of("blocks.0.mlp.fc1.weight", 2)[0],
            "position_resample": self.resample,
            "num_classes": shapes.outputs("head.bias"),
            "patches": shapes.of("pos_embed", 3)[1] - 1,
        }

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        exact = backbone.tokenizer_options.get("attention") == "transformer"
        rules = [
            one("backbone.place.class_token", "cls_token"),
            *self.place(backbone),
            *(rule for name in ("attention1", "attention2") for rule in (_exact if exact else _performer)(name)),
            *same("backbone.tokenizer.projection", f"{_MODULE}.project"),
            *same("backbone.norm", "norm"),
        ]
        for i in range(backbone.depth):
            rules += self.layer(f"backbone.encoder.blocks.{i}", f"blocks.{i}", backbone)
        return rules + (same("head.classifier", "head") if head.num_classes else [])

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        return unlike(backbone, head, self.wanted)


def _exact(name: str) -> list[Rule]:
    ours, theirs = f"backbone.tokenizer.{name}", f"{_MODULE}.{name}"
    return [
        *same(f"{ours}.qkv", f"{theirs}.attn.qkv", bias=False),
        *same(f"{ours}.out", f"{theirs}.attn.proj"),
        *same(f"{ours}.norm1", f"{theirs}.norm1"),
        *same(f"{ours}.norm2", f"{theirs}.norm2"),
        *same(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1"),
        *same(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2"),
    ]


def _performer(name: str) -> list[Rule]:
    ours, theirs = f"backbone.tokenizer.{name}", f"{_MODULE}.{name}"
    qkv = [(f"{ours}.qkv.{part}", f"{theirs}.kqv.{part}") for part in ("weight", "bias")]
    return [
        one(f"{ours}.features", f"{theirs}.w"),
        *(Rule((mine,), (other,), _exchanged, _exchanged) for mine, other in qkv),
        *same(f"{ours}.out", f"{theirs}.proj"),
        *same(f"{ours}.norm1", f"{theirs}.norm1"),
        *same(f"{ours}.norm2", f"{theirs}.norm2"),
        *same(f"{ours}.mlp.fc1", f"{theirs}.mlp.0"),
        *same(f"{ours}.mlp.fc2", f"{theirs}.mlp.2"),
    ]


def _exchanged(rows: Tensor) -> tuple[Tensor]:
    """The first two thirds exchanged: query, key, value from key, query, value, and back."""
    first, second, third = rows.chunk(3)
    return (torch.cat([second, first, third]),)


LAYOUTS = {"original/t2t": OriginalT2T()}
