"""What every backbone offers: pixels to `Tokens`, stage by stage, at any image size."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.errors import UserError
from sightline.types import Tokens

FAMILIAR = {"img_size": "image_size", "act_layer": "activation", "representation_size": "pre_logits"}
"""Names of other libraries for settings that are called otherwise here."""

_PAIRS = ("image_size", "patch_size")


class Backbone(nn.Module, ABC):
    """Pixels to `Tokens`.

    `Config` is the frozen dataclass of the family's settings, with at least `image_size` (height, width) and
    `in_chans`. `width` is the size of the tokens that come out, and `depth` the number of layers.
    """

    Config: ClassVar[Any]
    config: Any
    width: int
    depth: int

    @property
    def merges(self) -> bool:
        """Whether its layers merge tokens."""
        return False

    def merge(self, r: int) -> None:
        """From now on every layer merges `r` patches (arXiv 2210.09461).

        Raises UserError where that is no Vision Transformer of one resolution with positions that are added once.
        """
        if r == 0:
            return
        raise UserError(
            f"tokens cannot be merged in a {type(self).__name__}: windows, pooling, convolutions and layers of its own "
            "kind need each token at its place; it is for Vision Transformers (vit, deit, dinov2, clip, …)"
        )

    @abstractmethod
    def stages(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> list[Tokens]:
        """The tokens after each layer (for pyramids, each resolution), not normalised by the final norm."""

    @abstractmethod
    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Tokens:
        """The tokens that a head reads.

        `pixels` are normalised, of any size. In a batch of unlike sizes each image stands in the upper left corner of
        its canvas and `sizes` gives its (height, width) in pixels; every image gets the answer it gets alone.
        """

    def _one_by_one(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"]) -> Tokens:
        """What `forward` makes of each image of a padded batch alone, on a canvas as large as the largest grid.

        For families in which neighbours across the edge of an image cannot be hidden by a mask.
        """
        return _on_one_canvas([self(image) for image in _cropped(pixels, sizes)])

    def _stages_one_by_one(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"]) -> list[Tokens]:
        """The same of `stages`."""
        alone = [self.stages(image) for image in _cropped(pixels, sizes)]
        return [_on_one_canvas(list(stage)) for stage in zip(*alone, strict=True)]

    def whole(
        self, name: str, weights: Float[Tensor, "b h n m"], size: tuple[int, int], *, shares: bool = True
    ) -> tuple[Float[Tensor, "b h n n"], tuple[int, int]]:
        """The map of the attention layer `name` over all tokens of that layer, prefix first, and the layer's grid.

        `weights` is what `Attention.weights` gives for an image of `size` (height, width) in pixels. Families that
        attend within windows lay them side by side; the grid is that of the layer, which in pyramids is not the last.
        With `shares=False` the numbers are no shares, such as gradients: they are laid out as they are, and whoever did
        not ask has zeros.
        """
        return weights, self.grid_of(size)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tokens that come out for an image of `size` (height, width) in pixels."""
        memo: dict[int, Any] = {
            id(tensor): torch.empty_like(tensor, device="meta") for tensor in (*self.parameters(), *self.buffers())
        }
        pixels = torch.empty(1, self.config.in_chans, *size, device="meta")
        return copy.deepcopy(self, memo)(pixels).grid

    def layer_of(self, parameter: str) -> int:
        """The layer that a parameter belongs to, 0 (embeddings) to `depth + 1` (what follows the last layer).

        Layer-wise learning-rate decay reads it (arXiv 2106.08254, appendix H).
        """
        return self.depth + 1

    def resample(self, state: Mapping[str, Tensor], other: "Backbone") -> dict[str, tuple[Tensor, str]]:
        """What this backbone needs otherwise than `other`, of another image size, whose tensors are `state`.

        By name, the tensor for this size and how it was made, in words for people. Empty where nothing depends on the
        size.
        """
        return {}

    @classmethod
    def tokens(cls, config: Any) -> int:
        """How many tokens an image of the configuration's own size becomes, where they are most.

        Nothing large is built for it.
        """
        sides = zip(config.image_size, getattr(config, "patch_size", (1, 1)), strict=True)
        return math.prod(-(-pixels // side) for pixels, side in sides)

    @classmethod
    def computed(cls, config: Any) -> int:
        """How many numbers a network of this configuration holds that are computed from it, and in no checkpoint."""
        return 0

    @classmethod
    def settle(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings under the names they have here, and one number for a size as (height, width)."""
        named = {FAMILIAR.get(key, key): value for key, value in settings.items()}
        pairs = {key: (value, value) for key, value in named.items() if key in _PAIRS and isinstance(value, int)}
        return named | pairs

    @classmethod
    def split(cls, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings by the field's usual names, told apart: what belongs to the backbone and what to its head."""
        own = cls.Config.__dataclass_fields__
        named = cls.settle(settings)
        mine = {key: value for key, value in named.items() if key in own}
        return mine, {key: value for key, value in named.items() if key not in own}


def _cropped(pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"]) -> list[Float[Tensor, "1 c height width"]]:
    return [image[None, :, :h, :w] for image, (h, w) in zip(pixels, sizes.tolist(), strict=True)]


def _on_one_canvas(alone: list[Tokens]) -> Tokens:
    """Tokens of single images side by side, each in the upper left corner of the largest grid."""
    rows, columns = (max(sides) for sides in zip(*(tokens.grid for tokens in alone), strict=True))
    prefix, first = alone[0].prefix, alone[0].x
    x = first.new_zeros(len(alone), prefix + rows * columns, first.shape[-1])
    mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    cells = torch.arange(rows * columns, device=x.device).reshape(rows, columns)
    before = torch.arange(prefix, device=x.device)
    for image, tokens in enumerate(alone):
        own = torch.cat([before, cells[: tokens.grid[0], : tokens.grid[1]].flatten() + prefix])
        x[image, own], mask[image, own] = tokens.x[0], True
    return Tokens(x, (rows, columns), prefix, mask)
