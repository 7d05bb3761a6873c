"""A codebook of visual words, learned by a discrete autoencoder on one's own images (arXiv 2102.12092)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.backbones.dvae import DVAE
from sightline.errors import UserError
from sightline.images.augment import Augment
from sightline.images.preprocess import Preprocess
from sightline.layers.dvae import convolution, groups
from sightline.network import Network
from sightline.objectives.masking import headless
from sightline.objectives.objective import Objective
from sightline.schema import require
from sightline.types import Batch, Step

MEAN, STD = -0.125, 1.25
"""What makes 0.8 x + 0.1 of pixels x from 0 to 1."""


@dataclass(frozen=True)
class CodebookConfig:
    """The settings of `Codebook`; the defaults are those of the paper, as far as it tells them.

    The temperature falls from `temperature` to `temperature_end` along half a cosine over `anneal` of the run, and
    `kl_weight`, that of the distance of each cell's answer from an even one, rises to its value in the same time.
    `use_weight` is that of the distance of their mean, the use that a batch makes of the codes, from an even one;
    `standardised` says whether all codes begin with an equal chance. With `straight_through` the decoder sees whole
    entries and the encoder the gradient of the soft ones. `decoder_dim` is the width of the decoder's last group, 0 for
    that of the encoder's first; `decoder_input` that of what it reads of the codes. Raises UserError for values out of
    range.
    """

    temperature: float = 1.0
    temperature_end: float = 1 / 16
    anneal: float = 0.5
    kl_weight: float = 6.6
    use_weight: float = 0.0
    standardised: bool = False
    straight_through: bool = False
    decoder_dim: int = 0
    decoder_input: int = 128

    def __post_init__(self) -> None:
        for name in ("temperature", "temperature_end", "decoder_input"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("kl_weight", "use_weight", "decoder_dim"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, and is {getattr(self, name)}")
        require(0 <= self.anneal <= 1, f"anneal must lie in [0, 1], not {self.anneal}")


class Decoder(nn.Module):
    """Codes to the location and log scale of a Laplace distribution for every pixel's logit, [b, 2c, h, w]."""

    def __init__(self, vocab_size: int, channels: int, *, hidden: int, groups_: int, blocks: int, first: int):
        super().__init__()
        widths = [hidden * 2**group for group in reversed(range(groups_))]
        self.input = convolution(vocab_size, first, 1)
        self.groups = groups(first, widths, blocks, (1, 3, 3, 3))
        self.output = convolution(widths[-1], 2 * channels, 1)

    def forward(self, codes: Float[Tensor, "b k y x"]) -> Float[Tensor, "b c2 h w"]:
        x = self.input(codes)
        for number, group in enumerate(self.groups):
            x = F.interpolate(x, scale_factor=2, mode="nearest") if number else x
            for block in group.children():
                x = block(x)
        return self.output(F.relu(x))


class Codebook(Objective):
    """The evidence bound of a discrete autoencoder (arXiv 2102.12092, equation 1), by the Gumbel softmax (1611.01144).

    The encoder gives logits l of K codes for each cell; the decoder paints from y = softmax((l + g) / τ), g Gumbel
    noise (section 2.1). Pixels v = 0.8 x + 0.1 follow a Laplace distribution of their logits (appendix A.3):

        -ln p(v) = |logit(v) - μ| / b + ln(2 b v (1 - v)),   L = mean over values of -ln p(v)
                   + β mean over cells of KL(softmax(l), even) · cells / values
                   + γ KL(mean over cells of softmax(l), even) · cells / values

    The last term, γ = 0 in the paper, asks for nothing of a single cell, but that all codes be in use, as in MAGVIT-v2
    (2310.05737, the entropy of the mean answer) and MSN (2204.07141): without it few images and few updates leave codes
    that the decoder never learned to read, and that no cell has a reason to try. It is computed over the part of a
    batch that is at hand.

    Among the figures `codebook_use` and `codebook_perplexity` say how many entries the images of a batch are called by,
    as a share of all and as a number: a codebook that fell to one entry says nothing.
    """

    Config = CodebookConfig
    compares = True

    def __init__(self, network: Network, config: CodebookConfig = CodebookConfig()):
        super().__init__()
        if not isinstance(network.backbone, DVAE):
            raise UserError("a codebook is learned by an encoder of the family 'dvae' (--model dvae_small_4_32)")
        self.network, self.config, self.progress = headless(network), config, 0.0
        shape = network.architecture.backbone
        self.decoder = Decoder(
            shape.vocab_size,
            shape.in_chans,
            hidden=config.decoder_dim or shape.hidden,
            groups_=shape.groups,
            blocks=shape.blocks,
            first=config.decoder_input,
        )

    def views(self, augment: Augment, preprocess: Preprocess) -> Callable[..., Any]:
        usual = set(preprocess.mean) == {MEAN} and set(preprocess.std) == {STD}
        require(usual, f"a codebook reads pixels of mean {MEAN} and deviation {STD}, not others")
        return augment.bind(preprocess)

    @torch.no_grad()
    def prepare(self, pixels: Float[Tensor, "b c h w"]) -> None:
        """Where `standardised`, every code's logit gets the mean 0 and the deviation 1 over the cells of these images.

        (Weight normalisation's initialisation from data, 1602.07868, section 3.) Random weights after a ReLU, whose
        values have a mean, give some codes larger logits than others everywhere, which `use_weight` then has to undo.
        """
        if self.config.standardised:
            logits = rearrange(self.network.backbone(pixels).x, "b n k -> (b n) k").float()
            deviation, mean = torch.std_mean(logits, dim=0, correction=0)
            output = self.network.backbone.output
            output.weight /= deviation.clamp(min=1e-6)[:, None, None, None]
            output.bias.copy_((output.bias - mean) / deviation.clamp(min=1e-6))

    def before_update(self, progress: float) -> None:
        self.progress = progress

    def forward(self, batch: Batch) -> Step:
        config, tokens = self.config, self.network.backbone(batch.pixels)
        risen = 1.0 if not config.anneal else min(self.progress / config.anneal, 1.0)
        fallen = 0.5 * (1 + math.cos(math.pi * risen))
        temperature = config.temperature_end + (config.temperature - config.temperature_end) * fallen
        logits = tokens.x.float()
        codes = F.gumbel_softmax(logits, tau=temperature, hard=config.straight_through, dim=-1)
        painted = self.decoder(rearrange(codes, "b (y x) k -> b k y x", y=tokens.grid[0]))
        seen = batch.pixels[..., : painted.shape[2], : painted.shape[3]]
        loss = log_laplace(seen, painted[..., : seen.shape[2], : seen.shape[3]].float()).mean()
        chances, cells = logits.log_softmax(dim=-1), logits.shape[1] / seen[0].numel()
        if config.kl_weight:
            loss = loss + config.kl_weight * risen * cells * uneven(chances).mean()
        if config.use_weight:
            together = rearrange(chances, "b n k -> (b n) k")
            loss = loss + config.use_weight * cells * uneven(together.logsumexp(dim=0) - math.log(len(together)))
        location = painted[:, : seen.shape[1], : seen.shape[2], : seen.shape[3]].detach()
        error = (location.float().sigmoid() - seen).abs().mean() / 0.8
        return Step(loss, {"pixel_error": error} | usage(logits.detach().argmax(dim=-1), logits.shape[-1]))


def log_laplace(pixels: Float[Tensor, "b c h w"], statistics: Float[Tensor, "b c2 h w"]) -> Float[Tensor, "b c h w"]:
    """-ln p of each pixel, 0 to 1 without the ends, whose logit has a Laplace distribution of (location, log scale)."""
    location, log_scale = statistics.chunk(2, dim=1)
    distance = (torch.logit(pixels, eps=1e-4) - location).abs()
    return distance * torch.exp(-log_scale) + log_scale + torch.log(2 * pixels * (1 - pixels))


def uneven(chances: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
    """The distance KL(p, even) of distributions from the even one, 0 to ln k, of their logarithms."""
    return math.log(chances.shape[-1]) + (chances.exp() * chances).sum(dim=-1)


@torch.no_grad()
def usage(ids: Int[Tensor, "*n"], vocabulary: int) -> dict[str, Tensor]:
    """How many entries of a codebook are in use: the exponential of the entropy of their shares, and that of all."""
    shares = torch.bincount(ids.flatten(), minlength=vocabulary).double() / max(ids.numel(), 1)
    perplexity = torch.special.entr(shares).sum().exp()
    return {"codebook_perplexity": perplexity, "codebook_use": perplexity / vocabulary}


OBJECTIVES = {"codebook": Codebook}
