"""timm's Vision Transformers: directories with `config.json`, and bare `.safetensors` or `.pth` files."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
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
from sightline.images.interchange import from_timm, to_timm
from sightline.images.preprocess import Preprocess
from sightline.layout import Rule, same
from sightline.network import Architecture
from sightline.registry import variants
from sightline.schema import require

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}
_HALF = (0.5, 0.5, 0.5)
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_SAME = (  # arguments whose names and meanings are the same here
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "init_values",
    "class_token",
    "num_classes",
    "drop_rate",
    "pos_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
)
_AT_REST = {  # further arguments, and the values at which they change nothing
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "proj_bias": (True,),
    "reg_tokens": (0,),
    "pre_norm": (False,),
    "pool_include_prefix": (False,),
    "patch_drop_rate": (0, 0.0),
    "norm_layer": ("", "layernorm"),
    "embed_norm_layer": ("",),
    "fix_init": (True, False),
    "dynamic_img_size": (True, False),
    "strict_img_size": (True, False),
    "weight_init": ("", "skip", "reset", "jax", "jax_nlhb", "moco"),
}
_SECTIONS = {
    "architecture",
    "num_classes",
    "num_features",
    "global_pool",
    "model_args",
    "pretrained_cfg",
    "label_names",
}
_PUBLISHED = {  # what timm says of published weights
    *("architecture", "classifier", "crop_mode", "crop_pct", "custom_load", "description", "file", "first_conv"),
    *("fixed_input_size", "global_pool", "hf_hub_filename", "hf_hub_id", "input_size", "interpolation"),
    *("label_descriptions", "label_names", "label_offset", "labels", "license", "mean", "min_input_size", "notes"),
    *("num_classes", "num_features", "origin_url", "paper_ids", "paper_name", "pool_size", "pretrained", "source"),
    *("state_dict", "std", "tag", "test_crop_pct", "test_input_size", "test_pool_size", "url"),
}


class Timm(Scheme):
    """timm's names: the three projections of attention in one matrix, as here."""

    def recognises(self, stored: Stored) -> bool:
        if stored.config is not None:
            return (
                "architecture" in stored.config and "model_type" not in stored.config and "format" not in stored.config
            )
        return any(name.endswith("patch_embed.proj.weight") for name in stored.contents.tensors)

    def read(self, stored: Stored, request: Request) -> Reading:
        found = _unprefixed(stored)
        told, config = {}, stored.config or {}
        notes = (f"the prefix '{found.prefix}' taken off every name",) * bool(found.prefix)
        if stored.config is not None:
            config = _sections(config, stored.where)
            told = _told(config, stored.where)
        image_size = told.pop("image_size", None)
        bare_positions = told.pop("no_embed_class", None)
        facts, bare_positions = _facts(found, bare_positions, image_size or request.source_size or request.image_size)
        if stored.config is not None:
            name = str(config["architecture"]).split(".")[0]
            facts = replace(facts, image_size=image_size, architecture=name, told=told)
        architecture = stored_architecture(facts, request)
        rules = self._rules(architecture, class_row=not bare_positions)
        preprocess, labels = _preprocess(config, architecture), _labels(config, architecture)
        return Reading(architecture, rules, found, preprocess, labels, notes)

    def rules(self, architecture: Architecture) -> list[Rule]:
        return self._rules(architecture, class_row=True)

    def _rules(self, architecture: Architecture, *, class_row: bool) -> list[Rule]:
        config, head = architecture.backbone, architecture.head
        rules = same("backbone.tokenizer.projection", "patch_embed.proj")
        if config.class_token:
            rules.append(Rule(("backbone.place.class_token",), ("cls_token",)))
        if config.positions == "learned":
            table = ("backbone.place.positions.table",), ("pos_embed",)
            rules.append(Rule(*table) if class_row or not config.class_token else Rule(*table, _with_row, _without_row))
        for i in range(config.depth):
            rules += _block(f"backbone.encoder.blocks.{i}", f"blocks.{i}", config.qkv_bias, config.init_values)
        if config.final_norm:
            rules += same("backbone.norm", "norm")
        if head.fc_norm:
            rules += same("head.norm", "fc_norm")
        if head.pre_logits is not None:
            rules += same("head.pre_logits", "pre_logits.fc")
        if head.num_classes:
            rules += same("head.classifier", "head")
        return rules

    def refusals(self, architecture: Architecture, out: Path) -> list[str]:
        config, head = architecture.backbone, architecture.head
        refused = []
        if config.tokenizer != "patch" or config.norm != "pre":
            refused.append(f"tokenizer={config.tokenizer!r}, norm={config.norm!r} (only patches and pre-norm)")
        if config.positions not in ("learned", "none"):
            refused.append(f"positions={config.positions!r} (only learned ones or none)")
        if head.global_pool == "both" or (head.global_pool == "token" and not config.class_token):
            refused.append(f"global_pool={head.global_pool!r}")
        if head.pre_logits is not None:
            refused.append("pre_logits (timm leaves that layer out; num_classes=N replaces it and the classifier)")
        if head.fc_norm and config.final_norm:
            refused.append("final_norm and fc_norm together")
        if config.partial_patches == "pad" and not divides(config):
            refused.append("partial_patches='pad' at an image size that patches do not divide (only 'drop')")
        if not out.suffix and config.norm_eps != 1e-6:
            refused.append(
                f"norm_eps={config.norm_eps:g} (timm's configuration has 1e-06 only; norm_eps=1e-6 accepts it)"
            )
        if head.fc_norm and head.norm_eps != config.norm_eps:
            refused.append(f"norm_eps={head.norm_eps:g} of the head beside {config.norm_eps:g} of the backbone")
        return refused

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        return bare_file(tensors, out) or {
            out / "model.safetensors": safetensors_of(tensors),
            out / "config.json": json.dumps(_config(bundle), indent=2).encode(),
        }

    def remarks(self, bundle: Bundle, out: Path) -> list[str]:
        config = bundle.architecture.backbone
        remarks = super().remarks(bundle, out)
        if not out.suffix:
            if bundle.preprocess.kernel != "pillow":
                remarks.append("timm resizes with Pillow, which rounds otherwise than torch: up to 2/255")
            return remarks
        remarks += ["a bare file holds weights alone: class names and the pixel contract are not in it"]
        if config.norm_eps != 1e-6:
            remarks.append(f"build the model with norm_layer=partial(LayerNorm, eps={config.norm_eps:g})")
        if config.activation != "gelu":
            remarks.append(f"build the model with act_layer='{_ACTIVATIONS[config.activation]}'")
        return remarks

    def reference(self, bundle: Bundle, out: Path) -> Callable[[Tensor], Tensor] | None:
        if out.suffix or find_spec("timm") is None:
            return None
        import timm

        return timm.create_model(f"local-dir:{out}", pretrained=True).eval()


def _with_row(patches: Tensor) -> tuple[Tensor]:
    return (torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1),)


def _without_row(table: Tensor) -> tuple[Tensor]:
    return (table[:, 1:],)


def _block(ours: str, theirs: str, qkv_bias: bool, layer_scale: float | None) -> list[Rule]:
    qkv = same(f"{ours}.attention.qkv", f"{theirs}.attn.qkv")
    rules = [
        *same(f"{ours}.norm1", f"{theirs}.norm1"),
        *(qkv if qkv_bias else qkv[:1]),
        *same(f"{ours}.attention.out", f"{theirs}.attn.proj"),
        *same(f"{ours}.norm2", f"{theirs}.norm2"),
        *same(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1"),
        *same(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2"),
    ]
    if layer_scale is not None:
        rules += [Rule((f"{ours}.scale{k}.gamma",), (f"{theirs}.ls{k}.gamma",)) for k in (1, 2)]
    return rules


def _unprefixed(stored: Stored) -> Found:
    """The names without what wrappers put before all of them."""
    names, prefix = list(stored.contents.tensors), ""
    while outer := next((p for p in _PREFIXES if all(name.startswith(prefix + p) for name in names)), None):
        prefix += outer
    tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.contents.tensors.items()}
    return Found(stored.where, tensors, prefix)


def _facts(found: Found, bare_positions: bool | None, size: tuple[int, int] | None) -> tuple[Facts, bool]:
    """What the tensors say, and whether the table of positions has no row for the class token.

    Where nobody tells, it is such a table if it has a row for every patch of the image size and none besides.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
    for name, axes in (("patch_embed.proj.weight", 4), ("blocks.0.mlp.fc1.weight", 2)):
        if len(shapes.get(name, ())) != axes:
            state = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
            raise UserError(f"{found.where}: tensor {found.named(name)} {state}; {axes} axes are expected")
    kernel = shapes["patch_embed.proj.weight"]
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d{1,6})\.", name))}
    token = "cls_token" in shapes
    table = shapes.get("pos_embed")
    if table is not None and len(table) != 3:
        raise UserError(
            f"{found.where}: tensor {found.named('pos_embed')} has shape {list(table)}; 3 axes are expected"
        )
    rows = table[1] if table is not None else None
    if bare_positions is None:
        grid = None if size is None else (size[0] // kernel[2]) * (size[1] // kernel[3])
        bare_positions = token and rows is not None and rows == grid
    pooled = "fc_norm.weight" in shapes
    settings = {
        "embed_dim": kernel[0],
        "in_chans": kernel[1],
        "patch_size": kernel[2:],
        "depth": len(blocks),
        "mlp_dim": shapes["blocks.0.mlp.fc1.weight"][0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in shapes else None,
        "class_token": token,
        "positions": "learned" if rows is not None else "none",
        "final_norm": "norm.weight" in shapes or not pooled,
        "global_pool": "avg" if pooled or not token else "token",
        "fc_norm": pooled,
        "num_classes": shapes["head.weight"][0] if len(shapes.get("head.weight", ())) == 2 else 0,
        "norm_eps": 1e-6,
        "position_resample": "bicubic_antialias",
        "partial_patches": "drop",
    }
    patches = None if rows is None else rows - int(token and not bare_positions)
    return Facts(found.where, len(shapes), settings, patches), bool(bare_positions)


def _sections(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration in its present form: older ones are one flat dictionary."""
    found = dict(config) if "pretrained_cfg" in config else {**config, "pretrained_cfg": dict(config)}
    for key in ("pretrained_cfg", "model_args"):
        found.setdefault(key, {})
        require(isinstance(found[key], dict), f"{where}: '{key}' in config.json is not an object")
    for key in (*config, *found["pretrained_cfg"]):
        # Nothing unknown is passed over: it might say that the network computes otherwise, or ask for code.
        known = key in _SECTIONS or key in _PUBLISHED
        require(known, f"{where}: '{printable(key)}' in config.json is unknown.{suggest(key, _PUBLISHED)}")
    require(isinstance(found["architecture"], str), f"{where}: 'architecture' in config.json is not text")
    return found


def _told(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings that a configuration names, under our names. Raises UserError for those that have no counterpart."""
    pretrained, arguments = config["pretrained_cfg"], dict(config["model_args"])
    count = config.get("num_classes", pretrained.get("num_classes"))
    told: dict[str, Any] = {} if count is None else {"num_classes": count}
    size = arguments.pop("img_size", None) or (pretrained.get("input_size") or (None,))[1:]
    if size:
        told["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    require(
        "image_size" not in told
        or (len(told["image_size"]) == 2 and all(isinstance(n, int) for n in told["image_size"])),
        f"{where}: the image size in config.json is not two whole numbers",
    )
    pool = arguments.pop("global_pool", None) or pretrained.get("global_pool") or "token"
    require(pool in ("token", "avg"), f"{where}: global_pool '{printable(pool)}' has no counterpart here")
    given, final = arguments.pop("fc_norm", None), arguments.pop("final_norm", True)
    behind = pool == "avg" if given is None else bool(given)
    told |= {"global_pool": pool, "fc_norm": bool(final) and behind, "final_norm": bool(final) and not behind}
    for name, value in arguments.items():
        _translate(name, value, told, where)
    return told


def _translate(name: str, value: Any, told: dict[str, Any], where: str) -> None:
    """One argument of a timm model, written into `told` under our name."""
    if value is None:
        return
    if name in _SAME:
        told[name] = value
    elif name == "patch_size":
        told["patch_size"] = (value, value) if isinstance(value, int) else tuple(value)
    elif name == "act_layer":
        activation = str(value).lower().replace("gelutanh", "gelu_tanh").replace("quickgelu", "quick_gelu")
        require(activation in _ACTIVATIONS, f"{where}: act_layer '{printable(value)}' has no counterpart here")
        told["activation"] = activation
    elif name == "pos_embed":
        told["positions"] = "learned" if value == "learn" else "none"
    elif name == "no_embed_class":
        told["no_embed_class"] = bool(value)
    elif name == "dynamic_img_pad":
        told["partial_patches"] = "pad" if value else "drop"
    elif name not in _AT_REST or value not in _AT_REST[name]:
        raise UserError(
            f"{where}: the model argument {printable(name)}={printable(repr(value))} has no counterpart here"
        )


def _preprocess(config: Mapping[str, Any], architecture: Architecture) -> Preprocess:
    if config:
        return from_timm(config["pretrained_cfg"]).at(architecture.backbone.image_size)
    row = variants().get(architecture.name)
    usual = row.preprocess if row is not None else {"crop_pct": 1.0, "mean": _HALF, "std": _HALF}
    return from_timm({"input_size": [3, *architecture.backbone.image_size], **usual})


def _labels(config: Mapping[str, Any], architecture: Architecture) -> tuple[str, ...] | None:
    if not config:
        return None
    names = config.get("label_names") or config["pretrained_cfg"].get("label_names")
    if isinstance(names, Mapping):
        ordered = [names.get(str(i)) for i in range(len(names))]
    else:
        ordered = list(names) if isinstance(names, list | tuple) else []
    count = architecture.head.num_classes
    complete = len(ordered) == count > 0 and all(isinstance(name, str) for name in ordered)
    return tuple(ordered) if complete else None


def _config(bundle: Bundle) -> dict[str, Any]:
    """A `config.json` from which timm builds the network: every setting is named, whatever the architecture's own."""
    architecture, config, head = bundle.architecture, bundle.architecture.backbone, bundle.architecture.head
    row = variants().get(architecture.name)
    known = row is not None and "timm" in row.sources
    arguments: dict[str, Any] = {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size[0] if len(set(config.patch_size)) == 1 else list(config.patch_size),
        "mlp_ratio": _ratio(config.hidden, config.embed_dim),
        "pos_embed": "learn" if config.positions == "learned" else "none",
        "final_norm": config.final_norm or head.fc_norm,
        "fc_norm": head.fc_norm,
        "global_pool": head.global_pool,
        **{name: getattr(config, name) for name in _SAME if hasattr(config, name) and name != "mlp_ratio"},
    }
    if config.activation != "gelu":
        arguments["act_layer"] = _ACTIVATIONS[config.activation]
    pretrained = {
        **to_timm(bundle.preprocess),
        "input_size": [config.in_chans, *config.image_size],
        "fixed_input_size": True,
        "num_classes": head.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    found = {
        "architecture": architecture.name if known else "vit_base_patch16_224",
        "num_classes": head.num_classes,
        "num_features": config.embed_dim,
        "global_pool": head.global_pool,
        "model_args": {name: value for name, value in arguments.items() if value is not None},
        "pretrained_cfg": pretrained,
    }
    return found if not bundle.named else {**found, "label_names": list(bundle.labels)}


def _ratio(hidden: int, width: int) -> float:
    """A ratio whose product with `width`, cut to a whole number as timm does it, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


SCHEMES: Mapping[str, Scheme] = {"timm": Timm()}
