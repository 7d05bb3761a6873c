"""DINOv2, with registers and without, in the original repository and in transformers; timm's is a plain ViT."""

from collections.abc import Mapping
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from sightline.checkpoints.vit_kinds import PLAIN, OriginalViT, TransformersKind
from sightline.layout import Rule, Shapes, one, same

_FREE = ("mlp", "init_values", "reg_tokens", "mask_token", "global_pool")
_WANTED = {name: value for name, value in PLAIN.items() if name not in _FREE}
_SCALE = r"encoder\.layer\.(\d+)\.layer_scale1\.lambda1"
_OWN_GRID = {name: only for name, only in _WANTED.items() if name != "position_grid"}
_MASK_TOKEN, _REGISTERS = "backbone.place.mask_token", "backbone.place.register_tokens"


def _inner(token: Tensor) -> tuple[Tensor]:
    return (token[0],)


def _outer(token: Tensor) -> tuple[Tensor]:
    return (token[None],)


class OriginalDinov2(OriginalViT):
    """facebookresearch/dinov2: a mask token of two axes; training writes layers in chunks, and heads beside them."""

    wanted: ClassVar[Mapping[str, Any]] = {**_WANTED, "mask_token": True, "global_pool": "token", "num_classes": 0}
    resample = "bicubic_factor"
    dropped = r"(dino|ibot)_head\..*"
    former: ClassVar[Mapping[str, str]] = {r"^backbone\.": "", r"^blocks\.\d+\.(\d+)\.": r"blocks.\1."}

    def recognises(self, shapes: Shapes) -> bool:
        return "mask_token" in shapes and shapes.count(r"blocks\.(\d+)\.ls1\.gamma") > 0

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        registers = shapes.of("register_tokens", 3)[1] if "register_tokens" in shapes else 0
        settings = super().measure(shapes, image_size)
        settings |= {"mlp": "swiglu" if self.hidden(shapes) == "w12" else "mlp", "init_values": 1e-5}
        # The published code keeps the offset of DINO where there are no registers, and has left it where there are.
        return settings | {"reg_tokens": registers} | ({"position_resample": "bicubic_antialias"} if registers else {})

    def hidden(self, shapes: Shapes) -> str:
        return "w12" if shapes.count(r"blocks\.(\d+)\.mlp\.w12\.bias") else "fc1"

    def place(self, backbone: Any) -> list[Rule]:
        rules = [*super().place(backbone), Rule((_MASK_TOKEN,), ("mask_token",), _outer, _inner)]
        return rules + ([one(_REGISTERS, "register_tokens")] if backbone.reg_tokens else [])

    def layer(self, ours: str, theirs: str, backbone: Any) -> list[Rule]:
        scales = [one(f"{ours}.scale{k}.gamma", f"{theirs}.ls{k}.gamma") for k in (1, 2)]
        return super().layer(ours, theirs, backbone) + scales

    def mlp(self, ours: str, theirs: str, backbone: Any) -> list[Rule]:
        if backbone.mlp == "mlp":
            return super().mlp(ours, theirs, backbone)
        return [*same(f"{ours}.fc1", f"{theirs}.w12"), *same(f"{ours}.fc2", f"{theirs}.w3")]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = super().refusals(backbone, head)
        refused += ["init_values=None"] if backbone.init_values is None else []
        exact = backbone.mlp == "swiglu" or backbone.activation == "gelu"
        return refused + ([] if exact else [f"activation={backbone.activation!r} (only 'gelu')"])


class TransformersDinov2(TransformersKind):
    """`Dinov2Model`, and `Dinov2ForImageClassification`, which reads the class token and the mean side by side."""

    model_type = "dinov2"
    base = "dinov2"
    with_head = "Dinov2ForImageClassification"
    bare = "Dinov2Model"
    wanted: ClassVar[Mapping[str, Any]] = {**_OWN_GRID, "reg_tokens": 0}
    defaults: ClassVar[Mapping[str, Any]] = {
        **{name: value for name, value in TransformersKind.defaults.items() if name != "intermediate_size"},
        "mlp_ratio": 4,
        "layer_norm_eps": 1e-6,
        "patch_size": 14,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": False,
        "use_mask_token": True,
    }
    ignored = ("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names")

    def recognises(self, shapes: Shapes) -> bool:
        return shapes.count(_SCALE) > 0 and "embeddings.register_tokens" not in shapes

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        settings = super().measure(shapes, image_size)
        return settings | {
            "mlp": "mlp" if self.hidden(shapes) == "mlp.fc1" else "swiglu",
            "init_values": self.defaults["layerscale_value"],
            "mask_token": "embeddings.mask_token" in shapes,
            "global_pool": "both" if settings["num_classes"] else "token",
            "patches": shapes.of("embeddings.position_embeddings", 3)[1] - 1,
        }

    def hidden(self, shapes: Shapes) -> str:
        return "mlp.weights_in" if any("mlp.weights_in.bias" in name for name in shapes) else "mlp.fc1"

    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        told = super().told(config, shapes)
        return told | {
            "mlp": "swiglu" if config["use_swiglu_ffn"] else "mlp",
            "mlp_dim": _units(config["hidden_size"], config["mlp_ratio"], config["use_swiglu_ffn"]),
            "init_values": float(config["layerscale_value"]),
            "position_grid": _read_as(told["image_size"], told["patch_size"])[0],
        }

    def place(self, backbone: Any) -> list[Rule]:
        rules = super().place(backbone)
        return rules + ([Rule((_MASK_TOKEN,), (self._mask,), _outer, _inner)] if backbone.mask_token else [])

    def layer(self, ours: str, theirs: str, backbone: Any) -> list[Rule]:
        names = ("mlp.fc1", "mlp.fc2") if backbone.mlp == "mlp" else ("mlp.weights_in", "mlp.weights_out")
        return [
            *same(f"{ours}.norm1", f"{theirs}.norm1"),
            *self.attention(f"{ours}.attention", f"{theirs}.attention", backbone),
            one(f"{ours}.scale1.gamma", f"{theirs}.layer_scale1.lambda1"),
            *same(f"{ours}.norm2", f"{theirs}.norm2"),
            *same(f"{ours}.mlp.fc1", f"{theirs}.{names[0]}"),
            *same(f"{ours}.mlp.fc2", f"{theirs}.{names[1]}"),
            one(f"{ours}.scale2.gamma", f"{theirs}.layer_scale2.lambda1"),
        ]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = super().refusals(backbone, head)
        refused += ["init_values=None"] if backbone.init_values is None else []
        wanted = "both" if head.num_classes else "token"
        if head.global_pool != wanted:
            refused.append(f"global_pool={head.global_pool!r} with {head.num_classes} classes (only {wanted!r})")
        if _ratio(backbone) is None:
            refused.append(f"{backbone.hidden} hidden units for a width of {backbone.embed_dim} (mlp_ratio is whole)")
        square, computed = _read_as(backbone.image_size, backbone.patch_size)
        as_there = computed and backbone.position_grid == square
        return refused + ([] if as_there else ["a grid of unequal sides (transformers takes its table for a square's)"])

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        config = super().config(backbone, head) | {
            "mlp_ratio": _ratio(backbone),
            "layerscale_value": backbone.init_values,
            "use_swiglu_ffn": backbone.mlp == "swiglu",
            "use_mask_token": backbone.mask_token,
        }
        return {name: value for name, value in config.items() if name in self.defaults}

    _mask = "embeddings.mask_token"


class TransformersDinov2Registers(TransformersDinov2):
    """The same with registers, which follow the class token and have no positions; the mask token is always there."""

    model_type = "dinov2_with_registers"
    base = "dinov2_with_registers"
    with_head = "Dinov2WithRegistersForImageClassification"
    bare = "Dinov2WithRegistersModel"
    wanted: ClassVar[Mapping[str, Any]] = _OWN_GRID
    resample = "bicubic_antialias"
    defaults: ClassVar[Mapping[str, Any]] = {
        **{name: value for name, value in TransformersDinov2.defaults.items() if name != "use_mask_token"},
        "patch_size": 16,
        "num_register_tokens": 4,
    }

    def recognises(self, shapes: Shapes) -> bool:
        return shapes.count(_SCALE) > 0 and "embeddings.register_tokens" in shapes

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        registers = shapes.of("embeddings.register_tokens", 3)[1]
        return super().measure(shapes, image_size) | {"reg_tokens": registers}

    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        return super().told(config, shapes) | {"reg_tokens": config["num_register_tokens"]}

    def place(self, backbone: Any) -> list[Rule]:
        return [*super().place(backbone), one(_REGISTERS, "embeddings.register_tokens")]

    def extras(self, backbone: Any, head: Any) -> dict[str, Tensor]:
        return {} if backbone.mask_token else {self._mask: torch.zeros(1, backbone.embed_dim)}

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        return super().refusals(backbone, head) + ([] if backbone.reg_tokens else ["reg_tokens=0"])

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        return super().config(backbone, head) | {"num_register_tokens": backbone.reg_tokens}


def _read_as(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[tuple[int, int] | None, bool]:
    """The square that transformers takes a table of unequal sides for, and whether it can: of 2×3 there is none."""
    rows, columns = (side // patch for side, patch in zip(image_size, patch_size, strict=True))
    side = isqrt(rows * columns)
    if rows == columns:
        return None, True
    return ((side, side), True) if side * side == rows * columns else (None, False)


def _units(width: int, ratio: float, gated: bool) -> int:
    """Hidden units as transformers counts them: with gates, two thirds, up to a multiple of eight; gates count too."""
    plain = int(width * ratio)
    return 2 * ((int(plain * 2 / 3) + 7) // 8 * 8) if gated else plain


def _ratio(backbone: Any) -> int | None:
    """The whole number from which transformers gets the hidden units, if there is one."""
    gated, width = backbone.mlp == "swiglu", backbone.embed_dim
    about = backbone.hidden * 3 // 4 if gated else backbone.hidden
    near = range(max(about // width - 1, 1), about // width + 2)
    return next((ratio for ratio in near if _units(width, ratio, gated) == backbone.hidden), None)


LAYOUTS = {
    "original/dinov2": OriginalDinov2(),
    "transformers/dinov2": TransformersDinov2(),
    "transformers/dinov2_with_registers": TransformersDinov2Registers(),
}
