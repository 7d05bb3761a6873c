"""Images and texts in one space (CLIP, arXiv 2103.00020): how well each text describes each image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.backbones.text import TextTower
from sightline.errors import printable
from sightline.heads.classify import most_probable
from sightline.layers.dense import Dense
from sightline.layers.encoder import ACTIVATIONS
from sightline.schema import require
from sightline.types import Area, Placement, Prediction, Tokens

MOST_LAYERS, MOST = 2**10, 2**20

MAX_SCALE = 100.0
"""Largest factor of the cosines: where it grows beyond, training becomes unstable (section 2.5)."""


class Matches(NamedTuple):
    """How well images and texts fit: `logits_per_image` [images, texts], and the same turned round."""

    logits_per_image: Float[Tensor, "b k"]
    logits_per_text: Float[Tensor, "k b"]


@dataclass(frozen=True)
class ClipConfig:
    """The settings of what stands behind the image tower: the text tower, both projections, the temperature.

    `projection_dim` is the size of the space that both towers lead to. `context_length` is the most tokens of a text,
    `vocab_size` the number of different ones; `eos_token_id` the one that ends a text (None: the highest in it).
    `text_width`, `text_depth`, `text_heads` and `text_mlp_dim` (None: four times the width) are the text tower's.
    `logit_scale_init` is the logarithm of the factor of the cosines at first; with `logit_bias_init` a number is added
    to them, as in SigLIP (arXiv 2303.15343). Raises UserError for values out of range.
    """

    projection_dim: int = 512
    context_length: int = 77
    vocab_size: int = 49_408
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    text_mlp_dim: int | None = None
    text_activation: str = "quick_gelu"
    text_norm_eps: float = 1e-5
    eos_token_id: int | None = None
    logit_scale_init: float = math.log(1 / 0.07)
    logit_bias_init: float | None = None

    def __post_init__(self) -> None:
        for name in ("projection_dim", "context_length", "vocab_size", "text_width", "text_heads", "text_depth"):
            most = MOST_LAYERS if name == "text_depth" else MOST
            require(0 < getattr(self, name) <= most, f"{name} must lie in 1 to {most}, and is {getattr(self, name)}")
        require(self.text_hidden > 0, f"text_mlp_dim must be positive, not {self.text_mlp_dim}")
        divides = self.text_width % self.text_heads == 0
        require(divides, f"text_width {self.text_width} is not a multiple of text_heads {self.text_heads}")
        require(0 <= self.text_norm_eps < 1, f"text_norm_eps must lie in [0, 1), not {self.text_norm_eps}")
        known = self.text_activation in ACTIVATIONS
        require(known, f"text_activation '{printable(self.text_activation)}' is not one of {', '.join(ACTIVATIONS)}")
        end = self.eos_token_id
        require(end is None or 0 <= end < self.vocab_size, f"eos_token_id {end} is not in the vocabulary")
        require(math.isfinite(self.logit_scale_init), "logit_scale_init must be a finite number")

    @property
    def global_pool(self) -> str:
        """What is read of an image: its class token."""
        return "token"

    @property
    def text_hidden(self) -> int:
        """Width of the hidden layer of each MLP of the text tower."""
        return 4 * self.text_width if self.text_mlp_dim is None else self.text_mlp_dim


class ClipHead(nn.Module):
    """The text tower, and the space in which images and texts are compared by their cosine.

    An image stands there as the projection of its class token, or of the mean of its patches without one; a text as
    that of the token that ends it. Cosines times `exp(logit_scale)`, plus `logit_bias` where there is one, are logits.
    """

    Config = ClipConfig
    task = "clip"
    per_class = ()
    before_classes = ()

    def __init__(self, config: ClipConfig, width: int):
        super().__init__()
        self.config = config
        self.projection = Dense(width, config.projection_dim, bias=False)
        self.text = TextTower(
            config.text_width,
            depth=config.text_depth,
            heads=config.text_heads,
            hidden=config.text_hidden,
            length=config.context_length,
            vocabulary=config.vocab_size,
            end=config.eos_token_id,
            activation=config.text_activation,
            eps=config.text_norm_eps,
        )
        self.text_projection = Dense(config.text_width, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init))
        bias = config.logit_bias_init
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        for projection in (self.projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def features(self, tokens: Tokens) -> Float[Tensor, "b d"]:
        """An image's place in the common space, [batch, projection_dim], not normalised."""
        return self.projection(tokens.x[:, 0] if tokens.prefix else tokens.mean())

    def renew(self) -> None:
        """There are no classes to forget: what was learned goes on."""

    def forward(self, tokens: Tokens, area: Area | None = None) -> Float[Tensor, "b d"]:
        return self.features(tokens)

    def similarity(self, tokens: Tokens, texts: Float[Tensor, "k d"]) -> Float[Tensor, "b k patches"]:
        """The cosine of each patch, taken to the common space as the image is, and each text (-1 to 1).

        The network learns to compare whole images; that patches lie near the words for what they show is a by-product.
        """
        patches = F.normalize(self.projection(tokens.patches).float(), dim=-1)
        return F.normalize(texts.float(), dim=-1) @ patches.transpose(1, 2)

    def encode_text(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """A text's place in the common space, [batch, projection_dim], not normalised."""
        return self.text_projection(self.text(ids))

    def match(self, images: Float[Tensor, "b d"], texts: Float[Tensor, "k d"]) -> Matches:
        """The logits of images and texts, from their places in the common space: scaled cosines, in float32."""
        cosines = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
        logits = self.logit_scale.float().exp() * cosines
        logits = logits if self.logit_bias is None else logits + self.logit_bias.float()
        return Matches(logits, logits.T)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps the factor of the cosines at `MAX_SCALE` or below."""
        self.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def read(
        self,
        output: Float[Tensor, "b k"],
        labels: Sequence[str],
        top: int = 5,
        places: Sequence[Placement] | None = None,
    ) -> list[Prediction]:
        """The answer for each image from its logits for the texts of `labels`: the `top` most probable of them."""
        return most_probable(output, labels, top)


def ensemble(embeddings: Float[Tensor, "n d"], classes: Sequence[int], count: int) -> Float[Tensor, "k d"]:
    """One unit vector for each of `count` classes: the mean of the unit vectors of its prompts (section 3.1.4).

    `classes` says which class each row of `embeddings` is a prompt of. Raises AssertionError for a class without any.
    """
    rows = F.normalize(embeddings.float(), dim=-1)
    index = torch.as_tensor(classes, device=rows.device)
    assert torch.bincount(index, minlength=count).min() > 0, "each class needs a prompt"
    summed = rows.new_zeros(count, rows.shape[1]).index_add_(0, index, rows)
    return F.normalize(summed / torch.bincount(index, minlength=count)[:, None], dim=-1)


HEADS = {"clip": ClipHead}
