"""Residual networks as timm, torchvision and transformers store them."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sightline.errors import UserError, printable
from sightline.layout import Layout, Rule, Shapes, TimmLayout, TransformersLayout, one, same


def averaged(head: Any) -> list[str]:
    """What a head has that convolutional networks of other libraries lack, as phrases."""
    plain = not head.fc_norm and head.pre_logits is None and not head.distilled
    refused = [] if head.global_pool == "avg" else [f"global_pool={head.global_pool!r} (only 'avg')"]
    return refused + ([] if plain else ["a head that does more than read the mean with one dense layer"])


class _ResNet(Layout):
    """What all have in common: each convolution has a batch norm after it, which counts its batches.

    The counts change no output: they are left out when read, and written as zero.
    """

    family = "resnet"
    identity = ("block", "layers")
    dropped = r".*\.num_batches_tracked"

    def pairs(self, backbone: Any) -> Iterator[tuple[str, str, str, str]]:
        """A convolution of ours and its norm, and the same two of theirs."""
        yield "backbone.conv", "backbone.stem_norm", *self.stem
        count = {"basic": 2, "bottleneck": 3}[backbone.block]
        inside = backbone.stem_chs
        for stage, (outside, layers) in enumerate(zip(backbone.widths, backbone.layers, strict=True)):
            for i in range(layers):
                ours = f"backbone.blocks.{stage}.blocks.{i}"
                for part in range(1, count + 1):
                    norm = f"norm{part}" if part < count else "last_norm"
                    yield f"{ours}.conv{part}", f"{ours}.{norm}", *self.inner(stage, i, part)
                if i == 0 and (stage > 0 or inside != outside):
                    yield f"{ours}.shortcut.conv", f"{ours}.shortcut.norm", *self.shortcut(stage)
            inside = outside

    stem: ClassVar[tuple[str, str]]
    classifier: ClassVar[str]

    @abstractmethod
    def inner(self, stage: int, block: int, part: int) -> tuple[str, str]:
        """A convolution of a block and its norm, the parts counted from 1."""

    @abstractmethod
    def shortcut(self, stage: int) -> tuple[str, str]:
        """The convolution and the norm on the shortcut of a stage's first block."""

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = []
        for our_conv, our_norm, their_conv, their_norm in self.pairs(backbone):
            rules += same(our_conv, their_conv, bias=False)
            rules += same(our_norm, their_norm)
            rules += [one(f"{our_norm}.{part}", f"{their_norm}.{part}") for part in ("running_mean", "running_var")]
        return rules + (same("head.classifier", self.classifier) if head.num_classes else [])

    def extras(self, backbone: Any, head: Any) -> dict[str, Tensor]:
        return {f"{norm}.num_batches_tracked": torch.tensor(0) for *_, norm in self.pairs(backbone)}

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        layers = self.counts(shapes)
        first = [shapes.of(f"{self.inner(stage, 0, 1)[0]}.weight", 4) for stage in range(len(layers))]
        stem = shapes.of(f"{self.stem[0]}.weight", 4)
        return {
            "block": "bottleneck" if f"{self.inner(0, 0, 3)[0]}.weight" in shapes else "basic",
            "layers": layers,
            "channels": tuple(shape[0] for shape in first),
            "stem_chs": stem[0],
            "in_chans": stem[1],
            "global_pool": "avg",
            "num_classes": shapes.outputs(f"{self.classifier}.bias"),
        }

    @abstractmethod
    def counts(self, shapes: Shapes) -> tuple[int, ...]:
        """The number of blocks of each stage."""

    def recognises(self, shapes: Shapes) -> bool:
        norm = self.inner(0, 0, 1)[1]
        return {f"{self.stem[0]}.weight", f"{self.stem[1]}.running_mean", f"{norm}.running_mean"} <= shapes.keys()

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        return averaged(head)


class TorchvisionResNet(_ResNet):
    """The first names of all, which timm uses too: `layer1` to `layer4`."""

    libraries = ("torchvision",)
    stem = ("conv1", "bn1")
    classifier = "fc"

    def inner(self, stage: int, block: int, part: int) -> tuple[str, str]:
        before = f"layer{stage + 1}.{block}"
        return f"{before}.conv{part}", f"{before}.bn{part}"

    def shortcut(self, stage: int) -> tuple[str, str]:
        before = f"layer{stage + 1}.0.downsample"
        return f"{before}.0", f"{before}.1"

    def counts(self, shapes: Shapes) -> tuple[int, ...]:
        return tuple(shapes.count(rf"layer{stage + 1}\.(\d+)\.") for stage in range(shapes.count(r"layer(\d+)\.")))

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = super().refusals(backbone, head)
        if backbone.channels != (64, 128, 256, 512):
            refused.append(f"channels={backbone.channels} (only 64, 128, 256 and 512)")
        if (backbone.stem_chs, backbone.in_chans) != (64, 3):
            refused.append("a first convolution other than from 3 channels to 64")
        if not head.num_classes:
            refused.append("num_classes=0 (a classifier is always there)")
        return refused


class TimmResNet(TorchvisionResNet, TimmLayout):
    """torchvision's names; the number of channels of each stage is free."""

    libraries = ("timm",)
    same = ("in_chans", "layers", "channels", "drop_rate", "drop_path_rate")
    at_rest: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "output_stride": (32,),
        "cardinality": (1,),
        "base_width": (64,),
        "stem_width": (32, 64),
        "stem_type": ("",),
        "replace_stem_pool": (False,),
        "block_reduce_first": (1,),
        "down_kernel_size": (1,),
        "avg_down": (False,),
        "act_layer": ("relu",),
        "norm_layer": ("batchnorm2d",),
        "drop_block_rate": (0, 0.0),
        "zero_init_last": (True, False),
    }
    first_conv = "conv1"
    fixed_input_size = False
    classifier = "fc"

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        refused = averaged(head)
        if len(backbone.layers) != 4:
            refused.append(f"layers={backbone.layers} (only networks of 4 stages)")
        return refused if backbone.stem_chs == 64 else [*refused, f"stem_chs={backbone.stem_chs} (only 64)"]

    def arguments(self, backbone: Any, head: Any) -> tuple[str, dict[str, Any]]:
        arguments = {
            "in_chans": backbone.in_chans,
            "layers": list(backbone.layers),
            "channels": list(backbone.channels),
            "drop_path_rate": backbone.drop_path_rate,
            "drop_rate": head.drop_rate,
            "num_classes": head.num_classes,
        }
        return {"basic": "resnet18", "bottleneck": "resnet50"}[backbone.block], arguments


class TransformersResNet(_ResNet, TransformersLayout):
    """`ResNetModel` and `ResNetForImageClassification`; `hidden_sizes` are the channels that stages put out."""

    model_type = "resnet"
    base = "resnet"
    with_head = "ResNetForImageClassification"
    bare = "ResNetModel"
    stem = ("embedder.embedder.convolution", "embedder.embedder.normalization")
    classifier = "classifier.1"
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": (256, 512, 1024, 2048),
        "depths": (3, 4, 6, 3),
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    ignored = ("stage_names", "out_features", "out_indices")

    def inner(self, stage: int, block: int, part: int) -> tuple[str, str]:
        before = f"encoder.stages.{stage}.layers.{block}.layer.{part - 1}"
        return f"{before}.convolution", f"{before}.normalization"

    def shortcut(self, stage: int) -> tuple[str, str]:
        before = f"encoder.stages.{stage}.layers.0.shortcut"
        return f"{before}.convolution", f"{before}.normalization"

    def counts(self, shapes: Shapes) -> tuple[int, ...]:
        stages = range(shapes.count(r"encoder\.stages\.(\d+)\."))
        return tuple(shapes.count(rf"encoder\.stages\.{stage}\.layers\.(\d+)\.") for stage in stages)

    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        only(config, shapes.where, hidden_act="relu", downsample_in_first_stage=False, downsample_in_bottleneck=False)
        sizes, depths = (whole(config, name, shapes.where) for name in ("hidden_sizes", "depths"))
        block = config["layer_type"]
        expansion = 4 if block == "bottleneck" else 1
        if any(size % expansion for size in sizes):
            raise UserError(f"{shapes.where}: hidden_sizes {printable(sizes, 60)} are no multiples of 4")
        return {
            "block": block,
            "layers": depths,
            "channels": tuple(size // expansion for size in sizes),
            "stem_chs": config["embedding_size"],
            "in_chans": config["num_channels"],
        }

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        return {
            "num_channels": backbone.in_chans,
            "embedding_size": backbone.stem_chs,
            "hidden_sizes": list(backbone.widths),
            "depths": list(backbone.layers),
            "layer_type": backbone.block,
            "hidden_act": "relu",
        }

    def output(self, answer: Any, backbone: Any, head: Any) -> Tensor:
        return answer.logits if head.num_classes else answer.pooler_output.flatten(1)


def whole(config: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    """A list of whole numbers in a `config.json`. Raises UserError for anything else."""
    value = config[name]
    listed = isinstance(value, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    if not listed:
        raise UserError(f"{where}: {name} {printable(value, 60)} is not a list of whole numbers")
    return tuple(value)


def only(config: Mapping[str, Any], where: str, **values: Any) -> None:
    """Raises UserError for settings in a `config.json` that have another value than the one that is computed here."""
    for name, value in values.items():
        if config[name] != value:
            raise UserError(f"{where}: {name} {printable(repr(config[name]), 60)} has no counterpart here")


LAYOUTS = {
    "timm/resnet": TimmResNet(),
    "torchvision/resnet": TorchvisionResNet(),
    "transformers/resnet": TransformersResNet(),
}
