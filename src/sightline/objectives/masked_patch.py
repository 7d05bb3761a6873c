"""Masked patch prediction (arXiv 2010.11929, appendix B.1.2): which colour a hidden patch had."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from sightline.images.augment import Augment, Augmented
from sightline.images.masks import noise
from sightline.images.preprocess import Preprocess
from sightline.layers.dense import Dense
from sightline.network import Network
from sightline.objectives.masking import at, cut, headless, mask_token, replaced, require_one_token_each
from sightline.objectives.objective import Objective
from sightline.objectives.summary import Summary, joined
from sightline.schema import require
from sightline.types import Batch, Step

LEVELS = 8
"""Levels of each channel: three bits."""


@dataclass(frozen=True)
class MaskedPatchConfig:
    """The settings of `MaskedPatch`; the defaults are those of the paper.

    `mask_ratio` of the patches are asked for; of these `hidden` give way to the mask token and `exchanged` to another
    patch of the same image, and the rest stay. `summary` is the weight of the loss of `Summary`. Raises UserError for
    values out of range.
    """

    mask_ratio: float = 0.5
    hidden: float = 0.8
    exchanged: float = 0.1
    summary: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, f"mask_ratio must lie between 0 and 1, not {self.mask_ratio}")
        require(self.summary >= 0, f"summary must not be negative, and is {self.summary}")
        whole = min(self.hidden, self.exchanged) >= 0 and self.hidden + self.exchanged <= 1
        require(whole, f"hidden ({self.hidden}) and exchanged ({self.exchanged}) are shares that sum to 1 at most")


class MaskedPatch(Objective):
    """Cross-entropy of the colour of half of the patches (arXiv 2010.11929, appendix B.1.2).

    Of n patch embeddings int(n r) are chosen, r the mask ratio; 80 % of them become the mask token, 10 % the embedding
    of another patch and 10 % stay. The output z_i of each tells the mean colour of its patch, three bits a channel:

        L = mean over chosen i of -log p(y_i | z_i),  y_i = 64 q(r) + 8 q(g) + q(b),  q(x) = ⌊8 x⌋ of the mean x

    with x from 0 to 1.

    Images of one channel have 8 colours.
    """

    Config = MaskedPatchConfig

    def __init__(self, network: Network, config: MaskedPatchConfig = MaskedPatchConfig()):
        super().__init__()
        self.grid, self.config = require_one_token_each(network, "masked-patch"), config
        self.network = headless(network)
        shape = network.architecture.backbone
        cells = self.grid[0] * self.grid[1]
        self.asked = int(cells * config.mask_ratio)
        require(self.asked > 0 and cells > 1, f"a mask_ratio of {config.mask_ratio} hides none of {cells} patches")
        self.mask_token = mask_token(shape.embed_dim)
        self.colour = Dense(network.backbone.width, LEVELS**shape.in_chans)
        nn.init.xavier_uniform_(self.colour.weight)
        nn.init.zeros_(self.colour.bias)
        colours = self.colour.out_features
        self.summary = Summary(network.head.width, cells, colours) if config.summary else None

    def views(self, augment: Augment, preprocess: Preprocess) -> Callable[..., Any]:
        patch = self.network.architecture.backbone.patch_size
        return WithColours(augment, preprocess, self.grid, patch)

    def forward(self, batch: Batch) -> Step:
        cells = self.grid[0] * self.grid[1]
        device = batch.pixels.device
        places = noise(batch.key, cells).argsort(dim=1)[:, : self.asked].to(device)
        fate, other = (noise(batch.key, self.asked, salt).to(device) for salt in (1, 2))
        with replaced(self.network.backbone, lambda x: self.corrupted(x, places, fate, other)):
            tokens = self.network.backbone(batch.pixels)
        logits = rearrange(self.colour(at(tokens.patches, places)).float(), "b k c -> (b k) c")
        wanted = batch.views[0].gather(1, places).flatten()
        with torch.no_grad():
            usual = F.one_hot(wanted, logits.shape[1]).double().mean(dim=0)
            figures = {
                "accuracy": (logits.argmax(dim=1) == wanted).float().mean(),
                "baseline": torch.special.entr(usual).sum(),
            }
        loss = F.cross_entropy(logits, wanted)
        if self.summary is not None:
            told = self.summary(self.network.head.features(tokens)).float()
            apart = F.cross_entropy(told.flatten(0, 1), batch.views[0].flatten())
            loss = joined(loss, apart, self.config.summary, figures)
        return Step(loss, figures)

    def corrupted(
        self,
        x: Float[Tensor, "b n d"],
        places: Int[Tensor, "b k"],
        fate: Float[Tensor, "b k"],
        other: Float[Tensor, "b k"],
    ) -> Float[Tensor, "b n d"]:
        """The embeddings with those at `places` hidden, exchanged or left, as noise in [0, 1) decides."""
        cells, config = x.shape[1], self.config
        elsewhere = (places + 1 + (other * (cells - 1)).long().clamp(max=cells - 2)) % cells
        fate = fate[..., None]
        rest = torch.where(fate < config.hidden + config.exchanged, at(x, elsewhere), at(x, places))
        new = torch.where(fate < config.hidden, self.mask_token.to(x.dtype), rest)
        return x.scatter(1, repeat(places, "b k -> b k d", d=x.shape[2]), new)


@lru_cache(maxsize=4)
def bound(augment: Augment, preprocess: Preprocess) -> Augmented:
    """The augmentation for one pixel contract, made once in each process."""
    return augment.bind(preprocess)


@dataclass(frozen=True)
class WithColours:
    """An image varied, and the class of each patch's mean colour: a picklable function of (image, key)."""

    augment: Augment
    preprocess: Preprocess
    grid: tuple[int, int]
    patch: tuple[int, int]

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], key: int) -> tuple[Tensor, Tensor]:
        pixels = bound(self.augment, self.preprocess)(image, key)
        return pixels, colours(plain(pixels, self.preprocess)[None], self.grid, self.patch)[0]


def plain(pixels: Float[Tensor, "*b c h w"], preprocess: Preprocess) -> Float[Tensor, "*b c h w"]:
    """Pixels of 0 to 1 again, from normalised ones."""
    mean, std = (
        torch.tensor(colour, device=pixels.device)[:, None, None] for colour in (preprocess.mean, preprocess.std)
    )
    return (pixels * std + mean).clamp(0, 1)


def colours(pixels: Float[Tensor, "b c h w"], grid: tuple[int, int], patch: tuple[int, int]) -> Int[Tensor, "b n"]:
    """The class of each patch's mean colour, of pixels from 0 to 1; the first channel counts most."""
    channels = pixels.shape[1]
    means = rearrange(cut(pixels, grid, patch), "b n (p c) -> b n p c", c=channels).mean(dim=2)
    levels = (means * LEVELS).long().clamp(0, LEVELS - 1)
    return (levels * LEVELS ** torch.arange(channels - 1, -1, -1, device=pixels.device)).sum(dim=-1)


OBJECTIVES = {"masked-patch": MaskedPatch}
