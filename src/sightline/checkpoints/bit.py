"""Big Transfer's networks as timm, transformers and the two original repositories (`.npz`, `.pth`) store them."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from sightline.backbones.bit import VARIANTS
from sightline.checkpoints.google_vit import image_kernel, kernel_image
from sightline.checkpoints.resnet import averaged, only, whole
from sightline.layout import Layout, Rule, Shapes, TimmLayout, TransformersLayout, one, same

_PARTS = (1, 2, 3)


class _BiT(Layout):
    """What all have in common: for each of our parts theirs. Stages and blocks are counted from 0 in the patterns.

    `weight_eps` is what the library adds to the variance of a kernel. The classifier is a 1×1 convolution, except in
    transformers.
    """

    family = "bit"
    identity = ("layers", "width_factor")
    weight_eps: ClassVar[float]
    stem: ClassVar[str]
    final: ClassVar[str]
    classifier: ClassVar[str]
    stages: ClassVar[str]
    blocks: ClassVar[str]

    @abstractmethod
    def conv(self, stage: int, block: int, part: int) -> str:
        """A convolution of a block, counted from 1; 0 is the one on the shortcut."""

    @abstractmethod
    def norm(self, stage: int, block: int, part: int) -> str:
        """The norm before a convolution of a block, counted from 1."""

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        stages = range(shapes.count(self.stages))
        layers = tuple(shapes.count(self.blocks.format(self.numbered(stage))) for stage in stages)
        root = self._channels(shapes, self.stem)
        widths = tuple(self._channels(shapes, self.conv(stage, 0, 3))[0] for stage in stages)
        factor = root[0] // 64
        plain = widths == tuple(256 * 2**stage * factor for stage in stages) and root[0] == 64 * factor > 0
        return {
            "layers": layers,
            "channels": tuple(width // factor for width in widths) if plain else widths,
            "stem_chs": 64 if plain else root[0],
            "width_factor": factor if plain else 1,
            "in_chans": root[1],
            "weight_eps": self.weight_eps,
            "global_pool": "avg",
            "num_classes": shapes.outputs(f"{self.classifier}.bias"),
        }

    def numbered(self, stage: int) -> int:
        """A stage, counted from 0, as the library counts it."""
        return stage

    def _channels(self, shapes: Shapes, name: str) -> tuple[int, int]:
        """The channels that a convolution puts out and takes in."""
        outside, inside, *_ = shapes.of(f"{name}.weight", 4)
        return outside, inside

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = [*self.convolution("backbone.conv", self.stem), *self.normalisation("backbone.norm", self.final)]
        inside = backbone.stem_width
        for stage, (outside, layers) in enumerate(zip(backbone.widths, backbone.layers, strict=True)):
            for i in range(layers):
                ours = f"backbone.blocks.{stage}.blocks.{i}"
                for part in _PARTS:
                    rules += self.convolution(f"{ours}.conv{part}", self.conv(stage, i, part))
                    rules += self.normalisation(f"{ours}.norm{part}", self.norm(stage, i, part))
                if i == 0 and (stage > 0 or inside != outside):
                    rules += self.convolution(f"{ours}.shortcut", self.conv(stage, i, 0))
            inside = outside
        return rules + (self.top("head.classifier", self.classifier) if head.num_classes else [])

    def convolution(self, ours: str, theirs: str) -> list[Rule]:
        """The rules of a convolution."""
        return same(ours, theirs, bias=False)

    def normalisation(self, ours: str, theirs: str) -> list[Rule]:
        """The rules of a norm."""
        return same(ours, theirs)

    def top(self, ours: str, theirs: str) -> list[Rule]:
        """The rules of the classifier."""
        return [Rule((f"{ours}.weight",), (f"{theirs}.weight",), _dense, _plane), one(f"{ours}.bias", f"{theirs}.bias")]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = averaged(head)
        if backbone.weight_eps != self.weight_eps:
            only = f"only {self.weight_eps:g}; weight_eps={self.weight_eps:g} accepts it"
            refused.append(f"weight_eps={backbone.weight_eps:g} ({only})")
        if backbone.stem_width == backbone.widths[0]:
            refused.append("a first stage of as many channels as the stem (there is always a shortcut)")
        return refused


class TimmBiT(_BiT, TimmLayout):
    """timm's `ResNetV2`; names imply the number of layers and cannot be told another."""

    weight_eps = 1e-8
    stem, final, classifier = "stem.conv", "norm", "head.fc"
    stages, blocks = r"stages\.(\d+)\.", r"stages\.{}\.blocks\.(\d+)\."
    same = ("in_chans", "channels", "stem_chs", "drop_rate", "drop_path_rate")
    at_rest: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "output_stride": (32,),
        "avg_down": (False,),
        "preact": (True,),
        "basic": (False,),
        "bottle_ratio": (0.25,),
        "act_layer": ("relu",),
        "zero_init_last": (True, False),
    }
    first_conv = "stem.conv"
    fixed_input_size = False

    def recognises(self, shapes: Shapes) -> bool:
        mine = {"stem.conv.weight", "stages.0.blocks.0.norm1.weight", "norm.weight"} <= shapes.keys()
        return mine and "norm.running_mean" not in shapes

    def conv(self, stage: int, block: int, part: int) -> str:
        return f"stages.{stage}.blocks.{block}." + (f"conv{part}" if part else "downsample.conv")

    def norm(self, stage: int, block: int, part: int) -> str:
        return f"stages.{stage}.blocks.{block}.norm{part}"

    def unwritten(self, backbone: Any, head: Any) -> list[str]:
        known = sorted({row.settings["layers"] for row in VARIANTS.values()})
        return [] if backbone.layers in known else [f"layers={backbone.layers} (only those of published networks)"]

    def arguments(self, backbone: Any, head: Any) -> tuple[str, dict[str, Any]]:
        arguments = {
            "in_chans": backbone.in_chans,
            "drop_path_rate": backbone.drop_path_rate,
            "drop_rate": head.drop_rate,
            "num_classes": head.num_classes,
        }
        name, factor = _nearest(backbone)
        widths = {"channels": [width // factor for width in backbone.widths], "stem_chs": backbone.stem_width // factor}
        return name, {**arguments, **widths}


def _nearest(backbone: Any) -> tuple[str, int]:
    """The published network with as many layers, and its width factor; the equally wide one if there is one."""
    rows = {name: (row.settings["layers"], row.settings["width_factor"]) for name, row in VARIANTS.items()}
    named = [name for name, (layers, _) in rows.items() if layers == backbone.layers] or list(rows)
    name = next((name for name in named if rows[name][1] == backbone.width_factor), named[0])
    return name, rows[name][1]


class TransformersBiT(_BiT, TransformersLayout):
    """`BitModel` and `BitForImageClassification`; the width factor is in `hidden_sizes`."""

    model_type = "bit"
    base = "bit"
    with_head = "BitForImageClassification"
    bare = "BitModel"
    weight_eps = 1e-8
    stem, final, classifier = "embedder.convolution", "norm", "classifier.1"
    stages, blocks = r"encoder\.stages\.(\d+)\.", r"encoder\.stages\.{}\.layers\.(\d+)\."
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": (256, 512, 1024, 2048),
        "depths": (3, 4, 6, 3),
        "layer_type": "preactivation",
        "hidden_act": "relu",
        "global_padding": None,
        "num_groups": 32,
        "drop_path_rate": 0.0,
        "embedding_dynamic_padding": False,
        "output_stride": 32,
        "width_factor": 1,
    }
    ignored = ("stage_names", "out_features", "out_indices", "conv_layer")

    def recognises(self, shapes: Shapes) -> bool:
        return {"embedder.convolution.weight", "encoder.stages.0.layers.0.norm1.weight"} <= shapes.keys()

    def conv(self, stage: int, block: int, part: int) -> str:
        return f"encoder.stages.{stage}.layers.{block}." + (f"conv{part}" if part else "downsample.conv")

    def norm(self, stage: int, block: int, part: int) -> str:
        return f"encoder.stages.{stage}.layers.{block}.norm{part}"

    def top(self, ours: str, theirs: str) -> list[Rule]:
        return same(ours, theirs)

    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        fixed = ("layer_type", "hidden_act", "global_padding", "num_groups", "embedding_dynamic_padding")
        only(config, shapes.where, **{name: self.defaults[name] for name in (*fixed, "output_stride", "width_factor")})
        sizes, depths = (whole(config, name, shapes.where) for name in ("hidden_sizes", "depths"))
        measured = self.measure(shapes, None)
        factor = measured["width_factor"]
        plain = sizes == tuple(channels * factor for channels in measured["channels"])
        plain = plain and config["embedding_size"] == measured["stem_chs"] * factor
        named = ("channels", "stem_chs", "width_factor")
        widths = {"channels": sizes, "stem_chs": config["embedding_size"], "width_factor": 1}
        return {
            "layers": depths,
            "in_chans": config["num_channels"],
            "drop_path_rate": config["drop_path_rate"],
            **({name: measured[name] for name in named} if plain else widths),
        }

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        return {
            "num_channels": backbone.in_chans,
            "embedding_size": backbone.stem_width,
            "hidden_sizes": list(backbone.widths),
            "depths": list(backbone.layers),
            "layer_type": "preactivation",
            "hidden_act": "relu",
            "drop_path_rate": backbone.drop_path_rate,
        }

    def output(self, answer: Any, backbone: Any, head: Any) -> Tensor:
        return answer.logits if head.num_classes else answer.pooler_output.flatten(1)


class OriginalBiT(_BiT):
    """`bit_pytorch` of the original repository: `root`, `body` and `head`, stages and blocks counted from 1."""

    libraries = ("original",)
    weight_eps = 1e-10
    stem, final, classifier = "root.conv", "head.gn", "head.conv"
    stages, blocks = r"body\.block(\d+)\.", r"body\.block{}\.unit(\d+)\."

    def recognises(self, shapes: Shapes) -> bool:
        return {"root.conv.weight", "head.gn.weight"} <= shapes.keys()

    def numbered(self, stage: int) -> int:
        return stage + 1

    def conv(self, stage: int, block: int, part: int) -> str:
        return f"body.block{stage + 1}.unit{block + 1:02d}." + (f"conv{part}" if part else "downsample")

    def norm(self, stage: int, block: int, part: int) -> str:
        return f"body.block{stage + 1}.unit{block + 1:02d}.gn{part}"


class GoogleBiT(_BiT):
    """The published `.npz` files: TensorFlow's names, and convolutions [height, width, in, out]."""

    libraries = ("google",)
    former: ClassVar[Mapping[str, str]] = {r"(standardized_conv2d|group_norm)_\d+/": r"\1/"}
    weight_eps = 1e-10
    stem, final, classifier = "resnet/root_block/standardized_conv2d", "resnet/group_norm", "resnet/head/conv2d"
    stages, blocks = r"resnet/block(\d+)/", r"resnet/block{}/unit(\d+)/"

    def recognises(self, shapes: Shapes) -> bool:
        return f"{self.stem}/kernel" in shapes

    def numbered(self, stage: int) -> int:
        return stage + 1

    def conv(self, stage: int, block: int, part: int) -> str:
        place = "abc"[part - 1] if part else "a/proj"
        return f"resnet/block{stage + 1}/unit{block + 1:02d}/{place}/standardized_conv2d"

    def norm(self, stage: int, block: int, part: int) -> str:
        return f"resnet/block{stage + 1}/unit{block + 1:02d}/{'abc'[part - 1]}/group_norm"

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        return super().measure(shapes, image_size) | {"num_classes": shapes.outputs(f"{self.classifier}/bias")}

    def _channels(self, shapes: Shapes, name: str) -> tuple[int, int]:
        *_, inside, outside = shapes.of(f"{name}/kernel", 4)
        return outside, inside

    def convolution(self, ours: str, theirs: str) -> list[Rule]:
        return [Rule((f"{ours}.weight",), (f"{theirs}/kernel",), image_kernel, kernel_image)]

    def normalisation(self, ours: str, theirs: str) -> list[Rule]:
        return [one(f"{ours}.weight", f"{theirs}/gamma"), one(f"{ours}.bias", f"{theirs}/beta")]

    def top(self, ours: str, theirs: str) -> list[Rule]:
        kernel = Rule((f"{ours}.weight",), (f"{theirs}/kernel",), _dense_of_kernel, _kernel_of_dense)
        return [kernel, one(f"{ours}.bias", f"{theirs}/bias")]


def _dense(convolution: Tensor) -> tuple[Tensor]:
    return (rearrange(convolution, "k d 1 1 -> k d"),)


def _plane(weight: Tensor) -> tuple[Tensor]:
    return (rearrange(weight, "k d -> k d 1 1"),)


def _dense_of_kernel(kernel: Tensor) -> tuple[Tensor]:
    return (rearrange(kernel, "1 1 d k -> k d"),)


def _kernel_of_dense(weight: Tensor) -> tuple[Tensor]:
    return (rearrange(weight, "k d -> 1 1 d k"),)


LAYOUTS = {
    "timm/bit": TimmBiT(),
    "transformers/bit": TransformersBiT(),
    "original/bit": OriginalBiT(),
    "google/bit": GoogleBiT(),
}
