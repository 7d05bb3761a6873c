"""Swin Transformers as timm, transformers, torchvision and the original repository store them (arXiv 2103.14030)."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from sightline.backbones.swin import SwinConfig
from sightline.checkpoints.measure import divides
from sightline.checkpoints.transformers_vit import ACTIVATIONS
from sightline.errors import UserError, printable
from sightline.layers.positions import relative_index
from sightline.layout import Layout, Rule, Shapes, TimmLayout, TransformersLayout, fused, one, same

_TOO = ("embed_dim", "depths", "num_heads", "mlp_ratio", "qkv_bias", "drop_path_rate")  # transformers' words too
_TOLD = ("patch_size", "in_chans", *_TOO, "proj_drop_rate", "attn_drop_rate", "window_size")  # and timm's
Settings = Mapping[str, Any]
Size = tuple[int, int]


class _Swin(Layout):
    """What all have in common: for each of our parts theirs, by the original names, and how they fit windows.

    In `block` and `merging` stages count from 0, and patch merging stands before its stage: `{before}` is the stage
    before it, `{even}` and `{odd}` are twice the stage and 1 more. `fits` are settings of ours by which the library
    computes at every image size, `only` others that have one value in it.
    """

    family = "swin"
    identity = ("embed_dim", "depths", "window_size")

    patches: ClassVar[str] = "patch_embed.proj"
    patch_norm: ClassVar[str] = "patch_embed.norm"
    block: ClassVar[str] = "layers.{stage}.blocks.{i}"
    merging: ClassVar[str] = "layers.{before}.downsample"
    final: ClassVar[str] = "norm"
    classifier: ClassVar[str] = "head"
    table: ClassVar[str] = "attn.relative_position_bias_table"
    parts: ClassVar[Mapping[str, str]] = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attention.out": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    fits: ClassVar[Settings]
    only: ClassVar[Settings] = {"activation": "gelu", "norm_eps": 1e-5}

    def recognises(self, shapes: Shapes) -> bool:
        return f"{self._block(0, 0)}.{self.table}" in shapes

    def measure(self, shapes: Shapes, image_size: Size | None) -> dict[str, Any]:
        width, channels, *sides = shapes.of(f"{self.patches}.weight", 4)
        shapes.of(f"{self._block(0, 0)}.{self.table}", 2)  # at least one stage
        depths: list[int] = []
        while depth := shapes.count(re.escape(self._block(len(depths), "@")).replace("@", r"(\d+)") + r"\."):
            depths.append(depth)
        firsts = [self._block(stage, 0) for stage in range(len(depths))]
        tables = [shapes.of(f"{first}.{self.table}", 2) for first in firsts]
        hidden = shapes.of(f"{firsts[-1]}.{self.parts['mlp.fc1']}.weight", 2)[0]
        patch = (sides[0], sides[1])
        return {
            "in_chans": channels,
            "patch_size": patch,
            "embed_dim": width,
            "depths": tuple(depths),
            "num_heads": tuple(heads for _, heads in tables),
            "mlp_ratio": _ratio(hidden, width * 2 ** (len(depths) - 1)),
            "qkv_bias": any(name.endswith(("attn.qkv.bias", "attention.self.query.bias")) for name in shapes),
            "norm_eps": 1e-5,
            "global_pool": "avg",
            "num_classes": shapes.outputs(f"{self.classifier}.bias"),
            **self.fits,
            **self._windows([rows for rows, _ in tables], patch, image_size),
        }

    def _windows(self, tables: list[int], patch: Size, image_size: Size | None) -> dict[str, Any]:
        """The largest windows, from the rows of each stage's table; nothing where these do not tell.

        Where tables shrink with the image, the windows are those that shrink to just these at the size it was made for.
        If that is not `image_size`, it is taken to be the one whose last grid is a window.
        """
        sides = [(math.isqrt(rows) + 1) // 2 if math.isqrt(rows) ** 2 == rows else 0 for rows in tables]
        if self.fits["window_fit"] in ("image_size", "side") and not self.fits["full_table"]:
            last = sides[-1] * 2 ** (len(tables) - 1)
            sizes = [size for size in (image_size, (last * patch[0], last * patch[1])) if size and min(size) > 0]
            for size, side in product(sizes, range(1, 33)):
                if self._tables(len(tables), image_size=size, patch_size=patch, window_size=(side, side)) == tables:
                    return {"window_size": (side, side), "image_size": size}
        return {"window_size": (max(sides),) * 2} if max(sides) else {}

    def _tables(self, stages: int, **settings: Any) -> list[int]:
        config = SwinConfig(embed_dim=1, depths=(1,) * stages, num_heads=(1,) * stages, **self.fits, **settings)
        windows = [config.table(stage) for stage in range(stages)]
        return [(2 * rows - 1) * (2 * columns - 1) for rows, columns in windows]

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = [
            *same("backbone.tokenizer.projection", self.patches),
            *same("backbone.patch_norm", self.patch_norm),
            *same("backbone.norm", self.final),
        ]
        for stage, depth in enumerate(backbone.depths):
            if stage > 0:
                ours = f"backbone.layers.{stage}.downsample"
                theirs = self.merging.format(stage=stage, before=stage - 1, even=2 * stage)
                rules += same(f"{ours}.norm", f"{theirs}.norm")
                rules += same(f"{ours}.reduction", f"{theirs}.reduction", bias=False)
            for i in range(depth):
                ours, theirs = f"backbone.layers.{stage}.blocks.{i}", self._block(stage, i)
                rules.append(one(f"{ours}.relative.table", f"{theirs}.{self.table}"))
                rules += self._projections(f"{ours}.attention.qkv", theirs, backbone.qkv_bias)
                rules += [
                    rule for mine, other in self.parts.items() for rule in same(f"{ours}.{mine}", f"{theirs}.{other}")
                ]
        return rules + (same("head.classifier", self.classifier) if head.num_classes else [])

    def _projections(self, ours: str, block: str, bias: bool) -> list[Rule]:
        return same(ours, f"{block}.attn.qkv", bias)

    def _block(self, stage: int, i: int | str) -> str:
        return self.block.format(stage=stage, odd=2 * stage + 1, i=i)

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        settings = vars(backbone)
        refused = [
            f"{name}={settings[name]!r} (only {only!r})" for name, only in self.only.items() if settings[name] != only
        ]
        if head.global_pool != "avg" or head.fc_norm or head.pre_logits is not None or head.distilled:
            refused.append("a head other than one dense layer on the mean of the tokens")
        return refused + self._refused_windows(backbone)

    def _refused_windows(self, config: SwinConfig) -> list[str]:
        """Settings by which the library would answer otherwise for an image of the size it was made for."""
        fits = self._fits(config)
        if fits["window_fit"] == "side" and config.window_size[0] != config.window_size[1]:
            return [f"window_size={config.window_size} (only squares)"]
        theirs = replace(config, **fits)
        unlike = set()
        if config.grids != theirs.grids or not divides(config):
            unlike.add("partial_patches")
        for stage, (grid, depth) in enumerate(zip(config.grids, config.depths, strict=True)):
            if config.table(stage) != theirs.table(stage):
                unlike.add("full_table")
            for shifted in (False, True)[:depth]:
                mine, other = config.windows(stage, grid, shifted), theirs.windows(stage, grid, shifted)
                if (mine.window, mine.shift) != (other.window, other.shift):
                    unlike.add("window_fit")
                if mine.padded != grid:
                    unlike.add("padding")
        size = f"{config.image_size[0]}×{config.image_size[1]} pixels"
        return [
            f"{name}={getattr(config, name)!r} with images of {size} (only {value!r})"
            for name, value in fits.items()
            if name in unlike and getattr(config, name) != value
        ]

    def _fits(self, config: SwinConfig) -> dict[str, Any]:
        return {name: value for name, value in self.fits.items() if name != "position_resample"}

    def remarks(self, backbone: Any, head: Any) -> list[str]:
        if all(getattr(backbone, name) == value for name, value in self._fits(backbone).items()):
            return []
        height, width = backbone.image_size
        return [f"images of another size than {height}×{width} pixels get windows as {self.libraries[0]} fits them"]


class TimmSwin(_Swin, TimmLayout):
    """Patch merging belongs to the stage it leads to; tables are as small as the windows at the image size."""

    merging = "layers.{stage}.downsample"
    classifier = "head.fc"
    same = (*_TOLD, "drop_rate")
    at_rest: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "strict_img_size": (True, False),
        "dynamic_img_size": (True, False),
        "norm_layer": ("", "layernorm", "LayerNorm"),
        "weight_init": ("", "skip", "reset", "jax", "jax_nlhb", "moco"),
    }
    fits: ClassVar[Settings] = {
        "window_fit": "image_size",
        "padding": "seen_after_shift",
        "full_table": False,
        "partial_patches": "drop",
        "position_resample": "geometric_linear",
    }

    def recognises(self, shapes: Shapes) -> bool:
        return super().recognises(shapes) and not _moved(shapes)

    def told(self, arguments: Settings, where: str) -> dict[str, Any]:
        arguments = dict(arguments)
        always = arguments.pop("always_partition", None)
        window = arguments.get("window_size")
        if isinstance(window, list | tuple) and not (
            len(window) == 2 and all(isinstance(side, int) for side in window)
        ):
            stages = [list(stage) if isinstance(stage, list | tuple) else [stage, stage] for stage in window]
            if not stages or any(stage != stages[0] for stage in stages):
                raise UserError(f"{where}: windows that differ from stage to stage have no counterpart here")
            arguments["window_size"] = stages[0]
        told = super().told(arguments, where)
        return told if always is None else {**told, "window_fit": "always" if always else "image_size"}

    def arguments(self, backbone: Any, head: Any) -> tuple[str, dict[str, Any]]:
        arguments = {name: getattr(backbone, name) for name in _TOLD}
        arguments |= {"drop_rate": head.drop_rate, "always_partition": backbone.window_fit == "always"}
        return "swin_tiny_patch4_window7_224", _listed(arguments)

    def _fits(self, config: SwinConfig) -> dict[str, Any]:
        always = {"window_fit": "always"} if config.window_fit == "always" else {}
        return super()._fits(config) | always


class OriginalSwin(_Swin):
    """Everything has to divide: the original code pads nothing."""

    libraries = ("original",)
    dropped = r"layers\.\d+\.blocks\.\d+\.(attn_mask|attn\.relative_position_index)"
    fits: ClassVar[Settings] = {
        "window_fit": "side",
        "padding": "hidden",
        "full_table": False,
        "partial_patches": "drop",
        "position_resample": "bicubic",
    }

    def recognises(self, shapes: Shapes) -> bool:
        return super().recognises(shapes) and _moved(shapes)

    def _refused_windows(self, config: SwinConfig) -> list[str]:
        refused = super()._refused_windows(config)
        plain = [config.windows(stage, grid, shifted=False) for stage, grid in enumerate(config.grids)]
        if any(windows.padded != windows.grid for windows in plain):
            refused.append("windows that do not divide the tokens")
        if any(side % 2 for grid in config.grids[:-1] for side in grid):
            refused.append("patch merging of odd rows or columns")
        return refused

    def extras(self, backbone: Any, head: Any) -> dict[str, Tensor]:
        extras = {}
        for stage, i in _blocks(backbone):
            windows = backbone.windows(stage, backbone.grids[stage], shifted=i % 2 == 1)
            extras[f"{self._block(stage, i)}.attn.relative_position_index"] = relative_index(windows.window, 0)
            if (mask := windows.mask(torch.device("cpu"))) is not None:
                extras[f"{self._block(stage, i)}.attn_mask"] = mask[:, 0]
        return extras


class TorchvisionSwin(_Swin):
    """Stages and patch merging take turns in one list; windows keep their size, padded."""

    libraries = ("torchvision",)
    patches = "features.0.0"
    patch_norm = "features.0.2"
    block = "features.{odd}.{i}"
    merging = "features.{even}"
    parts: ClassVar[Mapping[str, str]] = {**_Swin.parts, "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
    dropped = r"features\.\d+\.\d+\.attn\.relative_position_index"
    fits: ClassVar[Settings] = {"window_fit": "never", "padding": "seen", "partial_patches": "drop"}
    only: ClassVar[Settings] = {**_Swin.only, "in_chans": 3, "qkv_bias": True}

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        lacking = ["num_classes=0 (torchvision always has a classifier)"] * (not head.num_classes)
        return super().refusals(backbone, head) + lacking

    def extras(self, backbone: Any, head: Any) -> dict[str, Tensor]:
        index = relative_index(backbone.window_size, 0).flatten()
        return {f"{self._block(*at)}.attn.relative_position_index": index.clone() for at in _blocks(backbone)}


class TransformersSwin(_Swin, TransformersLayout):
    """Query, key and value apart; tables are for whole windows, and a grid smaller than one is an error there."""

    model_type = "swin"
    base = "swin"
    with_head = "SwinForImageClassification"
    bare = "SwinModel"
    defaults: ClassVar[Settings] = {
        "image_size": 224,
        "patch_size": 4,
        "num_channels": 3,
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.1,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "layer_norm_eps": 1e-5,
    }
    ignored = (
        *("encoder_stride", "hidden_size", "num_layers", "num_hidden_layers", "num_attention_heads", "path_norm"),
        *("out_features", "out_indices", "stage_names", "_out_features", "_out_indices"),
    )

    patches = "embeddings.patch_embeddings.projection"
    patch_norm = "embeddings.norm"
    block = "encoder.layers.{stage}.blocks.{i}"
    merging = "encoder.layers.{before}.downsample"
    final = "layernorm"
    classifier = "classifier"
    table = "attention.self.relative_position_bias_table"
    parts: ClassVar[Mapping[str, str]] = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attention.out": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    dropped = r"encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.relative_position_index|embeddings\.mask_token"
    fits: ClassVar[Settings] = {"window_fit": "side", "padding": "seen", "full_table": True, "partial_patches": "pad"}
    only: ClassVar[Settings] = {}

    def _projections(self, ours: str, block: str, bias: bool) -> list[Rule]:
        return fused(ours, *(f"{block}.attention.self.{part}" for part in ("query", "key", "value")), bias=bias)

    def told(self, config: Settings, shapes: Shapes) -> dict[str, Any]:
        activation = config["hidden_act"]
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise UserError(f"{shapes.where}: hidden_act '{printable(activation)}' has no counterpart here")
        if config["use_absolute_embeddings"]:
            raise UserError(f"{shapes.where}: use_absolute_embeddings has no counterpart here")
        return {
            "image_size": _pair(config["image_size"]),
            "patch_size": _pair(config["patch_size"]),
            "window_size": _pair(config["window_size"]),
            "in_chans": config["num_channels"],
            "norm_eps": config["layer_norm_eps"],
            "activation": ACTIVATIONS[activation],
            "pos_drop_rate": config["hidden_dropout_prob"],
            "proj_drop_rate": config["hidden_dropout_prob"],
            "attn_drop_rate": config["attention_probs_dropout_prob"],
            **{name: config[name] for name in _TOO},
        }

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        return {
            "image_size": _plain(backbone.image_size),
            "patch_size": _plain(backbone.patch_size),
            "num_channels": backbone.in_chans,
            "window_size": backbone.window_size[0],
            "hidden_dropout_prob": backbone.proj_drop_rate,
            "attention_probs_dropout_prob": backbone.attn_drop_rate,
            "hidden_act": names[backbone.activation],
            "use_absolute_embeddings": False,
            "layer_norm_eps": backbone.norm_eps,
            **_listed({name: getattr(backbone, name) for name in _TOO}),
        }

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        small = min(side for grid in backbone.grids for side in grid) < max(backbone.window_size)
        return super().refusals(backbone, head) + ["windows that are larger than a grid of tokens"] * small


def _blocks(backbone: SwinConfig) -> list[tuple[int, int]]:
    """Each layer as its stage and its number there."""
    return [(stage, i) for stage, depth in enumerate(backbone.depths) for i in range(depth)]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value, value)


def _plain(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


def _listed(settings: Settings) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _ratio(hidden: int, width: int) -> float:
    """A ratio whose product with `width`, cut to a whole number, is `hidden`; and so for the stages before."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _moved(shapes: Shapes) -> bool:
    """Whether patch merging stands at the end of a stage, or the classifier bare, as in the original code."""
    return "layers.0.downsample.reduction.weight" in shapes or "head.weight" in shapes


LAYOUTS = {
    "timm/swin": TimmSwin(),
    "transformers/swin": TransformersSwin(),
    "torchvision/swin": TorchvisionSwin(),
    "original/swin": OriginalSwin(),
}
