"""A network of images and texts as a classifier for classes that are named when it is asked."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.heads.zero_shot import ensemble
from sightline.network import ImageTextNetwork
from sightline.texts.byte_pairs import Vocabulary
from sightline.texts.prompts import BARE, PHOTO, prompts
from sightline.texts.vocabularies import PUBLISHED_SIZE
from sightline.types import Tokens

_AT_ONCE = 256  # texts


class ZeroShotNetwork(nn.Module):
    """Pixels to one logit for each of some texts, which stand as unit vectors in `texts` [k, d]."""

    texts: Tensor

    def __init__(self, network: ImageTextNetwork, texts: Float[Tensor, "k d"]):
        super().__init__()
        self.network, self.head, self.architecture = network, network.head, network.architecture
        self.register_buffer("texts", texts, persistent=False)

    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Any:
        return self.head.match(self.network.encode_image(pixels, sizes), self.texts).logits_per_image

    @property
    def backbone(self) -> nn.Module:
        """The image tower."""
        return self.network.backbone

    def similarity(self, tokens: Tokens) -> Float[Tensor, "k rows columns"]:
        """The cosine of each patch of one image and each of the texts."""
        return self.head.similarity(tokens, self.texts)[0].unflatten(1, tokens.grid)

    def embed(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Float[Tensor, "b d"]:
        """The images' own vectors."""
        return self.network.embed(pixels, sizes)


@torch.no_grad()
def class_vectors(
    network: ImageTextNetwork, vocabulary: Vocabulary, labels: Sequence[str], templates: Sequence[str] | None = None
) -> Float[Tensor, "k d"]:
    """One unit vector for each label: the mean of those of its prompts (arXiv 2103.00020, section 3.1.4).

    Without templates, networks with OpenAI's vocabulary are asked for "a photo of a …", others for the bare label.
    Raises UserError for labels and templates that cannot be meant.
    """
    usual = PHOTO if len(vocabulary) == PUBLISHED_SIZE else BARE
    sentences, classes = prompts(labels, usual if templates is None else templates)
    ids = vocabulary(sentences, network.head.config.context_length)
    ids = ids[:, : int((ids != 0).any(dim=0).nonzero().max()) + 1]  # what only fills up is not worth computing
    device = next(network.parameters()).device
    vectors = [network.encode_text(part.to(device)).float() for part in ids.split(_AT_ONCE)]
    return ensemble(torch.cat(vectors), classes, len(labels))
