"""What every backbone offers: pixels to `Tokens`, stage by stage, at any image size."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.types import Tokens

FAMILIAR = {"img_size": "image_size", "act_layer": "activation", "representation_size": "pre_logits"}
"""Names of other libraries for settings that are called otherwise here."""

_PAIRS = ("image_size", "patch_size")


def settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names they have here, and one number for a size as (height, width)."""
    named = {FAMILIAR.get(key, key): value for key, value in settings.items()}
    return {key: (value,) * 2 if key in _PAIRS and isinstance(value, int) else value for key, value in named.items()}


class Backbone(nn.Module, ABC):
    """Pixels to `Tokens`.

    `Config` is the frozen dataclass of the family's settings, with at least `image_size` (height, width) and
    `in_chans`. `width` is the size of the tokens that come out, and `depth` the number of layers.
    """

    Config: ClassVar[Any]
    width: int
    depth: int

    @abstractmethod
    def stages(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> list[Tokens]:
        """The tokens after each layer (for pyramids, each resolution), not normalised by the final norm."""

    @abstractmethod
    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Tokens:
        """The tokens that a head reads.

        `pixels` are normalised, of any size. In a batch of unlike sizes each image stands in the upper left corner of
        its canvas and `sizes` gives its (height, width) in pixels; every image gets the answer it gets alone.
        """

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
    def split(cls, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings by the field's usual names, told apart: what belongs to the backbone and what to its head."""
        own = cls.Config.__dataclass_fields__
        named = settled(settings)
        mine = {key: value for key, value in named.items() if key in own}
        return mine, {key: value for key, value in named.items() if key not in own}
