"""Hybrid Vision Transformers as timm and Google's `.npz` files store them: a residual network before the layers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from sightline.checkpoints.google_vit import GoogleViT, image_kernel, kernel_image, norm
from sightline.checkpoints.timm_vit import TimmViT
from sightline.layout import Layout, Rule, Shapes, same
from sightline.tokenizers.hybrid import STAGES, STEM, features

_OURS = "backbone.tokenizer"
_TIMM = {"weight_eps": 1e-8, "weight_eps_to": "variance", "norm_eps": 1e-5}
_GOOGLE = {"weight_eps": 1e-5, "weight_eps_to": "deviation", "norm_eps": 1e-6}
_IDENTITY = ("embed_dim", "depth", "tokenizer", "patch_size")

Parts = Callable[[str, str], list[Rule]]
"""The rules of a convolution or of a norm, from its name here and its name there."""

Name = Callable[[int | None, int, int | None, Literal["conv", "norm"]], str]
"""A name there: the stage and block from 0, None being the stem; and the part from 1, None being the shortcut."""


def _options(backbone: Any) -> dict[str, Any]:
    """The options of the tokenizer, with those that are left to their defaults."""
    return {"layers": [3, 4, 9], "width_factor": 1.0, **_TIMM, **backbone.tokenizer_options}


def _stem(backbone: Any, named: Name, convolution: Parts, normalisation: Parts) -> list[Rule]:
    """The rules of the residual network, without the patch embedding after it."""
    rules = convolution(f"{_OURS}.conv", named(None, 0, 1, "conv"))
    rules += normalisation(f"{_OURS}.norm", named(None, 0, 1, "norm"))
    for stage, count in enumerate(_options(backbone)["layers"]):
        for i in range(count):
            ours = f"{_OURS}.stages.{stage}.blocks.{i}"
            for part in (1, 2, 3):
                rules += convolution(f"{ours}.conv{part}", named(stage, i, part, "conv"))
                last = "last_norm" if part == 3 else f"norm{part}"
                rules += normalisation(f"{ours}.{last}", named(stage, i, part, "norm"))
            if i == 0:
                rules += convolution(f"{ours}.shortcut.conv", named(stage, i, None, "conv"))
                rules += normalisation(f"{ours}.shortcut.norm", named(stage, i, None, "norm"))
    return rules


def _measured(outside: int, inside: int, layers: list[int], eps: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that follow from the channels of the first convolution and the blocks of each stage."""
    options = {"layers": layers, "width_factor": outside / STEM, **eps}
    return {"tokenizer": "hybrid", "tokenizer_options": options, "in_chans": inside}


def _refused(backbone: Any, only: Mapping[str, Any]) -> list[str]:
    """Options of the tokenizer with another value than the only one of a layout, and patches that are filled up."""
    options, refused = _options(backbone), []
    own = {**options, **only}
    if options != own:
        refused.append(f"other epsilons of the residual network (tokenizer_options={own} accepts its own)")
    cells = features(backbone.image_size, len(options["layers"]))
    whole = all(side % patch == 0 for side, patch in zip(cells, backbone.patch_size, strict=True))
    if backbone.partial_patches == "pad" and not whole:
        refused.append("partial_patches='pad' where patches do not divide the feature map (only 'drop')")
    return refused


def _counts(shapes: Shapes, stages: str, blocks: str, first: int) -> list[int]:
    """The number of blocks of each stage, the stages counted from `first`."""
    return [shapes.count(blocks.format(first + stage)) for stage in range(shapes.count(stages))]


def _plain(backbone: Any) -> Any:
    """The same network with plain patches, for the refusals that do not concern the residual network."""
    return replace(backbone, tokenizer="patch", tokenizer_options={}, partial_patches="drop")


class TimmHybrid(TimmViT):
    """timm's `HybridEmbed`: a `ResNetV2` without pre-activation, or its stem alone, before the patch embedding.

    The blocks of each stage are those of the named architecture: no argument changes them.
    """

    libraries = ("timm",)
    identity = _IDENTITY
    first_conv = "patch_embed.backbone.stem.conv"

    def recognises(self, shapes: Shapes) -> bool:
        return any(f"patch_embed.backbone.{stem}conv.weight" in shapes for stem in ("", "stem."))

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        stem = "" if "patch_embed.backbone.conv.weight" in shapes else "stem."
        outside, inside, *_ = shapes.of(f"patch_embed.backbone.{stem}conv.weight", 4)
        stage = r"patch_embed\.backbone\.stages\."
        layers = _counts(shapes, stage + r"(\d+)\.", stage + r"{}\.blocks\.(\d+)\.", 0)
        return {**super().measure(shapes, image_size), **_measured(outside, inside, layers, _TIMM)}

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        stem = "stem." if _options(backbone)["layers"] else ""

        def named(stage: int | None, block: int, part: int | None, kind: str) -> str:
            if stage is None:
                return f"patch_embed.backbone.{stem}{kind}"
            place = f"patch_embed.backbone.stages.{stage}.blocks.{block}"
            return f"{place}.downsample.{kind}" if part is None else f"{place}.{kind}{part}"

        def convolution(ours: str, theirs: str) -> list[Rule]:
            return same(ours, theirs, bias=False)

        return [*super().rules(backbone, head), *_stem(backbone, named, convolution, same)]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        if backbone.tokenizer != "hybrid":
            return [f"tokenizer={backbone.tokenizer!r} (only 'hybrid')"]
        refused = super().refusals(_plain(backbone), head)
        refused += _refused(backbone, _TIMM)
        named = backbone.mlp == "mlp" and not backbone.distillation_token
        return refused if named else [*refused, "an MLP with gates, or a distillation token"]

    def unwritten(self, backbone: Any, head: Any) -> list[str]:
        options, refused = _options(backbone), super().unwritten(backbone, head)
        if _architecture(backbone) is None or options["width_factor"] != 1:
            refused.append("a residual network other than the published ones, of which timm knows one by each name")
        return refused

    def arguments(self, backbone: Any, head: Any) -> tuple[str, dict[str, Any]]:
        _, arguments = super().arguments(_plain(backbone), head)
        return _architecture(backbone) or "vit_base_r50_s16_224", arguments


_NAMES = {
    "r": "vit_tiny_r_s16_p8_224",
    "r26": "vit_small_r26_s32_224",
    "r50_s16": "vit_base_r50_s16_224",
    "r50_s32": "vit_large_r50_s32_224",
}


def _architecture(backbone: Any) -> str | None:
    """The name in timm that implies these blocks, if there is one."""
    layers = list(_options(backbone)["layers"])
    return next((_NAMES[stem] for stem, stages in STAGES.items() if stages == layers), None)


class GoogleHybrid(GoogleViT):
    """The original's: `conv_root`, `gn_root` and blocks counted from 1; epsilon is added to a kernel's deviation."""

    identity = _IDENTITY
    tokenizer = "hybrid"

    def recognises(self, shapes: Shapes) -> bool:
        return "conv_root/kernel" in shapes

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        *_, inside, outside = shapes.of("conv_root/kernel", 4)
        layers = _counts(shapes, r"block(\d+)/", r"block{}/unit(\d+)/", 1)
        return {**super().measure(shapes, image_size), **_measured(outside, inside, layers, _GOOGLE)}

    def stem(self, backbone: Any) -> list[Rule]:
        def named(stage: int | None, block: int, part: int | None, kind: str) -> str:
            what = "gn" if kind == "norm" else "conv"
            if stage is None:
                return f"{what}_root"
            place = f"block{stage + 1}/unit{block + 1}"
            return f"{place}/{what}_proj" if part is None else f"{place}/{what}{part}"

        return [*super().stem(backbone), *_stem(backbone, named, _kernel, norm)]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = super().refusals(backbone, head)
        if backbone.tokenizer == "hybrid":
            refused += _refused(backbone, _GOOGLE)
        return refused


def _kernel(ours: str, theirs: str) -> list[Rule]:
    return [Rule((f"{ours}.weight",), (f"{theirs}/kernel",), image_kernel, kernel_image)]


LAYOUTS: dict[str, Layout] = {"timm/hybrid": TimmHybrid(), "google/hybrid": GoogleHybrid()}
