"""open_clip: directories with `open_clip_config.json`, and bare files under the names of OpenAI's tensors."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from sightline.checkpoints.files import bare_file, safetensors_of
from sightline.checkpoints.library import Library, said
from sightline.checkpoints.openai import PIXELS, clip_pixels
from sightline.checkpoints.scheme import Bundle, Content, Reading, Request, Scheme, Stored
from sightline.checkpoints.transformers_vit import pair
from sightline.errors import UserError, printable, suggest
from sightline.images.preprocess import Preprocess
from sightline.network import Architecture
from sightline.schema import require
from sightline.texts.vocabularies import load_vocabulary

CONFIG = "open_clip_config.json"

_VISION: Mapping[str, Any] = {
    **{"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
}
_TEXT: Mapping[str, Any] = {
    **{"context_length": 77, "vocab_size": 49_408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
}
_AT_REST: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "model_cfg": {"custom_text": (False, True), "multimodal_cfg": (None,), "nonscalar_logit_scale": (False,)},
    "vision_cfg": {
        "ls_init_value": (None,),
        "patch_dropout": (0, 0.0),
        "attentional_pool": (False, ""),
        "no_ln_pre": (False,),
        "pos_embed_type": ("learnable",),
        "final_ln_after_pool": (False, True),  # the norm of the class token is the same before and after it is taken
        "pool_type": ("tok",),
        "output_tokens": (False, True),
        "block_type": (None, "default"),
    },
    "text_cfg": {
        "tokenizer_kwargs": (None, {}),
        "ls_init_value": (None,),
        "embed_cls": (False,),
        "no_causal_mask": (False,),
        "final_ln_after_pool": (False, True),
        "pool_type": ("argmax",),
        "proj_bias": (False,),
        "proj_type": ("linear",),
        "output_tokens": (False, True),
        "block_type": (None, "default"),
        "pad_id": (0,),
    },
}
"""Further settings, and the values at which they change nothing."""

_RESIZE = {"shortest": "crop", "squash": "squash", "longest": "pad"}


class OpenClip(Library):
    """A directory names every size and the activation; a bare file does not tell which of two activations it has."""

    name = "open_clip"

    def recognises(self, stored: Stored) -> bool:
        return "model_cfg" in stored.config if stored.config is not None else super().recognises(stored)

    def read(self, stored: Stored, request: Request) -> Reading:
        found = self.clean(stored)
        layout = self.matching(found)
        require(layout is not None, f"{stored.where} holds no CLIP that is read here")
        assert layout is not None
        beside: dict[str, Any] = {"tell": clip_pixels}
        if stored.config is not None:
            told, size = _told(stored.config["model_cfg"], stored.where)
            contract = _pixels(stored.config.get("preprocess_cfg") or {}, size, stored.where)
            beside = {"told": told, "image_size": size, "tell": lambda architecture: (contract, None)}
        reading = self.reading(found, layout, request, notes=said(found), **beside)
        return replace(reading, vocabulary=load_vocabulary(stored.folder, reading.architecture.head.vocab_size))

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        return bare_file(tensors, out) or {
            out / "open_clip_model.safetensors": safetensors_of(tensors),
            out / CONFIG: json.dumps(_config(bundle), indent=2).encode(),
        }

    def refusals(self, architecture: Architecture, out: Path) -> list[str]:
        found = super().refusals(architecture, out)
        if found or architecture.task != "clip":
            return found
        backbone = architecture.backbone
        found += [] if backbone.activation in ("gelu", "quick_gelu") else [f"activation={backbone.activation!r}"]
        found += [] if backbone.in_chans == 3 else [f"in_chans={backbone.in_chans} (only 3)"]
        rates = ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
        return found + [f"{name}={getattr(backbone, name):g}" for name in rates if getattr(backbone, name)]

    def remarks(self, bundle: Bundle, out: Path) -> list[str]:
        remarks = super().remarks(bundle, out)
        return remarks if out.suffix else [line for line in remarks if "does not tell" not in line]

    def reference(self, bundle: Bundle, out: Path) -> Callable[..., Any] | None:
        if out.suffix or find_spec("open_clip") is None:
            return None
        import open_clip

        model: Any = open_clip.create_model(f"local-dir:{out}").eval()

        def logits(pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            found = model.get_logits(pixels, ids)
            return found[0], found[1]

        return logits


def _settings(given: Any, name: str, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One part of the configuration, with defaults. Raises UserError for what has no counterpart."""
    require(isinstance(given, Mapping), f"{where}: '{name}' is not an object")
    at_rest = _AT_REST[name]
    for key, value in given.items():
        if key in known:
            whole = isinstance(value, (int, float, list)) and not isinstance(value, bool)
            require(whole, f"{where}: {name}: {key} {printable(value)} is not a number")
        elif key not in at_rest or value not in at_rest[key]:
            near = suggest(str(key), known)
            words = f"{where}: {name}: {printable(key)}={printable(repr(value))} has no counterpart here.{near}"
            raise UserError(words)
    return {**known, **{key: value for key, value in given.items() if key in known}}


def _told(model: Any, where: str) -> tuple[dict[str, Any], tuple[int, int]]:
    require(isinstance(model, Mapping), f"{where}: 'model_cfg' is not an object")
    rest = dict(model)
    vision = _settings(rest.pop("vision_cfg", {}), "vision_cfg", _VISION, where)
    text = _settings(rest.pop("text_cfg", {}), "text_cfg", _TEXT, where)
    quick, bias = rest.pop("quick_gelu", False), rest.pop("init_logit_bias", None)
    scale = rest.pop("init_logit_scale", None)
    require(isinstance(quick, bool), f"{where}: quick_gelu is not true or false")
    top = _settings(rest, "model_cfg", {"embed_dim": None}, where)
    patch = pair(vision["patch_size"], "patch_size", where)
    activation = "quick_gelu" if quick else "gelu"
    require(
        vision["head_width"] > 0 and vision["width"] % vision["head_width"] == 0, f"{where}: head_width does not fit"
    )
    told = {
        **{"embed_dim": vision["width"], "depth": vision["layers"], "patch_size": patch, "activation": activation},
        **{"num_heads": vision["width"] // vision["head_width"], "mlp_dim": int(vision["width"] * vision["mlp_ratio"])},
        **{"projection_dim": top["embed_dim"], "text_activation": activation},
        **{"context_length": text["context_length"], "vocab_size": text["vocab_size"], "text_width": text["width"]},
        **{"text_heads": text["heads"], "text_depth": text["layers"]},
        "text_mlp_dim": int(text["width"] * text["mlp_ratio"]),
        **({} if bias is None else {"logit_bias_init": float(bias)}),
        **({} if scale is None else {"logit_scale_init": float(scale)}),
    }
    return told, pair(vision["image_size"], "image_size", where)


def _pixels(given: Any, size: tuple[int, int], where: str) -> Preprocess:
    require(isinstance(given, Mapping), f"{where}: 'preprocess_cfg' is not an object")
    known = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
    for key in given:
        require(key in known, f"{where}: preprocess_cfg: '{printable(key)}' is unknown.{suggest(str(key), known)}")
    require(given.get("mode", "RGB") == "RGB", f"{where}: preprocess_cfg: mode {printable(given.get('mode'))}")
    mode, fill = given.get("resize_mode", "shortest"), given.get("fill_color", 0)
    require(mode in _RESIZE, f"{where}: preprocess_cfg: resize_mode '{printable(mode)}' has no counterpart here")
    settings = {"size": size, "resize": _RESIZE[mode], **PIXELS, "fill": (fill,) * 3}
    usual = {key: given[key] for key in ("mean", "std", "interpolation") if given.get(key) is not None}
    return Preprocess.from_json(settings | usual)


def _config(bundle: Bundle) -> dict[str, Any]:
    backbone, head, pixels = bundle.architecture.backbone, bundle.architecture.head, bundle.preprocess
    modes = {ours: theirs for theirs, ours in _RESIZE.items()}
    require(pixels.resize in modes, f"open_clip has no counterpart of: {pixels.describe()}")
    bias = {} if head.logit_bias_init is None else {"init_logit_bias": head.logit_bias_init}
    return {
        "model_cfg": {
            "embed_dim": head.projection_dim,
            "quick_gelu": backbone.activation == "quick_gelu",
            **bias,
            "vision_cfg": {
                **{"image_size": list(backbone.image_size), "layers": backbone.depth, "width": backbone.embed_dim},
                **{"head_width": backbone.embed_dim // backbone.num_heads, "patch_size": list(backbone.patch_size)},
                "mlp_ratio": backbone.hidden / backbone.embed_dim,
            },
            "text_cfg": {
                **{"context_length": head.context_length, "vocab_size": head.vocab_size, "width": head.text_width},
                **{"heads": head.text_heads, "layers": head.text_depth},
                "mlp_ratio": head.text_hidden / head.text_width,
            },
        },
        "preprocess_cfg": {
            **{"size": list(pixels.size), "mode": "RGB", "mean": list(pixels.mean), "std": list(pixels.std)},
            **{"interpolation": pixels.interpolation, "resize_mode": modes[pixels.resize], "fill_color": 0},
        },
    }


SCHEMES: Mapping[str, Scheme] = {"open_clip": OpenClip()}
