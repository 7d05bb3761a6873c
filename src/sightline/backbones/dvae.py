"""The encoder of a discrete autoencoder: pixels to the logits of a codebook (DALL-E, arXiv 2102.12092)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sightline.backbones.backbone import Backbone
from sightline.layers.dvae import convolution, groups
from sightline.registry import Variant
from sightline.schema import require
from sightline.types import Tokens


@dataclass(frozen=True)
class DVAEConfig:
    """The settings of a `DVAE`.

    `image_size` is (height, width) in pixels. There are `groups` of `blocks` blocks, of width `hidden`·2^g, and a
    pooling that halves the image between two groups; `vocab_size` counts the entries of the codebook. Raises UserError
    for values out of range.
    """

    image_size: tuple[int, int] = (112, 112)
    in_chans: int = 3
    hidden: int = 256
    groups: int = 4
    blocks: int = 2
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        for name in ("image_size", "in_chans", "hidden", "groups", "blocks", "vocab_size"):
            value = getattr(self, name)
            require(min(value if isinstance(value, tuple) else (value,)) > 0, f"{name} must be positive, not {value}")
        require(self.groups <= 10 and self.blocks <= 100, "at most 10 groups of 100 blocks are possible")

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each group."""
        return tuple(self.hidden * 2**group for group in range(self.groups))

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels (rows, columns) from one token to the next."""
        return (2 ** (self.groups - 1),) * 2


class DVAE(Backbone):
    """Pixels to one token for each cell of a coarse grid, whose values are the logits of the codebook's entries.

    Its pixels are 0.8 x + 0.1 of values x from 0 to 1, which is what a mean of -0.125 and a deviation of 1.25 make.
    """

    Config = DVAEConfig
    prefix = 0

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config, self.width, self.depth = config, config.vocab_size, config.groups * config.blocks
        self.input = convolution(config.in_chans, config.hidden, 7)
        self.groups = groups(config.hidden, config.widths, config.blocks, (3, 3, 3, 1))
        self.output = convolution(config.widths[-1], config.vocab_size, 1)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        step = self.config.patch_size[0]
        return max(size[0] // step, 1), max(size[1] // step, 1)

    def _each(self, pixels: Float[Tensor, "b c h w"]) -> Iterator[Float[Tensor, "b d y x"]]:
        step = self.config.patch_size[0]  # an image below a single cell is filled up to one
        pixels = F.pad(pixels, (0, max(step - pixels.shape[3], 0), 0, max(step - pixels.shape[2], 0)))
        x = self.input(pixels)
        for number, group in enumerate(self.groups):
            x = F.max_pool2d(x, 2) if number else x
            for block in group.children():
                x = block(x)
                yield x

    def stages(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> list[Tokens]:
        if sizes is not None:
            return self._stages_one_by_one(pixels, sizes)
        return [_tokens(x) for x in self._each(pixels)]

    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Tokens:
        if sizes is not None:
            return self._one_by_one(pixels, sizes)
        *_, last = self._each(pixels)
        return _tokens(self.output(F.relu(last)))

    def layer_of(self, parameter: str) -> int:
        part, *rest = parameter.split(".")
        if part == "groups":
            return int(rest[0]) * self.config.blocks + int(rest[1]) + 1
        return 0 if part == "input" else self.depth + 1


def _tokens(x: Float[Tensor, "b d y x"]) -> Tokens:
    return Tokens(rearrange(x, "b d y x -> b (y x) d"), (x.shape[2], x.shape[3]))


FAMILIES = {"dvae": DVAE}


def _row(image: int, parameters: int, **settings: int) -> Variant:
    return Variant(
        family="dvae",
        parameters=parameters,
        paper="2102.12092",
        settings={"image_size": image, **settings},
        head={"global_pool": "avg"},
        preprocess={"crop_pct": 1.0, "interpolation": "bicubic", "mean": (-0.125,) * 3, "std": (1.25,) * 3},
        num_classes=0,
        sources=("original",) if image == 112 else (),
    )


VARIANTS = {
    "dvae_dalle_8_112": _row(112, 53_786_240),
    "dvae_small_4_32": _row(32, 86_984, hidden=32, groups=3, blocks=1, vocab_size=128),
}
