"""transformers' `ViTModel` and `ViTForImageClassification`, and what its Vision Transformers have in common."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sightline.checkpoints.measure import divides
from sightline.checkpoints.timm_vit import square
from sightline.errors import printable
from sightline.layout import Layout, Rule, Shapes, TransformersLayout, fused, one, same
from sightline.schema import require

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Their names of activations and ours."""

WRITTEN = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}
"""Our names of activations and those that are written."""


class TransformersViT(TransformersLayout):
    """Query, key and value apart; the pooler, where it is used, is a dense layer with tanh before the classifier."""

    family = "vit"
    untold = ("num_heads",)
    model_type = "vit"
    base = "vit"
    with_head = "ViTForImageClassification"
    bare = "ViTModel"
    dropped = r"embeddings\.(mask_token|position_ids)"
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "qkv_bias": True,
        "pooler_output_size": None,
        "pooler_act": "tanh",
    }

    def recognises(self, shapes: Shapes) -> bool:
        strangers = ("embeddings.distillation_token", "embeddings.register_tokens", "encoder.layer.0.lambda_1")
        own = (
            "embeddings.position_embeddings" in shapes and "encoder.layer.0.attention.attention.query.weight" in shapes
        )
        scaled = "encoder.layer.0.layer_scale1.lambda1" in shapes or any(n.startswith("decoder") for n in shapes)
        return own and not scaled and not any(name in shapes for name in strangers)

    def unused(self, shapes: Shapes) -> list[str]:
        """A classifier does without the pooler that some files carry along."""
        pooler = ("pooler.dense.weight", "pooler.dense.bias") if shapes.outputs("classifier.bias") else ()
        return [*super().unused(shapes), *(name for name in pooler if name in shapes)]

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        kernel = shapes.of("embeddings.patch_embeddings.projection.weight", 4)
        table = shapes.of("embeddings.position_embeddings", 3)
        pooler = _pooled(shapes)
        return {
            "embed_dim": kernel[0],
            "in_chans": kernel[1],
            "patch_size": kernel[2:],
            "depth": shapes.count(r"encoder\.layer\.(\d+)\."),
            "mlp_dim": shapes.outputs("encoder.layer.0.intermediate.dense.bias") or 4 * kernel[0],
            "qkv_bias": shapes.count(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.bias") > 0,
            "norm_eps": 1e-12,
            "num_classes": shapes.outputs("classifier.bias"),
            "pre_logits": kernel[0] if pooler else None,
            "position_resample": "bicubic",
            "partial_patches": "drop",
            "patches": table[1] - 1,
        }

    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        require(
            config["pooler_act"] == "tanh",
            f"{shapes.where}: pooler_act '{printable(config['pooler_act'])}' is not tanh",
        )
        pooler = _pooled(shapes)
        width = config["pooler_output_size"] or config["hidden_size"]
        return {**common(config, shapes.where), "pre_logits": width if pooler else None}

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = [
            *same("backbone.tokenizer.projection", "embeddings.patch_embeddings.projection"),
            one("backbone.place.class_token", "embeddings.cls_token"),
            one("backbone.place.positions.table", "embeddings.position_embeddings"),
        ]
        for i in range(backbone.depth):
            rules += block(f"backbone.encoder.blocks.{i}", f"encoder.layer.{i}", backbone.qkv_bias)
        rules += same("backbone.norm", "layernorm")
        if head.pre_logits is not None:
            rules += same("head.pre_logits", "pooler.dense")
        if head.num_classes:
            rules += same("head.classifier", "classifier")
        return rules

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        wanted: dict[str, tuple[Any, Any]] = {
            "tokenizer": (backbone.tokenizer, "patch"),
            "norm": (backbone.norm, "pre"),
            "pre_norm": (backbone.pre_norm, False),
            "mlp": (backbone.mlp, "mlp"),
            "patch_bias": (backbone.patch_bias, True),
            "key_bias": (backbone.key_bias or not backbone.qkv_bias, True),
            "init_values": (backbone.init_values, None),
            "positions": (backbone.positions, "learned"),
            "class_token": (backbone.class_token, True),
            "class_position": (backbone.class_position, True),
            "position_grid": (backbone.position_grid, None),
            "distillation_token": (backbone.distillation_token, False),
            "reg_tokens": (backbone.reg_tokens, 0),
            "mask_token": (backbone.mask_token, False),
            "final_norm": (backbone.final_norm, True),
            "fc_norm": (head.fc_norm, False),
            "distilled": (head.distilled, False),
            "global_pool": (head.global_pool, "token"),
        }
        refused = [f"{name}={value!r} (only {only!r})" for name, (value, only) in wanted.items() if value != only]
        if head.pre_logits is not None and head.num_classes:
            refused.append("pre_logits before a classifier (num_classes=0 or another number of classes leaves it out)")
        if backbone.partial_patches == "pad" and not divides(backbone):
            refused.append("partial_patches='pad' at an image size that patches do not divide (only 'drop')")
        return refused

    def remarks(self, backbone: Any, head: Any) -> list[str]:
        remarks = []
        if backbone.drop_path_rate:
            rate = backbone.drop_path_rate
            remarks.append(f"drop_path_rate={rate:g}, which acts in training only, has no counterpart")
        if not head.num_classes and head.pre_logits is None:
            remarks.append("open it with ViTModel.from_pretrained(…, add_pooling_layer=False)")
        return remarks

    def opened(self, backbone: Any, head: Any) -> dict[str, Any]:
        return {} if head.num_classes else {"add_pooling_layer": head.pre_logits is not None}

    def output(self, answer: Any, backbone: Any, head: Any) -> Tensor:
        return answer.pooler_output if head.pre_logits is not None else super().output(answer, backbone, head)

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        pooler = {"pooler_output_size": head.pre_logits, "pooler_act": "tanh"} if head.pre_logits else {}
        return {**written(backbone), **pooler}


def _pooled(shapes: Shapes) -> bool:
    """Whether the pooler counts: a classifier does without."""
    return shapes.outputs("pooler.dense.bias") > 0 and not shapes.outputs("classifier.bias")


def common(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the configurations of all Vision Transformers name alike, under our names."""
    activation = config["hidden_act"]
    known = isinstance(activation, str) and activation in ACTIVATIONS
    require(known, f"{where}: hidden_act '{printable(activation)}' has no counterpart here")
    return {
        "image_size": pair(config["image_size"], "image_size", where),
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "in_chans": config["num_channels"],
        "patch_size": pair(config["patch_size"], "patch_size", where),
        "qkv_bias": config["qkv_bias"],
        "norm_eps": config["layer_norm_eps"],
        "activation": ACTIVATIONS[activation],
        "attn_drop_rate": config["attention_probs_dropout_prob"],
        "proj_drop_rate": config["hidden_dropout_prob"],
        "pos_drop_rate": config["hidden_dropout_prob"],
    }


def written(backbone: Any) -> dict[str, Any]:
    """The same from our settings."""
    return {
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "intermediate_size": backbone.hidden,
        "hidden_act": WRITTEN[backbone.activation],
        "hidden_dropout_prob": backbone.proj_drop_rate,
        "attention_probs_dropout_prob": backbone.attn_drop_rate,
        "layer_norm_eps": backbone.norm_eps,
        "image_size": square(backbone.image_size),
        "patch_size": square(backbone.patch_size),
        "num_channels": backbone.in_chans,
        "qkv_bias": backbone.qkv_bias,
    }


def pair(value: Any, name: str, where: str) -> tuple[int, int]:
    """A size of one or two whole numbers as (height, width). Raises UserError for anything else."""
    sides = tuple(value) if isinstance(value, list) else (value, value)
    whole = len(sides) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in sides)
    require(whole, f"{where}: {name} {printable(value)} is not one or two whole numbers")
    return sides[0], sides[1]


def block(ours: str, theirs: str, qkv_bias: bool = True) -> list[Rule]:
    """The rules of one layer of the encoder."""
    parts = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
    return [
        *same(f"{ours}.norm1", f"{theirs}.layernorm_before"),
        *fused(f"{ours}.attention.qkv", *parts, bias=qkv_bias),
        *same(f"{ours}.attention.out", f"{theirs}.attention.output.dense"),
        *same(f"{ours}.norm2", f"{theirs}.layernorm_after"),
        *same(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense"),
        *same(f"{ours}.mlp.fc2", f"{theirs}.output.dense"),
    ]


LAYOUTS: Mapping[str, Layout] = {"transformers/vit": TransformersViT()}
