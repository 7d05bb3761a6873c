"""BEiT (arXiv 2106.08254): hidden patches are called by the words of a visual codebook."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from sightline.backbones.dvae import DVAE
from sightline.errors import UserError
from sightline.images.augment import Augment
from sightline.images.masks import blockwise
from sightline.images.preprocess import Preprocess
from sightline.layers.dense import Dense
from sightline.network import Network
from sightline.objectives.codebook import MEAN, STD, usage
from sightline.objectives.masked_patch import bound, plain
from sightline.objectives.masking import headless, hidden_tokens, mask_token, require_one_token_each
from sightline.objectives.objective import Objective
from sightline.objectives.summary import Summary, joined
from sightline.schema import require
from sightline.types import Batch, Step


@dataclass(frozen=True)
class BEiTConfig:
    """The settings of `BEiT`: about `mask_ratio` of the patches are hidden, in blocks.

    `codebook` names the model that calls patches by words, as `load` takes it; empty, one is learned first on the same
    images. `summary` is the weight of the loss of `Summary`. Raises UserError for a value out of range.
    """

    codebook: str = ""
    mask_ratio: float = 75 / 196
    summary: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, f"mask_ratio must lie between 0 and 1, not {self.mask_ratio}")
        require(self.summary >= 0, f"summary must not be negative, and is {self.summary}")


class Words(nn.Module):
    """Pixels of 0 to 1 to the codebook's most probable entry for each patch, by a frozen network of the family 'dvae'.

    `step` is how many pixels (rows, columns) make a word.
    """

    def __init__(self, network: Network):
        super().__init__()
        if not isinstance(network.backbone, DVAE):
            raise UserError(
                "a codebook is a network of the family 'dvae', as `sightline pretrain --objective codebook`"
            )
        self.network = network.requires_grad_(False).eval()
        self.vocabulary, self.step = network.backbone.width, network.architecture.backbone.patch_size

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        return self.network.backbone((pixels - MEAN) / STD).x.argmax(dim=-1)


class BEiT(Objective):
    """Cross-entropy of the words of hidden patches (arXiv 2106.08254, equation 2).

    Blocks of patches M, about 40 % of them, give way to the mask token; the output z_i of each tells the word w_i that
    the codebook calls it by in the image unhidden:

        L = mean over images of the mean over i in M of -log softmax(W z_i + b)_{w_i}

    `words` is any function of pixels from 0 to 1 to the words of all patches, [b, n], with `vocabulary`, their number,
    and `step`, the pixels (rows, columns) that make one: the image comes to it at that many pixels for each patch.
    """

    Config = BEiTConfig
    first: ClassVar[Mapping[str, str]] = {"codebook": "codebook"}

    def __init__(self, network: Network, config: BEiTConfig = BEiTConfig(), *, words: Any):
        super().__init__()
        self.grid, self.config, self.words = require_one_token_each(network, "beit"), config, words
        self.network = headless(network)
        self.hidden = int(self.grid[0] * self.grid[1] * config.mask_ratio + 1e-9)
        require(self.hidden > 0, f"a mask_ratio of {config.mask_ratio} hides no patch of {self.grid[0]}×{self.grid[1]}")
        self.mask_token = mask_token(network.architecture.backbone.embed_dim)
        self.word = Dense(network.backbone.width, words.vocabulary)
        nn.init.trunc_normal_(self.word.weight, std=0.02)
        nn.init.zeros_(self.word.bias)
        cells = self.grid[0] * self.grid[1]
        self.summary = Summary(network.head.width, cells, words.vocabulary) if config.summary else None

    def train(self, mode: bool = True) -> "BEiT":
        """Training leaves the codebook as it is."""
        super().train(mode)
        if isinstance(self.words, nn.Module):
            self.words.eval()
        return self

    def views(self, augment: Augment, preprocess: Preprocess) -> Callable[..., Any]:
        step = self.words.step
        return WithReading(augment, preprocess, (self.grid[0] * step[0], self.grid[1] * step[1]))

    def forward(self, batch: Batch) -> Step:
        masks = blockwise(batch.key, self.grid, self.hidden).to(batch.pixels.device)
        with torch.no_grad():
            words = self.words(batch.views[0])
        tokens = hidden_tokens(self.network, batch.pixels, masks, self.mask_token)
        logits, wanted = self.word(tokens.patches[masks]).float(), words[masks]
        each = 1 / masks.sum(dim=1, keepdim=True).clamp(min=1).expand_as(masks)[masks]
        loss = (F.cross_entropy(logits, wanted, reduction="none") * each).sum() / len(masks)
        with torch.no_grad():
            shares = torch.bincount(wanted, minlength=self.words.vocabulary).double() / max(len(wanted), 1)
            right = (logits.argmax(dim=1) == wanted).float().mean()
        baseline = torch.special.entr(shares).sum()
        figures = {"accuracy": right, "baseline": baseline} | usage(words, self.words.vocabulary)
        if self.summary is not None:
            told = self.summary(self.network.head.features(tokens)).float()
            apart = F.cross_entropy(told.flatten(0, 1), words.flatten())
            loss = joined(loss, apart, self.config.summary, figures)
        return Step(loss, figures)


@dataclass(frozen=True)
class WithReading:
    """An image varied, and the same view as the codebook reads it, 0 to 1: a picklable function of (image, key)."""

    augment: Augment
    preprocess: Preprocess
    size: tuple[int, int]

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], key: int) -> tuple[Tensor, Tensor]:
        pixels = bound(self.augment, self.preprocess)(image, key)
        whole = plain(pixels, self.preprocess)[None]
        reduced = F.interpolate(whole, self.size, mode="bicubic", antialias=True, align_corners=False)
        return pixels, reduced[0].clamp(0, 1)


OBJECTIVES = {"beit": BEiT}
