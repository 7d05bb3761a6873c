"""Residual networks with batch norm (arXiv 1512.03385), against which the Vision Transformer is measured."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sightline.backbones.pyramid import Pyramid, require_stages
from sightline.layers.resnet import BasicBlock, BatchNorm, Bottleneck, convolution, stages
from sightline.registry import Variant
from sightline.schema import require

_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


@dataclass(frozen=True)
class ResNetConfig:
    """The settings of a `ResNet`, under the names that timm's users know.

    `image_size` is (height, width) in pixels. `layers` has the number of blocks of each stage and `channels` that of
    their inner channels: a bottleneck puts out four times as many. `stem_chs` are the channels of the first
    convolution. `drop_path_rate` lies in [0, 1). Raises UserError for values out of range.
    """

    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    block: Literal["basic", "bottleneck"] = "bottleneck"
    layers: tuple[int, ...] = (3, 4, 6, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    stem_chs: int = 64
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "in_chans", "stem_chs"):
            value = getattr(self, name)
            require(min(value if isinstance(value, tuple) else (value,)) > 0, f"{name} must be positive, not {value}")
        require_stages(self.layers, self.channels)
        require(0 <= self.drop_path_rate < 1, f"drop_path_rate must lie in [0, 1), not {self.drop_path_rate}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels that each stage puts out."""
        return tuple(channels * _BLOCKS[self.block].expansion for channels in self.channels)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels (rows, columns) from one token to the next."""
        return (2 ** (1 + len(self.layers)),) * 2


class ResNet(Pyramid):
    """A residual network: a 7×7 convolution, a pooling, and stages of blocks whose strides are on 3×3 convolutions.

    Initialised by He's rule; the last norm of every block starts at zero.
    """

    Config = ResNetConfig

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config, self.width, self.depth = config, config.widths[-1], sum(config.layers)
        self.layers = config.layers
        self.conv = convolution(config.in_chans, config.stem_chs, 7, 2)
        self.stem_norm = BatchNorm(config.stem_chs)
        block = _BLOCKS[config.block]
        self.blocks = stages(config.stem_chs, config.widths, config.layers, block, config.drop_path_rate)

    def stem(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        return F.max_pool2d(F.relu(self.stem_norm(self.conv(pixels))), kernel_size=3, stride=2, padding=1)


FAMILIES = {"resnet": ResNet}


def _row(block: str, layers: tuple[int, ...], parameters: int) -> Variant:
    return Variant(
        family="resnet",
        parameters=parameters,
        paper="1512.03385",
        settings={"block": block, "layers": layers},
        head={"global_pool": "avg"},
        preprocess={
            "crop_pct": 0.95,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        sources=("timm", "torchvision", "transformers"),
    )


VARIANTS = {
    "resnet18": _row("basic", (2, 2, 2, 2), 11_689_512),
    "resnet34": _row("basic", (3, 4, 6, 3), 21_797_672),
    "resnet50": _row("bottleneck", (3, 4, 6, 3), 25_557_032),
    "resnet101": _row("bottleneck", (3, 4, 23, 3), 44_549_160),
    "resnet152": _row("bottleneck", (3, 8, 36, 3), 60_192_808),
}

SMALL = {"resnet": ("resnet50", {"image_size": (32, 48), "layers": (1, 2, 1), "channels": (8, 12, 16), "stem_chs": 16})}
