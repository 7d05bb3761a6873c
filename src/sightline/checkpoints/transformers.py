"""transformers' `ViTModel` and `ViTForImageClassification`, under the names that files on the hub have.

Releases 5 and newer call their parameters otherwise in memory, and translate when they read and write.
"""

import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sightline.checkpoints.files import bare_file, safetensors_of
from sightline.checkpoints.measure import Facts, divides, stored_architecture
from sightline.checkpoints.rules import Found
from sightline.checkpoints.scheme import Bundle, Content, Reading, Request, Scheme, Stored
from sightline.errors import UserError, printable, suggest
from sightline.images.interchange import from_transformers, to_transformers
from sightline.images.preprocess import Preprocess
from sightline.layout import Rule, same
from sightline.network import Architecture
from sightline.schema import require

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_WRITTEN = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
_PATCHES = "embeddings.patch_embeddings.projection.weight"
_UNUSED = ("embeddings.mask_token", "embeddings.position_ids")


class Transformers(Scheme):
    """Query, key and value apart, and every name in full."""

    def recognises(self, stored: Stored) -> bool:
        if stored.config is not None:
            return "model_type" in stored.config
        return any(name.endswith(_PATCHES) for name in stored.contents.tensors)

    def read(self, stored: Stored, request: Request) -> Reading:
        prefix = "vit." if f"vit.{_PATCHES}" in stored.contents.tensors else ""
        kind = _kind(stored)
        facts, bare = _facts(stored, prefix, kind)
        notes = ("no config.json: a norm epsilon of 1e-12 and exact GELU are taken, as transformers does",) * bare
        architecture = stored_architecture(facts, request)
        found = _used(stored, prefix, kind)
        size = architecture.backbone.image_size
        processor = {"size": {"height": size[0], "width": size[1]}} if stored.processor is None else stored.processor
        preprocess = from_transformers(processor).at(size)
        labels = _labels(stored.config or {}, architecture.head.num_classes, stored.where)
        return Reading(architecture, self._rules(architecture, prefix), found, preprocess, labels, notes)

    def rules(self, architecture: Architecture) -> list[Rule]:
        return self._rules(architecture, "vit." if architecture.head.num_classes else "")

    def _rules(self, architecture: Architecture, prefix: str) -> list[Rule]:
        config, head = architecture.backbone, architecture.head
        rules = [
            *same("backbone.tokenizer.projection", f"{prefix}embeddings.patch_embeddings.projection"),
            Rule(("backbone.place.class_token",), (f"{prefix}embeddings.cls_token",)),
            Rule(("backbone.place.positions.table",), (f"{prefix}embeddings.position_embeddings",)),
        ]
        for i in range(config.depth):
            rules += _block(f"backbone.encoder.blocks.{i}", f"{prefix}encoder.layer.{i}", config.qkv_bias)
        rules += same("backbone.norm", f"{prefix}layernorm")
        if head.pre_logits is not None:
            rules += same("head.pre_logits", f"{prefix}pooler.dense")
        if head.num_classes:
            rules += same("head.classifier", "classifier")
        return rules

    def refusals(self, architecture: Architecture, out: Path) -> list[str]:
        config, head = architecture.backbone, architecture.head
        wanted: dict[str, tuple[Any, Any]] = {
            "tokenizer": (config.tokenizer, "patch"),
            "norm": (config.norm, "pre"),
            "init_values": (config.init_values, None),
            "positions": (config.positions, "learned"),
            "class_token": (config.class_token, True),
            "final_norm": (config.final_norm, True),
            "fc_norm": (head.fc_norm, False),
            "global_pool": (head.global_pool, "token"),
        }
        refused = [f"{name}={value!r} (only {only!r})" for name, (value, only) in wanted.items() if value != only]
        if head.pre_logits is not None and head.num_classes:
            refused.append("pre_logits before a classifier (num_classes=0 or another number of classes leaves it out)")
        if config.partial_patches == "pad" and not divides(config):
            refused.append("partial_patches='pad' at an image size that patches do not divide (only 'drop')")
        return refused

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        if bare := bare_file(tensors, out):
            return bare
        files: dict[Path, Content] = {out / "model.safetensors": safetensors_of(tensors)}
        processor, _ = _processor(bundle.preprocess)
        if processor is not None:
            files[out / "preprocessor_config.json"] = json.dumps(processor, indent=2).encode()
        return {**files, out / "config.json": json.dumps(_config(bundle), indent=2).encode()}

    def remarks(self, bundle: Bundle, out: Path) -> list[str]:
        config, head = bundle.architecture.backbone, bundle.architecture.head
        _, refusal = _processor(bundle.preprocess)
        remarks = super().remarks(bundle, out)
        if refusal is not None:
            remarks.append(f"preprocessor_config.json left out: {refusal}")
        if config.drop_path_rate:
            remarks.append(f"drop_path_rate={config.drop_path_rate:g}, which acts in training only, has no counterpart")
        if not head.num_classes and head.pre_logits is None:
            remarks.append("open it with ViTModel.from_pretrained(…, add_pooling_layer=False)")
        return remarks

    def reference(self, bundle: Bundle, out: Path) -> Callable[[Tensor], Tensor] | None:
        if out.suffix or find_spec("transformers") is None:
            return None
        import transformers

        head = bundle.architecture.head
        if head.num_classes:
            model = transformers.ViTForImageClassification.from_pretrained(out).eval()
            return lambda pixels: model(pixels).logits
        model = transformers.ViTModel.from_pretrained(out, add_pooling_layer=head.pre_logits is not None).eval()
        if head.pre_logits is not None:
            return lambda pixels: model(pixels).pooler_output
        return lambda pixels: model(pixels).last_hidden_state[:, 0]


def _fuse(*parts: Tensor) -> tuple[Tensor]:
    return (torch.cat(parts),)


def _split(fused: Tensor) -> tuple[Tensor, ...]:
    return fused.chunk(3)


def _block(ours: str, theirs: str, qkv_bias: bool) -> list[Rule]:
    kinds = ("weight", "bias") if qkv_bias else ("weight",)
    parts = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
    return [
        *same(f"{ours}.norm1", f"{theirs}.layernorm_before"),
        *(Rule((f"{ours}.attention.qkv.{k}",), tuple(f"{p}.{k}" for p in parts), _fuse, _split) for k in kinds),
        *same(f"{ours}.attention.out", f"{theirs}.attention.output.dense"),
        *same(f"{ours}.norm2", f"{theirs}.layernorm_after"),
        *same(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense"),
        *same(f"{ours}.mlp.fc2", f"{theirs}.output.dense"),
    ]


def _kind(stored: Stored) -> str:
    """The class that the weights belong to: it decides whether there is a classifier and whether the pooler counts."""
    config = stored.config
    if config is None:
        return "ViTForImageClassification" if "classifier.weight" in stored.contents.tensors else "ViTModel"
    require("auto_map" not in config, f"{stored.where}: 'auto_map' asks for code from the folder, and none is ever run")
    model_type = config["model_type"]
    require(model_type == "vit", f"{stored.where}: model_type '{printable(model_type)}' is not one that is read (vit)")
    kinds = config.get("architectures") or []
    require(isinstance(kinds, list) and len(kinds) < 2, f"{stored.where}: 'architectures' is not a list of one name")
    kind = kinds[0] if kinds else "ViTForImageClassification"
    known = ("ViTForImageClassification", "ViTModel")
    require(kind in known, f"{stored.where}: architecture '{printable(kind)}' is not one of {', '.join(known)}")
    return kind


def _facts(stored: Stored, prefix: str, kind: str) -> tuple[Facts, bool]:
    """What the configuration says; without one, what the shapes and transformers' defaults say."""
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.contents.tensors.items()}
    kernel, table = shapes.get(prefix + _PATCHES, ()), shapes.get(f"{prefix}embeddings.position_embeddings", ())
    require(len(kernel) == 4, f"{stored.where}: tensor '{prefix}{_PATCHES}' is missing or has not 4 axes")
    require(len(table) == 3, f"{stored.where}: tensor '{prefix}embeddings.position_embeddings' is missing or misshapen")
    settings: dict[str, Any] = {"position_resample": "bicubic", "partial_patches": "drop"}
    pooler = f"{prefix}pooler.dense.weight" in shapes and kind == "ViTModel"
    classes = shapes.get("classifier.bias", (0,))[0] if kind != "ViTModel" else 0
    if stored.config is None:
        layers = {int(m[1]) for name in shapes if (m := re.match(rf"{prefix}encoder\.layer\.(\d{{1,6}})\.", name))}
        settings |= {
            "embed_dim": kernel[0],
            "in_chans": kernel[1],
            "patch_size": kernel[2:],
            "depth": len(layers),
            "mlp_dim": (shapes.get(f"{prefix}encoder.layer.0.intermediate.dense.bias") or (4 * kernel[0],))[0],
            "qkv_bias": f"{prefix}encoder.layer.0.attention.attention.query.bias" in shapes,
            "norm_eps": 1e-12,
            "num_classes": classes,
            "pre_logits": kernel[0] if pooler else None,
        }
        return Facts(stored.where, len(shapes), settings, table[1] - 1), True
    _refuse_unknown(stored.config, stored.where)
    config = {**_DEFAULTS, **stored.config}
    activation = config["hidden_act"]
    known = isinstance(activation, str) and activation in _ACTIVATIONS
    require(known, f"{stored.where}: hidden_act '{printable(activation)}' has no counterpart here")
    require(
        config["pooler_act"] == "tanh", f"{stored.where}: pooler_act '{printable(config['pooler_act'])}' is not tanh"
    )
    size = _pair(config["image_size"], "image_size", stored.where)
    settings |= {
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_dim": config["intermediate_size"],
        "in_chans": config["num_channels"],
        "patch_size": _pair(config["patch_size"], "patch_size", stored.where),
        "qkv_bias": config["qkv_bias"],
        "norm_eps": config["layer_norm_eps"],
        "activation": _ACTIVATIONS[activation],
        "attn_drop_rate": config["attention_probs_dropout_prob"],
        "proj_drop_rate": config["hidden_dropout_prob"],
        "pos_drop_rate": config["hidden_dropout_prob"],
        "num_classes": 0 if kind == "ViTModel" else _classes(stored.config, classes),
        "pre_logits": (config["pooler_output_size"] or config["hidden_size"]) if pooler else None,
    }
    return Facts(stored.where, len(shapes), {}, table[1] - 1, size, None, settings), False


_DEFAULTS: dict[str, Any] = {
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
"""What transformers takes where `config.json` is silent."""


_GENERIC = {  # what every configuration of transformers may carry and what changes no output here
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "_num_labels"),
    *("architectures", "chunk_size_feed_forward", "dtype", "encoder_stride", "finetuning_task", "id2label"),
    *("initializer_range", "is_encoder_decoder", "label2id", "license", "model_type", "num_labels"),
    *("output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "torchscript"),
    *("transformers_version", "use_cache", "use_bfloat16", "use_mask_token"),
}
_TEXTUAL = {  # settings of text generation, which older releases wrote into every file
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "is_decoder"),
    *("length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "output_scores", "pad_token_id", "prefix", "remove_invalid_values", "repetition_penalty"),
    *("return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature"),
    *(
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "top_k",
        "top_p",
        "typical_p",
        "gradient_checkpointing",
    ),
}
_EMPTY = {"pruned_heads": ({}, [], None), "tf_legacy_loss": (False, None)}  # known, and harmless where they say nothing


def _refuse_unknown(config: Mapping[str, Any], where: str) -> None:
    """Nothing unknown is passed over: it might say that the network computes otherwise, or ask for code."""
    for key, value in config.items():
        if key in _EMPTY:
            require(value in _EMPTY[key], f"{where}: '{key}' in config.json has no counterpart here")
        elif key not in _DEFAULTS and key not in _GENERIC and key not in _TEXTUAL:
            raise UserError(f"{where}: '{printable(key)}' in config.json is unknown.{suggest(key, _DEFAULTS)}")


def _pair(value: Any, name: str, where: str) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, list) else (value, value)
    whole = len(pair) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    require(whole, f"{where}: {name} {printable(value)} is not one or two whole numbers")
    return pair[0], pair[1]


def _classes(config: Mapping[str, Any], stored: int) -> int:
    """The number of classes that a configuration names, if it does."""
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, Mapping) else config.get("num_labels", stored)


def _labels(config: Mapping[str, Any], count: int, where: str) -> tuple[str, ...] | None:
    """The class names in order, unless they are the ones that transformers makes up."""
    labels = config.get("id2label")
    if not count or not isinstance(labels, Mapping):
        return None
    for i in range(count):
        name = labels.get(str(i))
        require(isinstance(name, str), f"{where}: 'id2label' in config.json has no name for class {i} of {count}")
    names = tuple(labels[str(i)] for i in range(count))
    return None if names == tuple(f"LABEL_{i}" for i in range(count)) else names


def _used(stored: Stored, prefix: str, kind: str) -> Found:
    """The tensors that the model computes with; a classifier does without the pooler that some files carry along."""
    unused = {prefix + name for name in _UNUSED}
    if kind == "ViTForImageClassification":
        unused |= {f"{prefix}pooler.dense.weight", f"{prefix}pooler.dense.bias"}
    tensors = stored.contents.tensors
    dropped = tuple(name for name in tensors if name in unused)
    return Found(stored.where, {name: t for name, t in tensors.items() if name not in unused}, dropped=dropped)


def _processor(preprocess: Preprocess) -> tuple[dict[str, Any] | None, str | None]:
    """The pixel contract as transformers writes it, or why it cannot: other pixels are never written in its place."""
    try:
        return to_transformers(preprocess), None
    except UserError as fault:
        return None, str(fault)


def _config(bundle: Bundle) -> dict[str, Any]:
    config, head = bundle.architecture.backbone, bundle.architecture.head
    square = len(set(config.image_size)) == 1 and len(set(config.patch_size)) == 1
    labels = bundle.labels if bundle.named else [f"LABEL_{i}" for i in range(head.num_classes)]
    named = {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    return {
        "architectures": ["ViTForImageClassification" if head.num_classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden,
        "hidden_act": _WRITTEN[config.activation],
        "hidden_dropout_prob": config.proj_drop_rate,
        "attention_probs_dropout_prob": config.attn_drop_rate,
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image_size[0] if square else list(config.image_size),
        "patch_size": config.patch_size[0] if square else list(config.patch_size),
        "num_channels": config.in_chans,
        "qkv_bias": config.qkv_bias,
        **({"pooler_output_size": head.pre_logits, "pooler_act": "tanh"} if head.pre_logits else {}),
        **(named if head.num_classes else {}),
        "dtype": "float32",
    }


SCHEMES: Mapping[str, Scheme] = {"transformers": Transformers()}
