"""The encoder of DALL-E's discrete autoencoder under its authors' names: `w` and `b` of each convolution."""

from collections.abc import Iterator
from typing import Any, ClassVar

from sightline.layout import Layout, Rule, Shapes, one

_FIRST = "blocks.group_1.block_1.res_path.conv_1.w"


class Dalle(Layout):
    """The state of the encoder alone, as tensors: what was published is a pickled module, which nothing here reads."""

    libraries = ("original",)
    family = "dvae"
    identity: ClassVar[tuple[str, ...]] = ("hidden", "groups", "blocks", "vocab_size")
    habits: ClassVar[tuple[str, ...]] = ()

    def recognises(self, shapes: Shapes) -> bool:
        return _FIRST in shapes and shapes.get("blocks.input.w", ())[-1:] == (7,)

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        kernel = shapes.of("blocks.input.w", 4)
        return {
            "hidden": kernel[0],
            "in_chans": kernel[1],
            "groups": shapes.count(r"blocks\.group_(\d+)\."),
            "blocks": shapes.count(r"blocks\.group_1\.block_(\d+)\."),
            "vocab_size": shapes.of("blocks.output.conv.w", 4)[0],
            "global_pool": "avg",
            "num_classes": 0,
        }

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        parts = {"weight": "w", "bias": "b"}.items()
        return [
            one(f"{ours}.{mine}", f"{theirs}.{other}") for ours, theirs in _pairs(backbone) for mine, other in parts
        ]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = [f"num_classes={head.num_classes} (only 0)"] if head.num_classes else []
        return refused + (["fc_norm=True (only False)"] if head.fc_norm else [])


def _pairs(backbone: Any) -> Iterator[tuple[str, str]]:
    """A convolution of ours and the same of theirs."""
    yield "backbone.input", "blocks.input"
    inside = backbone.hidden
    for group, width in enumerate(backbone.widths):
        for block in range(backbone.blocks):
            ours, theirs = f"backbone.groups.{group}.{block}", f"blocks.group_{group + 1}.block_{block + 1}"
            if inside != width:
                yield f"{ours}.shortcut", f"{theirs}.id_path"
            for i in range(4):
                yield f"{ours}.convolutions.{i}", f"{theirs}.res_path.conv_{i + 1}"
            inside = width
    yield "backbone.output", "blocks.output.conv"


LAYOUTS = {"original/dvae": Dalle()}
