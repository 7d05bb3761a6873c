"""What convolutional networks in stages have in common: feature maps as tokens, and layers counted through stages."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.backbones.backbone import Backbone
from sightline.layers.canvas import on_canvas, real_tokens
from sightline.schema import require
from sightline.types import Tokens

_DEEPEST, _MOST_STAGES = 1024, 8


def require_stages(layers: tuple[int, ...], channels: tuple[int, ...]) -> None:
    """Raises UserError unless both have a positive number for every stage."""
    require(len(layers) == len(channels), f"layers {layers} and channels {channels} need one number for every stage")
    require(0 < len(layers) <= _MOST_STAGES, f"there are 1 to {_MOST_STAGES} stages, not {len(layers)}")
    require(min(layers) > 0, f"layers must be positive, not {layers}")
    require(sum(layers) <= _DEEPEST, f"layers {layers} are more than any network has (at most {_DEEPEST})")
    require(min(channels) > 0, f"channels must be positive, not {channels}")


class Pyramid(Backbone):
    """A stem that leaves a quarter of the rows and columns, and stages which each halve them but for the first.

    `layers` has the number of blocks of each of `blocks`. `depth` counts the blocks of all stages; `stages` has one
    entry for each. A place near the edge reads what surrounds the image, and norms may read all of it, so images of
    unlike sizes pass one by one.
    """

    layers: tuple[int, ...]
    blocks: nn.ModuleList

    @abstractmethod
    def stem(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        """The feature map that enters the first stage."""

    def final(self, x: Float[Tensor, "b d y x"]) -> Float[Tensor, "b d y x"]:
        """What follows the last stage."""
        return x

    def _each(self, pixels: Float[Tensor, "b c h w"]) -> Iterator[Float[Tensor, "b d y x"]]:
        x = self.stem(pixels)
        for stage in self.blocks:
            x = stage(x)
            yield x

    def stages(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> list[Tokens]:
        if sizes is None:
            return [_tokens(x) for x in self._each(pixels)]
        cut = zip(pixels, sizes.tolist(), strict=True)
        alone = [self.stages(image[None, :, :height, :width]) for image, (height, width) in cut]
        return [_together(images) for images in zip(*alone, strict=True)]

    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Tokens:
        if sizes is not None:
            return self._one_by_one(pixels, sizes)
        *_, x = self._each(pixels)
        return _tokens(self.final(x))

    def layer_of(self, parameter: str) -> int:
        """Blocks are counted through all stages."""
        part, *rest = parameter.split(".")
        if part == "blocks":
            return sum(self.layers[: int(rest[0])]) + int(rest[2]) + 1
        return self.depth + 1 if part == "norm" else 0


def _tokens(x: Float[Tensor, "b d r c"]) -> Tokens:
    return Tokens(rearrange(x, "b d r c -> b (r c) d"), (x.shape[-2], x.shape[-1]))


def _together(alone: Sequence[Tokens]) -> Tokens:
    """The tokens of single images on a canvas as large as the largest grid."""
    grids = [tokens.grid for tokens in alone]
    canvas = max(rows for rows, _ in grids), max(columns for _, columns in grids)
    x = torch.cat([on_canvas(tokens.x, tokens.grid, canvas, 0) for tokens in alone])
    return Tokens(x, canvas, 0, real_tokens(grids, canvas, 0).to(x.device))
