"""Residual networks with batch norm (arXiv 1512.03385), against which the Vision Transformer is measured."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.backbones.pyramid import Pyramid, require_stages
from sightline.layers.canvas import real_pixels
from sightline.layers.resnet import BasicBlock, BatchNorm, Bottleneck, FrozenBatchNorm, convolution, stages
from sightline.registry import Variant
from sightline.schema import require
from sightline.types import Tokens

_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


@dataclass(frozen=True)
class ResNetConfig:
    """The settings of a `ResNet`, under the names that timm's users know.

    `image_size` is (height, width) in pixels. `layers` has the number of blocks of each stage and `channels` that of
    their inner channels: a bottleneck puts out four times as many. `stem_chs` are the channels of the first
    convolution. `drop_path_rate` lies in [0, 1). `frozen_norm` keeps all norms as they are, as detectors do that learn
    from few images at a time. `dilated` lets the last stage keep its rows and columns, and spreads its kernels out
    instead (DETR's "DC5"). In a batch of unlike sizes images pass one by one; `padding="together"` lets them pass on
    one canvas, as detectors were published: what lies near the edge of an image then sees a little of the filling.
    Raises UserError for values out of range.
    """

    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    block: Literal["basic", "bottleneck"] = "bottleneck"
    layers: tuple[int, ...] = (3, 4, 6, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    stem_chs: int = 64
    drop_path_rate: float = 0.0
    frozen_norm: bool = False
    dilated: bool = False
    padding: Literal["alone", "together"] = "alone"

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
        return (2 ** (1 + len(self.layers) - self.dilated),) * 2


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
        norm = FrozenBatchNorm if config.frozen_norm else BatchNorm
        self.stem_norm = norm(config.stem_chs)
        block = partial(_BLOCKS[config.block], normalise=norm)
        self.blocks = stages(config.stem_chs, config.widths, config.layers, block, config.drop_path_rate)

        if config.dilated:
            _dilate(self.blocks[-1])

    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Tokens:
        if sizes is None or self.config.padding == "alone":
            return super().forward(pixels, sizes)
        tokens = super().forward(pixels * real_pixels(sizes.to(pixels.device), *pixels.shape[-2:]))
        # A cell is real where the pixel that it is nearest to is, as the original reads its masks.
        at = [
            (torch.arange(cells) * length / cells).long()
            for cells, length in zip(tokens.grid, pixels.shape[-2:], strict=True)
        ]
        rows, columns = (places < sizes.cpu()[:, axis, None] for axis, places in enumerate(at))
        real = rearrange(rows[:, :, None] & columns[:, None], "b r c -> b (r c)")
        return tokens._replace(mask=real.to(pixels.device))

    def stem(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        return F.max_pool2d(F.relu(self.stem_norm(self.conv(pixels))), kernel_size=3, stride=2, padding=1)


def _dilate(stage: nn.Module) -> None:
    """Takes the stride out of a stage and doubles the reach of its kernels from the second block on."""
    for number, block in enumerate(stage.get_submodule("blocks").children()):
        for layer in block.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
                if layer.kernel_size == (3, 3) and number:
                    layer.dilation = layer.padding = (2, 2)


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
