"""timm's Vision Transformers, and whatever is stored under their names: DeiT, DINO, MAE's encoder, and many more."""

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sightline.checkpoints.measure import divides
from sightline.errors import printable
from sightline.layout import Layout, Rule, Shapes, TimmLayout, one, same
from sightline.schema import require

_PLAIN = re.compile(
    r"patch_embed\.proj\.(weight|bias)|blocks\.0\.((norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma)"
)
"""The names of the patch embedding and of the first layer, of which others have more."""

_OTHERS = ("mask_token", "decoder_", "register_tokens", "rel_pos_bias.", "head.mlp.", "head.last_layer.")
"""What the files of other kinds have besides."""

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}


class TimmViT(TimmLayout):
    """The three projections of attention in one matrix, as here; the repositories of DeiT and DINO use it too."""

    libraries = ("timm", "original")
    family = "vit"
    untold = ("num_heads",)
    habits = ()  # files of many origins have these names, and what is registered tells them apart
    same = (
        *("in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "init_values", "class_token"),
        *("reg_tokens", "pre_norm", "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    )
    at_rest: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "qk_norm": (False,),
        "scale_attn_norm": (False,),
        "scale_mlp_norm": (False,),
        "proj_bias": (True,),
        "pool_include_prefix": (False,),
        "patch_drop_rate": (0, 0.0),
        "norm_layer": ("", "layernorm"),
        "embed_norm_layer": ("",),
        "fix_init": (True, False),
        "dynamic_img_size": (True, False),
        "strict_img_size": (True, False),
        "weight_init": ("", "skip", "reset", "jax", "jax_nlhb", "moco"),
    }

    def recognises(self, shapes: Shapes) -> bool:
        first = [name for name in shapes if name.startswith(("blocks.0.", "patch_embed."))]
        plain = "patch_embed.proj.weight" in shapes and len(first) > 2 and all(map(_PLAIN.fullmatch, first))
        return plain and not any(name.startswith(_OTHERS) for name in shapes)

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        kernel = shapes.of("patch_embed.proj.weight", 4)
        hidden, inner = shapes.of("blocks.0.mlp.fc1.weight", 2)[0], shapes.of("blocks.0.mlp.fc2.weight", 2)[1]
        distillation = "dist_token" in shapes
        registers = shapes.of("reg_token", 3)[1] if "reg_token" in shapes else 0
        rows = shapes.of("pos_embed", 3)[1] if "pos_embed" in shapes else None
        grid = None if image_size is None else (image_size[0] // kernel[2]) * (image_size[1] // kernel[3])
        token = "cls_token" in shapes or rows_of_class(rows or 0, grid)
        prefix = int(token) + int(distillation)
        bare = _bare(rows or 0, prefix, grid, bool(registers))
        normed = bool({"norm_pre.weight", "norm_pre.bias"} & set(shapes))
        pooled = bool({"fc_norm.weight", "fc_norm.bias"} & set(shapes))
        return {
            "embed_dim": kernel[0],
            "in_chans": kernel[1],
            "patch_size": kernel[2:],
            "patch_bias": "patch_embed.proj.bias" in shapes or not normed,
            "depth": shapes.count(r"blocks\.(\d+)\."),
            "mlp_dim": hidden,
            "mlp": "swiglu" if hidden == 2 * inner else "mlp",
            "qkv_bias": shapes.count(r"blocks\.(\d+)\.attn\.qkv\.bias") > 0,
            "init_values": 1e-5 if shapes.count(r"blocks\.(\d+)\.ls1\.gamma") else None,
            "class_token": token,
            "distillation_token": distillation,
            "reg_tokens": registers,
            "class_position": not bare,
            "pre_norm": normed,
            "positions": "learned",
            "final_norm": not pooled,
            "global_pool": "avg" if pooled or not token else "token",
            "fc_norm": pooled,
            "distilled": distillation,
            "num_classes": shapes.outputs("head.bias"),
            "norm_eps": 1e-6,
            "position_resample": "bicubic_antialias",
            "partial_patches": "drop",
            "patches": None if rows is None else rows - (0 if bare else prefix),
        }

    def told(self, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
        rest = dict(arguments)
        pool = rest.pop("global_pool", None) or "token"
        require(pool in ("token", "avg"), f"{where}: global_pool '{printable(pool)}' has no counterpart here")
        given, final = rest.pop("fc_norm", None), rest.pop("final_norm", True)
        behind = pool == "avg" if given is None else bool(given)
        told = {"global_pool": pool, "fc_norm": bool(final) and behind, "final_norm": bool(final) and not behind}
        patch = rest.pop("patch_size", None)
        if patch is not None:
            told["patch_size"] = (patch, patch) if isinstance(patch, int) else patch
        activation = rest.pop("act_layer", None)
        if activation is not None:
            activation = str(activation).lower().replace("gelutanh", "gelu_tanh").replace("quickgelu", "quick_gelu")
            known = activation in _ACTIVATIONS
            require(known, f"{where}: act_layer '{printable(activation)}' has no counterpart here")
            told["activation"] = activation
        positions = rest.pop("pos_embed", None)
        if positions is not None:
            told["positions"] = "learned" if positions == "learn" else "none"
        bare = rest.pop("no_embed_class", None)
        if bare is not None:
            told["class_position"] = not bare
        pad = rest.pop("dynamic_img_pad", None)
        if pad is not None:
            told["partial_patches"] = "pad" if pad else "drop"
        return told | super().told(rest, where)

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = same("backbone.tokenizer.projection", "patch_embed.proj", backbone.patch_bias)
        rules += _place(backbone)
        if backbone.pre_norm:
            rules += same("backbone.pre_norm", "norm_pre")
        for i in range(backbone.depth):
            rules += _block(f"backbone.encoder.blocks.{i}", f"blocks.{i}", backbone.qkv_bias, backbone.init_values)
        if backbone.final_norm:
            rules += same("backbone.norm", "norm")
        if head.fc_norm:
            rules += same("head.norm", "fc_norm")
        if head.pre_logits is not None:
            rules += same("head.pre_logits", "pre_logits.fc")
        if head.num_classes:
            rules += same("head.classifier", "head")
            if head.distilled:
                rules += same("head.distillation_classifier", "head_dist")
        return rules

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = []
        if backbone.tokenizer != "patch" or backbone.norm != "pre":
            refused.append(f"tokenizer={backbone.tokenizer!r}, norm={backbone.norm!r} (only patches and pre-norm)")
        if backbone.positions.startswith("relative"):
            refused.append(f"positions={backbone.positions!r} (only ones that are added to the tokens, or none)")
        if backbone.position_grid is not None:
            refused.append(f"position_grid={backbone.position_grid} (timm's tables are for the grid of the image)")
        if not backbone.key_bias and backbone.qkv_bias:
            refused.append("key_bias=False (queries and values have a bias without the keys)")
        if backbone.mask_token:
            refused.append("mask_token=True (mask_token=False leaves it out)")
        if head.global_pool == "both" or (head.global_pool == "token" and not backbone.class_token):
            refused.append(f"global_pool={head.global_pool!r}")
        if head.distilled != backbone.distillation_token:
            refused.append(f"distilled={head.distilled} with distillation_token={backbone.distillation_token}")
        if backbone.distillation_token and (backbone.reg_tokens or not backbone.class_position):
            refused.append("registers or class_position=False beside a distillation token")
        if head.pre_logits is not None:
            refused.append("pre_logits (timm leaves that layer out; num_classes=N replaces it and the classifier)")
        if head.fc_norm and backbone.final_norm:
            refused.append("final_norm and fc_norm together")
        if backbone.partial_patches == "pad" and not divides(backbone):
            refused.append("partial_patches='pad' at an image size that patches do not divide (only 'drop')")
        if head.fc_norm and head.norm_eps != backbone.norm_eps:
            refused.append(f"norm_eps={head.norm_eps:g} of the head beside {backbone.norm_eps:g} of the backbone")
        return refused

    def unwritten(self, backbone: Any, head: Any) -> list[str]:
        eps = backbone.norm_eps
        if eps == 1e-6:
            return []
        return [f"norm_eps={eps:g} (timm's configuration has 1e-06 only; norm_eps=1e-6 accepts it)"]

    def by_hand(self, backbone: Any, head: Any) -> list[str]:
        remarks = []
        if backbone.norm_eps != 1e-6:
            remarks.append(f"build the model with norm_layer=partial(LayerNorm, eps={backbone.norm_eps:g})")
        if backbone.activation != "gelu":
            remarks.append(f"build the model with act_layer='{_ACTIVATIONS[backbone.activation]}'")
        return remarks

    def arguments(self, backbone: Any, head: Any) -> tuple[str, dict[str, Any]]:
        arguments: dict[str, Any] = {
            "img_size": list(backbone.image_size),
            "patch_size": square(backbone.patch_size),
            "mlp_ratio": ratio(backbone.hidden, backbone.embed_dim),
            "pos_embed": "none" if backbone.positions == "none" else "learn",
            "final_norm": backbone.final_norm or head.fc_norm,
            "fc_norm": head.fc_norm,
            "global_pool": head.global_pool,
            "no_embed_class": not _class_row(backbone),
            "num_classes": head.num_classes,
            "drop_rate": head.drop_rate,
            **{name: getattr(backbone, name) for name in self.same if hasattr(backbone, name) and name != "mlp_ratio"},
        }
        if backbone.activation != "gelu" and backbone.mlp == "mlp":
            arguments["act_layer"] = _ACTIVATIONS[backbone.activation]
        if backbone.mlp == "swiglu":  # a class, for which a configuration has no word but the name of such a model
            return "vit_giant_patch14_dinov2", arguments
        if backbone.distillation_token:
            for name in ("reg_tokens", "no_embed_class", "final_norm", "fc_norm"):
                del arguments[name]
            return "deit_base_distilled_patch16_224", arguments
        return "vit_base_patch16_224", arguments


def square(size: tuple[int, int]) -> int | list[int]:
    """A size as libraries write it: one number where both sides are equal."""
    return size[0] if size[0] == size[1] else list(size)


def ratio(hidden: int, width: int) -> float:
    """A ratio whose product with `width`, cut to a whole number as timm does it, is `hidden`."""
    plain = hidden / width
    return plain if int(width * plain) == hidden else math.nextafter(plain, math.inf)


def rows_of_class(rows: int, grid: int | None) -> bool:
    """Whether a table has a row more than patches, so that a class token belongs to it even if none is there."""
    if grid is not None and rows in (grid, grid + 1):
        return rows == grid + 1
    return rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1 and math.isqrt(rows) ** 2 != rows


def _bare(rows: int, prefix: int, grid: int | None, registers: bool) -> bool:
    """Whether a table has a row for every patch and none besides, as it has beside registers unless the grid tells."""
    return rows == grid if grid is not None and rows in (grid, grid + prefix) else registers


def _class_row(backbone: Any) -> bool:
    """Whether timm's table has a row for the class token: it would have rows for registers too, so not beside those."""
    return backbone.class_position and not backbone.reg_tokens


def _place(backbone: Any) -> list[Rule]:
    token, table = "backbone.place.class_token", "backbone.place.positions.table"
    rules = []
    learned = backbone.positions != "none"
    if backbone.class_token and learned and backbone.class_position and not _class_row(backbone):
        rules.append(Rule((token, table), ("cls_token", "pos_embed"), _with_row, into_class))
    else:
        rules += [one(token, "cls_token")] * backbone.class_token
        rules += [one(table, "pos_embed")] * learned
    if backbone.distillation_token:
        rules.append(one("backbone.place.distillation_token", "dist_token"))
    if backbone.reg_tokens:
        rules.append(one("backbone.place.register_tokens", "reg_token"))
    return rules


def _with_row(cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    return cls, torch.cat([torch.zeros_like(cls), patches], dim=1)


def into_class(cls: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """What stands in the class row of the table moves into the token itself: their sum is what the encoder sees."""
    return cls + table[:, :1], table[:, 1:]


def _block(ours: str, theirs: str, qkv_bias: bool, layer_scale: float | None) -> list[Rule]:
    rules = [
        *same(f"{ours}.norm1", f"{theirs}.norm1"),
        *same(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", qkv_bias),
        *same(f"{ours}.attention.out", f"{theirs}.attn.proj"),
        *same(f"{ours}.norm2", f"{theirs}.norm2"),
        *same(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1"),
        *same(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2"),
    ]
    if layer_scale is not None:
        rules += [one(f"{ours}.scale{k}.gamma", f"{theirs}.ls{k}.gamma") for k in (1, 2)]
    return rules


LAYOUTS: Mapping[str, Layout] = {"timm/vit": TimmViT()}
