"""PiT as its original repository and timm store it (arXiv 2103.16302)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from sightline.backbones.pit import VARIANTS, PiTConfig
from sightline.layout import Convert, Layout, Rule, Shapes, TimmLayout, one, same

_FIRST = "patch_embed.conv.weight"

_SAME = (
    *("in_chans", "stride", "base_dims", "depth", "heads", "mlp_ratio"),
    *("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
)


class _PiT(Layout):
    """What both have in common: timm's blocks in `transformers`, and positions as a plane [1, d, rows, columns].

    `pooling` is the name of what stands before a stage.
    """

    family = "pit"
    identity = ("base_dims", "heads", "depth")
    untold = ("base_dims", "heads")
    pooling: ClassVar[str]

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        _, channels, *patch = shapes.of(_FIRST, 4)
        stages = range(shapes.count(r"transformers\.(\d+)\."))
        widths = tuple(shapes.of(f"transformers.{stage}.blocks.0.norm1.weight", 1)[0] for stage in stages)
        distilled = shapes.of("cls_token", 3)[1] == 2
        return {
            "image_size": _size(shapes, image_size),
            "in_chans": channels,
            "patch_size": tuple(patch),
            "stride": _stride(shapes),
            "depth": tuple(shapes.count(rf"transformers\.{stage}\.blocks\.(\d+)\.") for stage in stages),
            **_heads(widths),
            "mlp_ratio": _ratio(shapes.of("transformers.0.blocks.0.mlp.fc1.weight", 2)[0], widths[0]),
            "norm_eps": 1e-6,
            "distillation_token": distilled,
            "distilled": distilled,
            "num_classes": shapes.outputs("head.bias"),
        }

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rows, _ = backbone.grid(backbone.image_size)
        table = ("backbone.positions.table",), ("pos_embed",)
        rules = [
            one("backbone.prefix_tokens", "cls_token"),
            Rule(*table, _flat, _plane(rows)),
            *same("backbone.projection", "patch_embed.conv"),
            *same("backbone.norm", "norm"),
        ]
        for stage, depth in enumerate(backbone.depth):
            if stage > 0:
                theirs = self.pooling.format(before=stage - 1, stage=stage)
                rules += same(f"backbone.poolings.{stage - 1}.convolution", f"{theirs}.conv")
                rules += same(f"backbone.poolings.{stage - 1}.dense", f"{theirs}.fc")
            for i in range(depth):
                rules += _block(f"backbone.transformers.{stage}.blocks.{i}", f"transformers.{stage}.blocks.{i}")
        if head.num_classes:
            rules += same("head.classifier", "head")
        if head.num_classes and head.distilled:
            rules += same("head.distillation_classifier", "head_dist")
        return rules

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = []
        if head.global_pool != "token" or head.fc_norm or head.pre_logits is not None:
            refused.append("a head that reads more than the class token with one dense layer")
        if head.distilled != backbone.distillation_token:
            refused.append("one of distillation_token and distilled without the other")
        if backbone.norm_eps != 1e-6:
            refused.append(f"norm_eps={backbone.norm_eps:g} (only 1e-06)")
        return refused


class OriginalPiT(_PiT):
    """`pools.S` stands between the stages S and S+1 of `transformers`."""

    libraries = ("original",)
    pooling = "pools.{before}"

    def recognises(self, shapes: Shapes) -> bool:
        return _FIRST in shapes and any(name.startswith("pools.") for name in shapes)


class TimmPiT(_PiT, TimmLayout):
    """The pooling is a part of the stage that it leads to."""

    pooling = "transformers.{stage}.pool"
    same = (*_SAME, "patch_size", "distilled", "drop_rate")
    at_rest: ClassVar[Mapping[str, tuple[Any, ...]]] = {"stem_type": ("overlap",)}
    first_conv = "patch_embed.conv"

    def recognises(self, shapes: Shapes) -> bool:
        return {_FIRST, "transformers.0.blocks.0.norm1.weight"} <= shapes.keys() and "pools.0.fc.bias" not in shapes

    def arguments(self, backbone: Any, head: Any) -> tuple[str, dict[str, Any]]:
        arguments = {
            **{name: getattr(backbone, name) for name in _SAME},
            "img_size": backbone.image_size,
            "patch_size": backbone.patch_size,
            "distilled": head.distilled,
            "drop_rate": head.drop_rate,
        }
        return "pit_s_224", {name: list(v) if isinstance(v, tuple) else v for name, v in arguments.items()}


def _heads(widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The width and number of heads of the published network that is so wide, where there is one."""
    for row in VARIANTS.values():
        settings = PiTConfig(**{name: row.settings[name] for name in ("base_dims", "heads")})
        if settings.widths == widths:
            return {"base_dims": settings.base_dims, "heads": settings.heads}
    return {}


def _stride(shapes: Shapes) -> int:
    """Half a patch, as in every published network; no shape tells it."""
    return max(shapes[_FIRST][2] // 2, 1)


def _size(shapes: Shapes, given: tuple[int, int] | None) -> tuple[int, int]:
    """The image size with the plane of positions in the file: the one that was given, or else the smallest."""
    _, _, *patch = shapes[_FIRST]
    _, _, *grid = shapes.of("pos_embed", 4)
    stride = _stride(shapes)
    if given is not None and all((max(given[i] - patch[i], 0)) // stride + 1 == grid[i] for i in (0, 1)):
        return given
    height, width = (patch[i] + (grid[i] - 1) * stride for i in (0, 1))
    return height, width


def _ratio(hidden: int, width: int) -> float:
    """A ratio whose product with `width`, cut to a whole number, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _flat(plane: Tensor) -> tuple[Tensor]:
    return (rearrange(plane, "1 d r c -> 1 (r c) d"),)


def _plane(rows: int) -> Convert:
    return lambda table: (rearrange(table, "1 (r c) d -> 1 d r c", r=rows),)


def _block(ours: str, theirs: str) -> list[Rule]:
    parts = {part: part for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
    parts |= {"attention.qkv": "attn.qkv", "attention.out": "attn.proj"}
    return [rule for mine, other in parts.items() for rule in same(f"{ours}.{mine}", f"{theirs}.{other}")]


LAYOUTS = {"timm/pit": TimmPiT(), "original/pit": OriginalPiT()}
