"""DETR as the original repository and transformers store it (arXiv 2005.12872)."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sightline.checkpoints.resnet import TorchvisionResNet, TransformersResNet, only
from sightline.errors import UserError, printable
from sightline.layout import Layout, Rule, Shapes, TransformersLayout, fused, one, same

_WANTED: Mapping[str, Any] = {"block": "bottleneck", "frozen_norm": True}


class _Detr(Layout):
    """What both have in common: a residual network with frozen norms, and the transformer behind it."""

    family = "resnet"
    task = "detect"
    identity = ("block", "layers")
    untold = ("dilated",)
    dropped = r".*\.num_batches_tracked"

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        wanted = {**_WANTED, "queries_from": "learned", "padding": "alone"}
        settings = {**vars(backbone), **vars(head)}
        refused = [
            f"{name}={settings[name]!r} (only {only!r})" for name, only in wanted.items() if settings[name] != only
        ]
        return refused if len(backbone.layers) == 4 else [*refused, f"layers={backbone.layers} (only 4 stages)"]


def _flat(kernel: Tensor) -> tuple[Tensor]:
    return (kernel[:, :, 0, 0],)


def _kernel(matrix: Tensor) -> tuple[Tensor]:
    return (matrix[:, :, None, None],)


def _projection(theirs: str) -> list[Rule]:
    weight = Rule(("head.projection.weight",), (f"{theirs}.weight",), _flat, _kernel)
    return [weight, one("head.projection.bias", f"{theirs}.bias")]


def _placed(rules: list[Rule], before: str) -> list[Rule]:
    """The rules of a backbone, whose tensors lie deeper in a file."""
    own = [rule for rule in rules if rule.ours[0].startswith("backbone.")]
    return [Rule(rule.ours, tuple(before + name for name in rule.theirs), rule.load, rule.save) for rule in own]


class OriginalDetr(_Detr):
    """facebookresearch/detr: torchvision's names of the residual network, PyTorch's of the transformer's layers."""

    libraries = ("original",)
    body = "backbone.0.body."

    def recognises(self, shapes: Shapes) -> bool:
        return {"class_embed.weight", "input_proj.weight", "query_embed.weight"} <= shapes.keys()

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        inner = {name.removeprefix(self.body): shape for name, shape in shapes.items() if name.startswith(self.body)}
        settings = TorchvisionResNet().measure(Shapes(inner, shapes.where, shapes.named), image_size)
        settings = {name: settings[name] for name in ("block", "layers", "channels", "stem_chs", "in_chans")}
        queries, width = shapes.of("query_embed.weight", 2)
        hidden = shapes.of("transformer.decoder.layers.0.linear1.weight", 2)[0]
        return {
            **settings,
            "frozen_norm": True,
            "hidden_dim": width,
            "queries": queries,
            "encoder_layers": shapes.count(r"transformer\.encoder\.layers\.(\d+)\."),
            "decoder_layers": shapes.count(r"transformer\.decoder\.layers\.(\d+)\."),
            "decoder_mlp": hidden,
            "num_classes": shapes.of("class_embed.weight", 2)[0] - 1,
        }

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = _placed(TorchvisionResNet().rules(backbone, head), self.body)
        for i in range(head.encoder_layers):
            ours, theirs = f"head.encoder.{i}", f"transformer.encoder.layers.{i}"
            rules += _attention(f"{ours}.attention", f"{theirs}.self_attn")
            rules += _dense(ours, theirs, ("norm1", "norm2"))
        for i in range(head.decoder_layers):
            ours, theirs = f"head.decoder.{i}", f"transformer.decoder.layers.{i}"
            rules += _attention(f"{ours}.attention", f"{theirs}.self_attn")
            rules += _attention(f"{ours}.cross_attention", f"{theirs}.multihead_attn")
            rules += _dense(ours, theirs, ("norm1", "norm2", "norm3"))
        rules += [*same("head.norm", "transformer.decoder.norm"), *_projection("input_proj")]
        rules += [one("head.queries", "query_embed.weight"), *same("head.classifier", "class_embed")]
        return rules + [rule for i in range(3) for rule in same(f"head.box.fc{i + 1}", f"bbox_embed.layers.{i}")]


def _attention(ours: str, theirs: str) -> list[Rule]:
    joint = [one(f"{ours}.qkv.{part}", f"{theirs}.in_proj_{part}") for part in ("weight", "bias")]
    return [*joint, *same(f"{ours}.out", f"{theirs}.out_proj")]


def _dense(ours: str, theirs: str, norms: tuple[str, ...]) -> list[Rule]:
    rules = [*same(f"{ours}.mlp.fc1", f"{theirs}.linear1"), *same(f"{ours}.mlp.fc2", f"{theirs}.linear2")]
    return rules + [rule for norm in norms for rule in same(f"{ours}.{norm}", f"{theirs}.{norm}")]


class TransformersDetr(_Detr, TransformersLayout):
    """`DetrForObjectDetection`. Files from the hub have timm's names for the residual network, newer ones its own."""

    model_type = "detr"
    base = "model"
    outside = ("class_labels_classifier.", "bbox_predictor.")
    with_head = "DetrForObjectDetection"
    classes_of = "class_labels_classifier.bias"
    bare = "DetrModel"
    body = "backbone.conv_encoder.model."
    defaults: ClassVar[Mapping[str, Any]] = {
        "use_timm_backbone": True,
        "backbone": None,
        "backbone_config": None,
        "backbone_kwargs": None,
        "use_pretrained_backbone": True,
        "num_channels": 3,
        "num_queries": 100,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "d_model": 256,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "position_embedding_type": "sine",
        "dilation": False,
        "eos_coefficient": 0.1,
    }
    ignored = (
        *(
            "encoder_layerdrop",
            "decoder_layerdrop",
            "init_std",
            "init_xavier_std",
            "auxiliary_loss",
            "num_hidden_layers",
        ),
        *("class_cost", "bbox_cost", "giou_cost", "mask_loss_coefficient", "dice_loss_coefficient", "scale_embedding"),
        *("bbox_loss_coefficient", "giou_loss_coefficient", "classifier_dropout", "max_position_embeddings"),
    )
    _TIMM = (
        (r"conv1\.", "embedder.embedder.convolution."),
        (r"bn1\.", "embedder.embedder.normalization."),
    )

    def current(self, name: str) -> str:
        """Timm's names of a residual network as transformers' own."""
        if not name.startswith(self.body):
            return name
        rest = name.removeprefix(self.body)
        for pattern, now in self._TIMM:
            rest = re.sub(f"^{pattern}", now, rest)
        if found := re.match(r"layer(\d+)\.(\d+)\.(conv|bn)(\d+)\.(.*)", rest):
            stage, block, kind, part, end = found.groups()
            inner = {"conv": "convolution", "bn": "normalization"}[kind]
            rest = f"encoder.stages.{int(stage) - 1}.layers.{block}.layer.{int(part) - 1}.{inner}.{end}"
        elif found := re.match(r"layer(\d+)\.0\.downsample\.([01])\.(.*)", rest):
            stage, part, end = found.groups()
            inner = ("convolution", "normalization")[int(part)]
            rest = f"encoder.stages.{int(stage) - 1}.layers.0.shortcut.{inner}.{end}"
        return self.body + rest

    def recognises(self, shapes: Shapes) -> bool:
        return {"query_position_embeddings.weight", "input_projection.weight"} <= shapes.keys()

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        inner = {name.removeprefix(self.body): shape for name, shape in shapes.items() if name.startswith(self.body)}
        settings = TransformersResNet().measure(Shapes(inner, shapes.where, shapes.named), image_size)
        settings = {name: settings[name] for name in ("block", "layers", "channels", "stem_chs", "in_chans")}
        queries, width = shapes.of("query_position_embeddings.weight", 2)
        return {
            **settings,
            "frozen_norm": True,
            "hidden_dim": width,
            "queries": queries,
            "encoder_layers": shapes.count(r"encoder\.layers\.(\d+)\."),
            "decoder_layers": shapes.count(r"decoder\.layers\.(\d+)\."),
            "decoder_mlp": shapes.of("decoder.layers.0.fc1.weight", 2)[0],
            "num_classes": shapes.outputs("class_labels_classifier.bias") - 1,
        }

    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        where = shapes.where
        only(config, where, activation_function="relu", position_embedding_type="sine")
        for first, second in (
            ("encoder_attention_heads", "decoder_attention_heads"),
            ("encoder_ffn_dim", "decoder_ffn_dim"),
        ):
            if config[first] != config[second]:
                raise UserError(f"{where}: {first} {printable(config[first])} is not {second}, which is the same here")
        inner = config["backbone_config"] or {}
        if inner.get("model_type", "resnet") not in ("resnet", "timm_backbone"):
            raise UserError(f"{where}: the backbone {printable(inner['model_type'])} is not one that is read")
        return {
            "decoder_heads": config["decoder_attention_heads"],
            "decoder_mlp": config["decoder_ffn_dim"],
            "encoder_layers": config["encoder_layers"],
            "decoder_layers": config["decoder_layers"],
            "drop_rate": config["dropout"],
            "attn_drop": config["attention_dropout"],
            "queries": config["num_queries"],
            "hidden_dim": config["d_model"],
            "no_object_weight": config["eos_coefficient"],
            "dilated": bool(config["dilation"]) or (config["backbone_kwargs"] or {}).get("output_stride") == 16,
        }

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = _placed(TransformersResNet().rules(backbone, head), self.body)
        for i in range(head.encoder_layers):
            rules += _layer(f"head.encoder.{i}", f"encoder.layers.{i}", crossed=False)
        for i in range(head.decoder_layers):
            rules += _layer(f"head.decoder.{i}", f"decoder.layers.{i}", crossed=True)
        rules += [*same("head.norm", "decoder.layernorm"), *_projection("input_projection")]
        rules += [one("head.queries", "query_position_embeddings.weight")]
        rules += same("head.classifier", "class_labels_classifier")
        return rules + [rule for i in range(3) for rule in same(f"head.box.fc{i + 1}", f"bbox_predictor.layers.{i}")]

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        return {
            "use_timm_backbone": False,
            "backbone_config": {
                "model_type": "resnet",
                "out_features": [f"stage{len(backbone.layers)}"],
                "out_indices": [len(backbone.layers)],
                **TransformersResNet().config(backbone, head),
            },
            "num_channels": backbone.in_chans,
            "num_queries": head.queries,
            "encoder_layers": head.encoder_layers,
            "decoder_layers": head.decoder_layers,
            "encoder_ffn_dim": head.decoder_mlp,
            "decoder_ffn_dim": head.decoder_mlp,
            "encoder_attention_heads": head.decoder_heads,
            "decoder_attention_heads": head.decoder_heads,
            "d_model": head.hidden_dim,
            "dropout": head.drop_rate,
            "attention_dropout": head.attn_drop,
            "eos_coefficient": head.no_object_weight,
            "dilation": backbone.dilated,
        }

    def output(self, answer: Any, backbone: Any, head: Any) -> Any:
        return answer.logits, answer.pred_boxes


def _layer(ours: str, theirs: str, *, crossed: bool) -> list[Rule]:
    rules = _projected(f"{ours}.attention", f"{theirs}.self_attn")
    norms = {"norm1": "self_attn_layer_norm", "norm3" if crossed else "norm2": "final_layer_norm"}
    if crossed:
        rules += _projected(f"{ours}.cross_attention", f"{theirs}.encoder_attn")
        norms["norm2"] = "encoder_attn_layer_norm"
    rules += [*same(f"{ours}.mlp.fc1", f"{theirs}.fc1"), *same(f"{ours}.mlp.fc2", f"{theirs}.fc2")]
    return rules + [rule for mine, other in norms.items() for rule in same(f"{ours}.{mine}", f"{theirs}.{other}")]


def _projected(ours: str, theirs: str) -> list[Rule]:
    parts = (f"{theirs}.{part}_proj" for part in ("q", "k", "v"))
    return [*fused(f"{ours}.qkv", *parts), *same(f"{ours}.out", f"{theirs}.out_proj")]


LAYOUTS = {"original/detr": OriginalDetr(), "transformers/detr": TransformersDetr()}
