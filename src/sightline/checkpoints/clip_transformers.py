"""CLIP as transformers stores it: `CLIPModel`, with both towers under one roof."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sightline.checkpoints.clip import WANTED, refused, vector
from sightline.checkpoints.transformers import refuse_odd
from sightline.checkpoints.transformers_vit import ACTIVATIONS, WRITTEN, pair
from sightline.errors import printable
from sightline.layout import Layout, Rule, Shapes, TransformersLayout, fused, one, same
from sightline.schema import require

_COMMON: Mapping[str, Any] = {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "attention_dropout": 0.0}
_VISION: Mapping[str, Any] = {
    **_COMMON,
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"num_channels": 3, "image_size": 224, "patch_size": 32},
}
_TEXT: Mapping[str, Any] = {
    **_COMMON,
    **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    **{"vocab_size": 49_408, "max_position_embeddings": 77, "eos_token_id": 49_407},
}
_BESIDE = ("projection_dim", "initializer_factor", "dropout")
"""Keys of both towers' configurations that change no output of the whole."""

_UNMARKED = 2
"""What old configurations call the token that ends a text; it is then looked for as the highest id."""


class TransformersClip(TransformersLayout):
    """`CLIPModel`: query, key and value apart; `pre_layrnorm` is how the norm is spelled in every file."""

    family = "vit"
    task = "clip"
    model_type = "clip"
    base = "clip"
    with_head = "CLIPModel"
    bare = "CLIPModel"
    dropped = r"(text|vision)_model\.embeddings\.position_ids"
    ignored = ("text_config_dict", "vision_config_dict", "initializer_factor")
    defaults: ClassVar[Mapping[str, Any]] = {
        **{"text_config": None, "vision_config": None},
        **{"projection_dim": 512, "logit_scale_init_value": 2.6592},
    }

    def recognises(self, shapes: Shapes) -> bool:
        return "vision_model.embeddings.class_embedding" in shapes and "visual_projection.weight" in shapes

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        kernel = shapes.of("vision_model.embeddings.patch_embedding.weight", 4)
        length, width = shapes.of("text_model.embeddings.position_embedding.weight", 2)
        return {
            **WANTED,
            "embed_dim": kernel[0],
            "in_chans": kernel[1],
            "patch_size": kernel[2:],
            "depth": shapes.count(r"vision_model\.encoder\.layers\.(\d+)\."),
            "num_heads": max(kernel[0] // 64, 1),
            "mlp_dim": shapes.of("vision_model.encoder.layers.0.mlp.fc1.bias", 1)[0],
            "activation": "quick_gelu",
            "norm_eps": 1e-5,
            "position_resample": "bicubic",
            "partial_patches": "drop",
            "projection_dim": shapes.of("text_projection.weight", 2)[0],
            "context_length": length,
            "vocab_size": shapes.of("text_model.embeddings.token_embedding.weight", 2)[0],
            "text_width": width,
            "text_depth": shapes.count(r"text_model\.encoder\.layers\.(\d+)\."),
            "text_heads": max(width // 64, 1),
            "text_mlp_dim": shapes.of("text_model.encoder.layers.0.mlp.fc1.bias", 1)[0],
            "text_activation": "quick_gelu",
            "text_norm_eps": 1e-5,
            "eos_token_id": None,
            "logit_bias_init": None,
            "patches": shapes.of("vision_model.embeddings.position_embedding.weight", 2)[0] - 1,
        }

    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        vision = _tower(config, "vision_config", _VISION, shapes.where)
        text = _tower(config, "text_config", _TEXT, shapes.where)
        end = text["eos_token_id"]
        where = f"{shapes.where}: text_config"
        require(end is None or type(end) is int, f"{where}: eos_token_id {printable(end)} is not one whole number")
        require(not text["attention_dropout"], f"{where}: attention_dropout has no counterpart in the text tower")
        return {
            "image_size": pair(vision["image_size"], "image_size", shapes.where),
            "patch_size": pair(vision["patch_size"], "patch_size", shapes.where),
            "embed_dim": vision["hidden_size"],
            "depth": vision["num_hidden_layers"],
            "num_heads": vision["num_attention_heads"],
            "mlp_dim": vision["intermediate_size"],
            "in_chans": vision["num_channels"],
            "activation": vision["hidden_act"],
            "norm_eps": vision["layer_norm_eps"],
            "attn_drop_rate": float(vision["attention_dropout"]),
            "projection_dim": config["projection_dim"],
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "text_width": text["hidden_size"],
            "text_depth": text["num_hidden_layers"],
            "text_heads": text["num_attention_heads"],
            "text_mlp_dim": text["intermediate_size"],
            "text_activation": text["hidden_act"],
            "text_norm_eps": text["layer_norm_eps"],
            "eos_token_id": None if end == _UNMARKED else end,
            "logit_scale_init": float(config["logit_scale_init_value"]),
        }

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        seen, text = "vision_model.embeddings", "text_model.embeddings"
        return [
            *same("backbone.tokenizer.projection", f"{seen}.patch_embedding", False),
            vector("backbone.place.class_token", f"{seen}.class_embedding", "d"),
            vector("backbone.place.positions.table", f"{seen}.position_embedding.weight", "n d"),
            *same("backbone.pre_norm", "vision_model.pre_layrnorm"),
            *_layers("backbone.encoder.blocks", "vision_model.encoder.layers", backbone.depth),
            *same("backbone.norm", "vision_model.post_layernorm"),
            *same("head.projection", "visual_projection", False),
            *same("head.text.embedding", f"{text}.token_embedding", False),
            one("head.text.positions", f"{text}.position_embedding.weight"),
            *_layers("head.text.encoder.blocks", "text_model.encoder.layers", head.text_depth),
            *same("head.text.norm", "text_model.final_layer_norm"),
            *same("head.text_projection", "text_projection", False),
            one("head.logit_scale", "logit_scale"),
        ]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        found = refused(backbone, head)
        found += [] if head.logit_bias_init is None else ["logit_bias_init (CLIPModel has no bias)"]
        rates = [name for name in ("pos_drop_rate", "proj_drop_rate", "drop_path_rate") if getattr(backbone, name)]
        return found + [f"{name}={getattr(backbone, name):g}" for name in rates]

    def kind(self, backbone: Any, head: Any) -> str:
        return self.with_head

    def ask(self, model: Any, *inputs: Tensor) -> Any:
        pixels, ids = inputs
        return model(pixel_values=pixels, input_ids=ids)

    def output(self, answer: Any, backbone: Any, head: Any) -> tuple[Tensor, Tensor]:
        return answer.logits_per_image, answer.logits_per_text

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        square = len(set(backbone.image_size)) == 1 and len(set(backbone.patch_size)) == 1
        return {
            "projection_dim": head.projection_dim,
            "logit_scale_init_value": head.logit_scale_init,
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": backbone.embed_dim,
                "intermediate_size": backbone.hidden,
                "num_hidden_layers": backbone.depth,
                "num_attention_heads": backbone.num_heads,
                "num_channels": backbone.in_chans,
                "image_size": backbone.image_size[0] if square else list(backbone.image_size),
                "patch_size": backbone.patch_size[0] if square else list(backbone.patch_size),
                "hidden_act": WRITTEN[backbone.activation],
                "layer_norm_eps": backbone.norm_eps,
                "attention_dropout": backbone.attn_drop_rate,
                "projection_dim": head.projection_dim,
            },
            "text_config": {
                "model_type": "clip_text_model",
                "vocab_size": head.vocab_size,
                "hidden_size": head.text_width,
                "intermediate_size": head.text_hidden,
                "num_hidden_layers": head.text_depth,
                "num_attention_heads": head.text_heads,
                "max_position_embeddings": head.context_length,
                "hidden_act": WRITTEN[head.text_activation],
                "layer_norm_eps": head.text_norm_eps,
                "attention_dropout": 0.0,
                "projection_dim": head.projection_dim,
                "bos_token_id": head.vocab_size - 2,
                "eos_token_id": _UNMARKED if head.eos_token_id is None else head.eos_token_id,
            },
        }


def _tower(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One tower's settings, with what transformers takes where its configuration is silent; the activation is ours."""
    given = config[name] or {}
    require(isinstance(given, Mapping), f"{where}: '{name}' in config.json is not an object")
    refuse_odd(given, defaults, _BESIDE, f"{where}: {name}")
    found = {**defaults, **given}
    activation = found["hidden_act"]
    known = isinstance(activation, str) and activation in ACTIVATIONS
    require(known, f"{where}: {name}: hidden_act '{printable(activation)}' has no counterpart here")
    return {**found, "hidden_act": ACTIVATIONS[activation]}


def _layers(ours: str, theirs: str, depth: int) -> list[Rule]:
    rules = []
    for i in range(depth):
        mine, yours = f"{ours}.{i}", f"{theirs}.{i}"
        parts = (f"{yours}.self_attn.{part}_proj" for part in "qkv")
        rules += [
            *same(f"{mine}.norm1", f"{yours}.layer_norm1"),
            *fused(f"{mine}.attention.qkv", *parts),
            *same(f"{mine}.attention.out", f"{yours}.self_attn.out_proj"),
            *same(f"{mine}.norm2", f"{yours}.layer_norm2"),
            *same(f"{mine}.mlp.fc1", f"{yours}.mlp.fc1"),
            *same(f"{mine}.mlp.fc2", f"{yours}.mlp.fc2"),
        ]
    return rules


LAYOUTS: Mapping[str, Layout] = {"transformers/clip": TransformersClip()}
