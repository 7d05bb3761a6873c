"""What the layouts of the Vision Transformer's kinds have in common: the original repositories', and transformers'."""

from collections.abc import Mapping
from typing import Any, ClassVar

from sightline.checkpoints.measure import divides
from sightline.checkpoints.transformers_vit import common, written
from sightline.layout import Layout, Rule, Shapes, TransformersLayout, fused, one, same


def unlike(backbone: Any, head: Any, wanted: Mapping[str, Any]) -> list[str]:
    """The settings that differ from the only values that a layout knows, and what else it never knows, as phrases."""
    settings = {**vars(backbone), **{name: value for name, value in vars(head).items() if name != "norm_eps"}}
    refused = [f"{name}={settings[name]!r} (only {only!r})" for name, only in wanted.items() if settings[name] != only]
    if backbone.partial_patches == "pad" and not divides(backbone):
        refused.append("partial_patches='pad' at an image size that patches do not divide (only 'drop')")
    if head.fc_norm and head.norm_eps != backbone.norm_eps:
        refused.append(f"norm_eps={head.norm_eps:g} of the head beside {backbone.norm_eps:g} of the backbone")
    return refused


PLAIN: Mapping[str, Any] = {
    "tokenizer": "patch",
    "patch_bias": True,
    "mlp": "mlp",
    "key_bias": True,
    "norm": "pre",
    "pre_norm": False,
    "init_values": None,
    "class_token": True,
    "distillation_token": False,
    "reg_tokens": 0,
    "mask_token": False,
    "class_position": True,
    "positions": "learned",
    "position_grid": None,
    "final_norm": True,
    "fc_norm": False,
    "global_pool": "token",
    "pre_logits": None,
    "distilled": False,
}
"""The settings that distinguish the kinds, as the plain Vision Transformer has them."""


class OriginalViT(Layout):
    """What the original repositories of DINO, DINOv2, MAE and BEiT share: timm's names, and a norm epsilon of 1e-6.

    `wanted` are the settings that have one value in files of a kind, `resample` how its positions are stretched.
    """

    libraries = ("original",)
    family = "vit"
    untold = ("num_heads",)
    wanted: ClassVar[Mapping[str, Any]]
    resample: ClassVar[str]

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        kernel = shapes.of("patch_embed.proj.weight", 4)
        return {
            **self.wanted,
            "embed_dim": kernel[0],
            "in_chans": kernel[1],
            "patch_size": kernel[2:],
            "depth": shapes.count(r"blocks\.(\d+)\."),
            "mlp_dim": shapes.of(f"blocks.0.mlp.{self.hidden(shapes)}.bias", 1)[0],
            "qkv_bias": shapes.count(r"blocks\.(\d+)\.attn\.qkv\.bias") > 0,
            "norm_eps": 1e-6,
            "position_resample": self.resample,
            "partial_patches": "drop",
            "num_classes": shapes.outputs("head.bias"),
            **({"patches": shapes.of("pos_embed", 3)[1] - 1} if "pos_embed" in shapes else {}),
        }

    def hidden(self, shapes: Shapes) -> str:
        """The layer that makes the hidden units."""
        return "fc1"

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = [
            *same("backbone.tokenizer.projection", "patch_embed.proj"),
            one("backbone.place.class_token", "cls_token"),
            *self.place(backbone),
        ]
        for i in range(backbone.depth):
            rules += self.layer(f"backbone.encoder.blocks.{i}", f"blocks.{i}", backbone)
        rules += same("backbone.norm", "norm") if backbone.final_norm else []
        rules += same("head.norm", "fc_norm") if head.fc_norm else []
        return rules + (same("head.classifier", "head") if head.num_classes else [])

    def place(self, backbone: Any) -> list[Rule]:
        """Positions and tokens besides the class token."""
        return [one("backbone.place.positions.table", "pos_embed")]

    def layer(self, ours: str, theirs: str, backbone: Any) -> list[Rule]:
        """One layer of the encoder."""
        return [
            *same(f"{ours}.norm1", f"{theirs}.norm1"),
            *same(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", backbone.qkv_bias and backbone.key_bias),
            *same(f"{ours}.attention.out", f"{theirs}.attn.proj"),
            *same(f"{ours}.norm2", f"{theirs}.norm2"),
            *self.mlp(f"{ours}.mlp", f"{theirs}.mlp", backbone),
        ]

    def mlp(self, ours: str, theirs: str, backbone: Any) -> list[Rule]:
        """The dense layers of one layer of the encoder."""
        return [*same(f"{ours}.fc1", f"{theirs}.fc1"), *same(f"{ours}.fc2", f"{theirs}.fc2")]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        eps = [] if backbone.norm_eps == 1e-6 else [f"norm_eps={backbone.norm_eps:g} (only 1e-06)"]
        return unlike(backbone, head, self.wanted) + eps


class TransformersKind(TransformersLayout):
    """What transformers' kinds of Vision Transformer share, under the names that files on the hub have.

    `wanted` are the settings that have one value in files of a kind, `resample` how positions are stretched.
    """

    family = "vit"
    untold = ("num_heads",)
    wanted: ClassVar[Mapping[str, Any]]
    resample: ClassVar[str] = "bicubic"
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
    }

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        kernel = shapes.of("embeddings.patch_embeddings.projection.weight", 4)
        return {
            **self.wanted,
            "embed_dim": kernel[0],
            "in_chans": kernel[1],
            "patch_size": kernel[2:],
            "depth": shapes.count(r"encoder\.layer\.(\d+)\."),
            "mlp_dim": shapes.of(f"encoder.layer.0.{self.hidden(shapes)}.bias", 1)[0],
            "qkv_bias": any(name.endswith(".attention.attention.query.bias") for name in shapes),
            "norm_eps": self.defaults["layer_norm_eps"],
            "position_resample": self.resample,
            "partial_patches": "drop",
            "num_classes": shapes.outputs("classifier.bias"),
        }

    def hidden(self, shapes: Shapes) -> str:
        """The layer that makes the hidden units."""
        return "intermediate.dense"

    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        told = common({"intermediate_size": None, "qkv_bias": None, **config}, shapes.where)
        told["drop_path_rate"] = config.get("drop_path_rate")
        absent = {"mlp_dim": "intermediate_size", "qkv_bias": "qkv_bias", "drop_path_rate": "drop_path_rate"}
        return {ours: value for ours, value in told.items() if absent.get(ours, "hidden_size") in self.defaults}

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = [
            *same("backbone.tokenizer.projection", "embeddings.patch_embeddings.projection"),
            one("backbone.place.class_token", "embeddings.cls_token"),
            *self.place(backbone),
        ]
        for i in range(backbone.depth):
            rules += self.layer(f"backbone.encoder.blocks.{i}", f"encoder.layer.{i}", backbone)
        rules += same("backbone.norm", "layernorm") if backbone.final_norm else []
        return rules + self.top(head)

    def place(self, backbone: Any) -> list[Rule]:
        """Positions and tokens besides the class token."""
        return [one("backbone.place.positions.table", "embeddings.position_embeddings")]

    def top(self, head: Any) -> list[Rule]:
        """What belongs to the head."""
        return same("head.classifier", "classifier") if head.num_classes else []

    def layer(self, ours: str, theirs: str, backbone: Any) -> list[Rule]:
        """One layer of the encoder."""
        return [
            *same(f"{ours}.norm1", f"{theirs}.layernorm_before"),
            *self.attention(f"{ours}.attention", f"{theirs}.attention", backbone),
            *same(f"{ours}.norm2", f"{theirs}.layernorm_after"),
            *same(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense"),
            *same(f"{ours}.mlp.fc2", f"{theirs}.output.dense"),
        ]

    def attention(self, ours: str, theirs: str, backbone: Any) -> list[Rule]:
        """The attention of one layer: three projections, which are one here, and the output's."""
        parts = (f"{theirs}.attention.{part}" for part in ("query", "key", "value"))
        return [
            *fused(f"{ours}.qkv", *parts, bias=backbone.qkv_bias and backbone.key_bias),
            *same(f"{ours}.out", f"{theirs}.output.dense"),
        ]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        return unlike(backbone, head, self.wanted)

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        config = {**written(backbone), "drop_path_rate": backbone.drop_path_rate}
        return {name: value for name, value in config.items() if name in self.defaults}
