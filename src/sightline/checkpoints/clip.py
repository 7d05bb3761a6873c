"""CLIP as OpenAI and open_clip store it: one flat table for both towers."""

from collections.abc import Mapping
from typing import Any, ClassVar

from einops import rearrange

from sightline.checkpoints.measure import divides
from sightline.checkpoints.vit_kinds import PLAIN
from sightline.layout import Layout, Rule, Shapes, one, same, transposed

WANTED: Mapping[str, Any] = {
    name: value for name, value in PLAIN.items() if name not in ("fc_norm", "global_pool", "pre_logits", "distilled")
} | {"pre_norm": True, "patch_bias": False, "qkv_bias": True}
"""The settings of the image tower that have one value in CLIP."""

_HEAD_WIDTH = 64
"""Channels of an attention head in every CLIP; no file tells how many heads there are."""


def vector(ours: str, theirs: str, axes: str) -> Rule:
    """A tensor of ours that has leading axes of one besides those of theirs, which `axes` names."""
    outer = f"{axes} -> {' '.join('1' * (3 - len(axes.split())))} {axes}"
    inner = " -> ".join(reversed(outer.split(" -> ")))
    return Rule((ours,), (theirs,), lambda t: (rearrange(t, outer),), lambda t: (rearrange(t, inner),))


def refused(backbone: Any, head: Any) -> list[str]:
    """What no library's CLIP can be, as phrases."""
    found = [
        f"{name}={getattr(backbone, name)!r} (only {only!r})"
        for name, only in WANTED.items()
        if getattr(backbone, name) != only
    ]
    if backbone.partial_patches == "pad" and not divides(backbone):
        found.append("partial_patches='pad' at an image size that patches do not divide (only 'drop')")
    return found


class FlatClip(Layout):
    """Query, key and value in one matrix, projections for multiplication from the right, the image tower as `visual`.

    OpenAI's own files carry three numbers beside the weights. No tensor tells whether the activation is QuickGELU, as
    in OpenAI's networks, or the exact GELU, as in most of LAION's: a name or a configuration has to say it.
    """

    libraries = ("openai", "open_clip")
    family = "vit"
    task = "clip"
    dropped = r"input_resolution|context_length|vocab_size|(.*\.)?attn_mask"
    former: ClassVar[Mapping[str, str]] = {r"^text\.(?=transformer|token_|positional|ln_final|text_projection)": ""}
    untold = ("activation",)
    habits = ("norm_eps", "position_resample")

    def recognises(self, shapes: Shapes) -> bool:
        return "visual.class_embedding" in shapes and "visual.conv1.weight" in shapes

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        kernel = shapes.of("visual.conv1.weight", 4)
        length, width = shapes.of("positional_embedding", 2)
        return {
            **WANTED,
            "embed_dim": kernel[0],
            "in_chans": kernel[1],
            "patch_size": kernel[2:],
            "depth": shapes.count(r"visual\.transformer\.resblocks\.(\d+)\."),
            "num_heads": max(kernel[0] // _HEAD_WIDTH, 1),
            "mlp_dim": shapes.of("visual.transformer.resblocks.0.mlp.c_fc.bias", 1)[0],
            "norm_eps": 1e-5,
            "position_resample": "bicubic_antialias",
            "partial_patches": "drop",
            "projection_dim": shapes.of("text_projection", 2)[1],
            "context_length": length,
            "vocab_size": shapes.of("token_embedding.weight", 2)[0],
            "text_width": width,
            "text_depth": shapes.count(r"transformer\.resblocks\.(\d+)\."),
            "text_heads": max(width // _HEAD_WIDTH, 1),
            "text_mlp_dim": shapes.of("transformer.resblocks.0.mlp.c_fc.bias", 1)[0],
            "text_norm_eps": 1e-5,
            "eos_token_id": None,
            "logit_bias_init": 0.0 if "logit_bias" in shapes else None,
            "patches": shapes.of("visual.positional_embedding", 2)[0] - 1,
        }

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Both towers have the same activation."""
        return {"text_activation": settings["activation"], **settings}

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = [
            *same("backbone.tokenizer.projection", "visual.conv1", False),
            vector("backbone.place.class_token", "visual.class_embedding", "d"),
            vector("backbone.place.positions.table", "visual.positional_embedding", "n d"),
            *same("backbone.pre_norm", "visual.ln_pre"),
            *self._layers("backbone.encoder.blocks", "visual.transformer.resblocks", backbone.depth),
            *same("backbone.norm", "visual.ln_post"),
            Rule(("head.projection.weight",), ("visual.proj",), transposed, transposed),
            *same("head.text.embedding", "token_embedding", False),
            one("head.text.positions", "positional_embedding"),
            *self._layers("head.text.encoder.blocks", "transformer.resblocks", head.text_depth),
            *same("head.text.norm", "ln_final"),
            Rule(("head.text_projection.weight",), ("text_projection",), transposed, transposed),
            one("head.logit_scale", "logit_scale"),
        ]
        return rules + [one("head.logit_bias", "logit_bias")] * (head.logit_bias_init is not None)

    def _layers(self, ours: str, theirs: str, depth: int) -> list[Rule]:
        rules = []
        for i in range(depth):
            mine, yours = f"{ours}.{i}", f"{theirs}.{i}"
            rules += [
                *same(f"{mine}.norm1", f"{yours}.ln_1"),
                one(f"{mine}.attention.qkv.weight", f"{yours}.attn.in_proj_weight"),
                one(f"{mine}.attention.qkv.bias", f"{yours}.attn.in_proj_bias"),
                *same(f"{mine}.attention.out", f"{yours}.attn.out_proj"),
                *same(f"{mine}.norm2", f"{yours}.ln_2"),
                *same(f"{mine}.mlp.fc1", f"{yours}.mlp.c_fc"),
                *same(f"{mine}.mlp.fc2", f"{yours}.mlp.c_proj"),
            ]
        return rules

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        found = refused(backbone, head)
        for name, value in (("norm_eps", backbone.norm_eps), ("text_norm_eps", head.text_norm_eps)):
            found += [] if value == 1e-5 else [f"{name}={value:g} (only 1e-05)"]
        if head.text_activation != backbone.activation:
            found.append(f"text_activation={head.text_activation!r} beside activation={backbone.activation!r}")
        if head.eos_token_id not in (None, head.vocab_size - 1):
            found.append(f"eos_token_id={head.eos_token_id} (only the highest)")
        return found

    def remarks(self, backbone: Any, head: Any) -> list[str]:
        told = []
        heads = {
            "num_heads": (backbone.num_heads, backbone.embed_dim),
            "text_heads": (head.text_heads, head.text_width),
        }
        for name, (count, width) in heads.items():
            if count != width // _HEAD_WIDTH:
                told.append(f"a bare file does not tell {name}={count}")
        return told


LAYOUTS: Mapping[str, Layout] = {"openai/clip": FlatClip()}
