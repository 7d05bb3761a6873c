"""BEiT in timm, in the original repository and in transformers: relative positions, and no bias for keys."""

from collections.abc import Mapping
from math import isqrt
from typing import Any, ClassVar

from torch import Tensor

from sightline.checkpoints.vit_kinds import PLAIN, OriginalViT, TransformersKind
from sightline.errors import UserError
from sightline.layers.positions import relative_index
from sightline.layout import Rule, Shapes, TimmLayout, one, same

_FREE = ("mask_token", "positions", "init_values", "final_norm", "fc_norm", "global_pool")
_WANTED = {name: value for name, value in PLAIN.items() if name not in _FREE} | {"key_bias": False}
_TABLE = "relative_position_bias_table"


def _patches(rows: int, kernel: tuple[int, ...], image_size: tuple[int, int] | None) -> dict[str, int]:
    """How many patches a table of relative positions of so many rows is for, where the grid is known or a square."""
    side = isqrt(rows - 3) if rows > 3 else 0
    grids = [((side + 1) // 2, (side + 1) // 2)]
    if image_size is not None:
        grids.insert(0, (image_size[0] // kernel[2], image_size[1] // kernel[3]))
    fitting = [grid for grid in grids if (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 == rows]
    return {"patches": fitting[0][0] * fitting[0][1]} if fitting else {}


def _biased(shapes: Shapes) -> bool:
    """Whether queries have a bias apart, in any layer."""
    return shapes.count(r"blocks\.(\d+)\.attn\.q_bias") > 0


def _read_as(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int] | None:
    """The grid that transformers takes a table to be for, which is columns by rows; None for squares."""
    rows, columns = (side // patch for side, patch in zip(image_size, patch_size, strict=True))
    return (columns, rows) if rows != columns else None


def _refusals(backbone: Any, head: Any) -> list[str]:
    refused = []
    if backbone.positions not in ("relative", "relative_shared", "none"):
        refused.append(f"positions={backbone.positions!r} (only relative ones or none)")
    if backbone.final_norm == head.fc_norm:
        refused.append("final_norm and fc_norm " + ("together" if head.fc_norm else "both left out"))
    return refused


class OriginalBeit(OriginalViT):
    """microsoft/unilm's BEiT, pre-trained (one table for all layers, a mask token) or fine-tuned (a table for each)."""

    wanted: ClassVar[Mapping[str, Any]] = {**_WANTED, "activation": "gelu"}
    resample = "geometric"
    dropped = r".*relative_position_index|lm_head\..*"

    def recognises(self, shapes: Shapes) -> bool:
        biased = _biased(shapes)
        return biased and ("mask_token" in shapes or any(name.endswith("relative_position_index") for name in shapes))

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        shared, each = f"rel_pos_bias.{_TABLE}" in shapes, shapes.count(rf"blocks\.(\d+)\.attn\.{_TABLE}") > 0
        pooled = "fc_norm.weight" in shapes
        settings = super().measure(shapes, image_size) | {
            "qkv_bias": _biased(shapes),
            "init_values": 0.1 if shapes.count(r"blocks\.(\d+)\.gamma_1") else None,
            "mask_token": "mask_token" in shapes,
            "positions": "relative" if each else "relative_shared" if shared else "none",
            "final_norm": "norm.weight" in shapes,
            "fc_norm": pooled,
            "global_pool": "avg" if pooled else "token",
        }
        kernel = shapes["patch_embed.proj.weight"]
        tables = [name for name in shapes if name.endswith(_TABLE) and len(shapes[name]) == 2]
        return settings | (_patches(shapes[tables[0]][0], kernel, image_size) if tables else {})

    def place(self, backbone: Any) -> list[Rule]:
        rules = [one("backbone.place.mask_token", "mask_token")] if backbone.mask_token else []
        shared = backbone.positions == "relative_shared"
        return rules + ([one("backbone.relative.0.table", f"rel_pos_bias.{_TABLE}")] if shared else [])

    def layer(self, ours: str, theirs: str, backbone: Any) -> list[Rule]:
        rules = super().layer(ours, theirs, backbone)
        if backbone.qkv_bias:
            rules += [one(f"{ours}.attention.{part}_bias", f"{theirs}.attn.{part}_bias") for part in "qv"]
        if backbone.init_values is not None:
            rules += [one(f"{ours}.scale{k}.gamma", f"{theirs}.gamma_{k}") for k in (1, 2)]
        if backbone.positions == "relative":
            number = ours.rpartition(".")[2]
            rules.append(one(f"backbone.relative.{number}.table", f"{theirs}.attn.{_TABLE}"))
        return rules

    def extras(self, backbone: Any, head: Any) -> dict[str, Tensor]:
        shared = backbone.positions == "relative_shared"
        layers = range(backbone.depth if backbone.positions == "relative" else 0)
        places = ["rel_pos_bias"] if shared else [f"blocks.{i}.attn" for i in layers]
        rows, columns = (side // patch for side, patch in zip(backbone.image_size, backbone.patch_size, strict=True))
        return {f"{place}.relative_position_index": relative_index((rows, columns), 1) for place in places}

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        return super().refusals(backbone, head) + _refusals(backbone, head)


class TimmBeit(OriginalBeit, TimmLayout):
    """timm's `Beit`, which has the original's names, neither mask token nor indices, and its own way to stretch."""

    libraries = ("timm",)
    wanted: ClassVar[Mapping[str, Any]] = {**OriginalBeit.wanted, "mask_token": False}
    resample = "geometric_linear"
    dropped = r"$^"
    same = (
        *("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "qkv_bias", "mlp_ratio", "init_values"),
        *("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    )
    at_rest: ClassVar[Mapping[str, Any]] = {
        "swiglu_mlp": (False,),
        "scale_mlp": (False,),
        "use_abs_pos_emb": (False,),
        "use_rel_pos_bias": (True, False),
        "use_shared_rel_pos_bias": (True, False),
        "use_fc_norm": (True, False),  # seen in the tensors
    }

    def recognises(self, shapes: Shapes) -> bool:
        return _biased(shapes) and not super().recognises(shapes)

    def told(self, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
        # The scale of a new classifier is passed over: the weights are there.
        told = super().told({name: value for name, value in arguments.items() if name != "head_init_scale"}, where)
        told |= {"init_values": told["init_values"] or None} if "init_values" in told else {}
        own, shared = (arguments.get(f"use_{which}rel_pos_bias") for which in ("", "shared_"))
        if own is None and shared is None:
            return told
        return told | {"positions": "relative_shared" if shared else "relative" if own else "none"}

    def extras(self, backbone: Any, head: Any) -> dict[str, Tensor]:
        return {}

    def arguments(self, backbone: Any, head: Any) -> tuple[str, dict[str, Any]]:
        ratio = backbone.hidden / backbone.embed_dim
        arguments = {
            **{name: getattr(backbone, name) for name in self.same if hasattr(backbone, name)},
            "img_size": list(backbone.image_size),
            "patch_size": list(backbone.patch_size),
            "mlp_ratio": ratio if int(backbone.embed_dim * ratio) == backbone.hidden else ratio + 1e-9,
            "init_values": backbone.init_values or 0.0,
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": backbone.positions == "relative",
            "use_shared_rel_pos_bias": backbone.positions == "relative_shared",
            "use_fc_norm": head.fc_norm,
            "global_pool": head.global_pool,
            "drop_rate": head.drop_rate,
        }
        return "beit_base_patch16_224", arguments

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = super().refusals(backbone, head)
        return refused + ([f"global_pool={head.global_pool!r}"] if head.global_pool == "both" else [])


class TransformersBeit(TransformersKind):
    """`BeitForImageClassification`, `BeitModel`, and `BeitForMaskedImageModeling` without its last layer."""

    model_type = "beit"
    base = "beit"
    outside = ("classifier.", "lm_head.")
    with_head = "BeitForImageClassification"
    bare = "BeitModel"
    also = ("BeitForMaskedImageModeling",)
    headless = also
    former: ClassVar[Mapping[str, str]] = {r"^\?layernorm\.": "layernorm."}  # beside the base model in that class
    dropped = r".*relative_position_index|lm_head\..*"
    wanted: ClassVar[Mapping[str, Any]] = {name: only for name, only in _WANTED.items() if name != "position_grid"}
    resample = "bilinear"
    defaults: ClassVar[Mapping[str, Any]] = {
        **{name: value for name, value in TransformersKind.defaults.items() if name != "qkv_bias"},
        "use_mask_token": False,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "layer_scale_init_value": 0.1,
        "drop_path_rate": 0.1,
        "use_mean_pooling": True,
    }
    ignored = (
        *("vocab_size", "pool_scales", "use_auxiliary_head", "auxiliary_loss_weight", "auxiliary_channels"),
        *("auxiliary_num_convs", "auxiliary_concat_input", "semantic_loss_ignore_index", "out_features", "out_indices"),
        *("stage_names", "add_fpn", "reshape_hidden_states"),
    )
    _scale = r"encoder\.layer\.(\d+)\.lambda_1"
    _shared = f"encoder.relative_position_bias.{_TABLE}"

    def recognises(self, shapes: Shapes) -> bool:
        first = "encoder.layer.0.attention.attention"
        return (
            f"{first}.query.weight" in shapes
            and f"{first}.key.bias" not in shapes
            and (f"{first}.query.bias" in shapes or shapes.count(self._scale) > 0)
        )

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        kinds = {self._own("encoder.layer.0"): "relative", self._shared: "relative_shared"}
        tables = [name for name in kinds if name in shapes]
        pooled = "pooler.layernorm.weight" in shapes
        settings = super().measure(shapes, image_size) | {
            "init_values": 0.1 if shapes.count(self._scale) else None,
            "mask_token": "embeddings.mask_token" in shapes,
            "positions": kinds[tables[0]] if tables else "none",
            "final_norm": "layernorm.weight" in shapes,
            "fc_norm": pooled,
            "global_pool": "avg" if pooled else "token",
        }
        kernel = shapes["embeddings.patch_embeddings.projection.weight"]
        return settings | (_patches(shapes.of(tables[0], 2)[0], kernel, image_size) if tables else {})

    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        told, where = super().told(config, shapes), shapes.where
        own, shared = config["use_relative_position_bias"], config["use_shared_relative_position_bias"]
        if config["use_absolute_position_embeddings"] or (own and shared):
            raise UserError(
                f"{where}: two kinds of positions at once have no counterpart here, or absolute ones in BEiT"
            )
        pooled = config["use_mean_pooling"] and "classifier.weight" in shapes
        return told | {
            "positions": "relative_shared" if shared else "relative" if own else "none",
            "init_values": config["layer_scale_init_value"] or None,
            "mask_token": config["use_mask_token"],
            "position_grid": _read_as(told["image_size"], told["patch_size"]) if own or shared else None,
            **({"final_norm": False, "fc_norm": True, "global_pool": "avg"} if pooled else {}),
        }

    def place(self, backbone: Any) -> list[Rule]:
        rules = [one("backbone.place.mask_token", "embeddings.mask_token")] if backbone.mask_token else []
        shared = backbone.positions == "relative_shared"
        return rules + ([one("backbone.relative.0.table", self._shared)] if shared else [])

    def layer(self, ours: str, theirs: str, backbone: Any) -> list[Rule]:
        rules = super().layer(ours, theirs, backbone)
        if backbone.qkv_bias:
            parts = {"q": "query", "v": "value"}.items()
            attention = f"{theirs}.attention.attention"
            rules += [one(f"{ours}.attention.{part}_bias", f"{attention}.{name}.bias") for part, name in parts]
        if backbone.init_values is not None:
            rules += [one(f"{ours}.scale{k}.gamma", f"{theirs}.lambda_{k}") for k in (1, 2)]
        if backbone.positions == "relative":
            rules.append(one(f"backbone.relative.{ours.rpartition('.')[2]}.table", self._own(theirs)))
        return rules

    def top(self, head: Any) -> list[Rule]:
        return super().top(head) + (same("head.norm", "pooler.layernorm") if head.fc_norm else [])

    def output(self, answer: Any, backbone: Any, head: Any) -> Tensor:
        return answer.logits if head.num_classes else answer.pooler_output

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = super().refusals(backbone, head) + _refusals(backbone, head)
        wanted = "avg" if head.fc_norm else "token"
        if head.global_pool != wanted:
            refused.append(f"global_pool={head.global_pool!r} with fc_norm={head.fc_norm} (only {wanted!r})")
        if not backbone.qkv_bias:
            refused.append("qkv_bias=False (only True)")
        sizes = backbone.image_size, backbone.patch_size
        if len(set(backbone.patch_size)) > 1:
            refused.append(f"patches of unequal sides, {backbone.patch_size}")
        elif backbone.positions != "none" and backbone.position_grid != _read_as(*sizes):
            refused.append("a grid of unequal sides (transformers takes rows for columns in its tables)")
        return refused

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        return super().config(backbone, head) | {
            "use_mask_token": backbone.mask_token,
            "use_absolute_position_embeddings": False,
            "use_relative_position_bias": backbone.positions == "relative",
            "use_shared_relative_position_bias": backbone.positions == "relative_shared",
            "layer_scale_init_value": backbone.init_values or 0.0,
            "use_mean_pooling": head.fc_norm,
        }

    def _own(self, layer: str) -> str:
        return f"{layer}.attention.attention.relative_position_bias.{_TABLE}"


LAYOUTS = {"timm/beit": TimmBeit(), "original/beit": OriginalBeit(), "transformers/beit": TransformersBeit()}
