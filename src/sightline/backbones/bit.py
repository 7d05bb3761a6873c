"""Big Transfer (arXiv 1912.11370): pre-activated residual networks with group norm and standardised kernels."""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sightline.backbones.pyramid import Pyramid, require_stages
from sightline.layers.resnet import GROUPS, GroupNorm, PreactivatedBottleneck, StandardizedConv, stages
from sightline.registry import Variant
from sightline.schema import require


@dataclass(frozen=True)
class BiTConfig:
    """The settings of a `BiT`, under the names that timm's users know.

    `image_size` is (height, width) in pixels. `layers` has the number of blocks of each stage and `channels` that of
    the channels it puts out; these and the `stem_chs` of the first convolution are multiplied by `width_factor`. A
    quarter of a stage's channels, and the stem's, divide into 32 groups. `weight_eps` is added to the variance of a
    kernel before it is divided by its deviation: 1e-10 in the original, 1e-8 in timm and transformers.
    `drop_path_rate` lies in [0, 1). Raises UserError for values out of range.
    """

    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    layers: tuple[int, ...] = (3, 4, 6, 3)
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_chs: int = 64
    width_factor: int = 1
    weight_eps: float = 1e-8
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "in_chans", "stem_chs", "width_factor"):
            value = getattr(self, name)
            require(min(value if isinstance(value, tuple) else (value,)) > 0, f"{name} must be positive, not {value}")
        require_stages(self.layers, self.channels)
        parts = (self.stem_width, *(width / PreactivatedBottleneck.expansion for width in self.widths))
        grouped = all(part % GROUPS == 0 for part in parts)
        require(grouped, f"stem_chs and a quarter of channels must be multiples of {GROUPS} after width_factor")
        require(0 <= self.weight_eps < 1, f"weight_eps must lie in [0, 1), not {self.weight_eps}")
        require(0 <= self.drop_path_rate < 1, f"drop_path_rate must lie in [0, 1), not {self.drop_path_rate}")

    @property
    def stem_width(self) -> int:
        """The channels of the first convolution."""
        return self.stem_chs * self.width_factor

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels that each stage puts out."""
        return tuple(channels * self.width_factor for channels in self.channels)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels (rows, columns) from one token to the next."""
        return (2 ** (1 + len(self.layers)),) * 2


class BiT(Pyramid):
    """ResNet-v2 as Big Transfer has it: a 7×7 convolution, a pooling, stages, and a norm with ReLU at the end.

    The pooling follows a border of zeros, which is more than nothing where a feature is negative. Initialised by He's
    rule.
    """

    Config = BiTConfig

    def __init__(self, config: BiTConfig):
        super().__init__()
        self.config, self.width, self.depth = config, config.widths[-1], sum(config.layers)
        self.layers = config.layers
        convolve = partial(StandardizedConv, eps=config.weight_eps)
        block = partial(PreactivatedBottleneck, convolve=convolve, normalise=GroupNorm)
        self.conv = convolve(config.in_chans, config.stem_width, 7, 2)
        self.blocks = stages(config.stem_width, config.widths, config.layers, block, config.drop_path_rate)
        self.norm = GroupNorm(self.width)

    def stem(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        return F.max_pool2d(F.pad(self.conv(pixels), (1, 1, 1, 1)), kernel_size=3, stride=2)

    def final(self, x: Float[Tensor, "b d y x"]) -> Float[Tensor, "b d y x"]:
        return F.relu(self.norm(x))


FAMILIES = {"bit": BiT}

_HALF = (0.5, 0.5, 0.5)
_LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _row(depth: int, factor: int, size: int, parameters: int) -> Variant:
    large = size > 224
    return Variant(
        family="bit",
        parameters=parameters,
        paper="1912.11370",
        settings={"image_size": size, "layers": _LAYERS[depth], "width_factor": factor},
        head={"global_pool": "avg"},
        preprocess={
            "crop_pct": 1.0 if large else 0.875,
            "interpolation": "bilinear" if large else "bicubic",
            "mean": _HALF,
            "std": _HALF,
        },
        sources=("timm", "google", "original", "transformers"),
    )


VARIANTS = {
    f"resnetv2_{depth}x{factor}_bit": _row(depth, factor, size, parameters)
    for depth, factor, size, parameters in [
        (50, 1, 224, 25_549_352),
        (50, 3, 448, 217_319_080),
        (101, 1, 448, 44_541_480),
        (101, 3, 448, 387_934_888),
        (152, 2, 224, 236_335_208),
        (152, 4, 480, 936_533_224),
    ]
}

SMALL = {
    "bit": (
        "resnetv2_50x1_bit",
        {"image_size": (32, 48), "layers": (1, 2, 1), "channels": (128, 128, 256), "stem_chs": 32},
    )
}
