"""Masked autoencoding (arXiv 2111.06377): most patches are hidden, and the pixels of these are painted anew."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.backbones.vit import ViT
from sightline.errors import UserError
from sightline.images.masks import noise
from sightline.layers.dense import Dense
from sightline.layers.encoder import Encoder
from sightline.layers.positions import FixedPositions
from sightline.network import Network
from sightline.objectives.masking import at, cut, headless, mask_token, require_patches
from sightline.objectives.objective import Objective
from sightline.objectives.summary import Summary, joined
from sightline.schema import require
from sightline.types import Batch, Step, Tokens


@dataclass(frozen=True)
class MAEConfig:
    """The settings of `MAE`; the defaults are those of the paper.

    `mask_ratio` of the patches are hidden; `norm_pix` sets each patch's pixels to mean 0 and variance 1 before they are
    asked for. The decoder is a Vision Transformer of `decoder_dim`, a multiple of 4 and of `decoder_heads`. `summary`
    is the weight of the loss of `Summary`. Raises UserError for values out of range.
    """

    mask_ratio: float = 0.75
    norm_pix: bool = True
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    summary: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, f"mask_ratio must lie between 0 and 1, not {self.mask_ratio}")
        require(self.summary >= 0, f"summary must not be negative, and is {self.summary}")
        for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for divisor in (4, self.decoder_heads):
            require(self.decoder_dim % divisor == 0, f"decoder_dim {self.decoder_dim} is not a multiple of {divisor}")


class Decoder(nn.Module):
    """Paints all patches from the tokens of those that were seen; positions are fixed waves."""

    def __init__(self, width: int, grid: tuple[int, int], prefix: int, values: int, config: MAEConfig):
        super().__init__()
        self.grid, self.prefix, inner = grid, prefix, config.decoder_dim
        self.embed = Dense(width, inner)
        self.mask_token = mask_token(inner)
        self.positions = FixedPositions(inner, grid, prefix=prefix)
        self.encoder = Encoder(config.decoder_depth, width=inner, heads=config.decoder_heads, hidden=4 * inner)
        self.norm = nn.LayerNorm(inner, eps=1e-6)
        self.pixels = Dense(inner, values)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, latent: Float[Tensor, "b kept d"], order: Int[Tensor, "b n"]) -> Float[Tensor, "b n values"]:
        """`order` says for each patch which of the seen tokens, and then of the hidden ones, is its own."""
        x = self.embed(latent)
        hidden = self.mask_token.to(x.dtype).expand(len(x), order.shape[1] + self.prefix - x.shape[1], -1)
        patches = at(torch.cat([x[:, self.prefix :], hidden], dim=1), order)
        x = torch.cat([x[:, : self.prefix], patches], dim=1) + self.positions(self.grid)
        return self.pixels(self.norm(self.encoder(x)))[:, self.prefix :]


class MAE(Objective):
    """The mean squared error of hidden patches (arXiv 2111.06377, section 3).

    Of n patches the int(n (1 - r)) with the smallest noise are seen, r the mask ratio; only they pass the encoder f,
    with their positions, and a small decoder g paints all patches from them and mask tokens:

        L = mean over hidden patches i of |g(f(x_seen))_i - y_i|² / values,  y = (x - mean(x)) / √(var(x) + 10⁻⁶)

    with mean and unbiased variance over the patch. Encoders are Vision Transformers of any kind of positions: windows,
    pooling and convolutions have no use for a sequence with gaps, and are refused with UserError.
    """

    Config = MAEConfig

    def __init__(self, network: Network, config: MAEConfig = MAEConfig()):
        super().__init__()
        if not isinstance(network.backbone, ViT):
            raise UserError(
                "mae drops hidden patches before the encoder, and the family "
                f"'{network.architecture.family}' needs all of them at their places: take simmim"
            )
        self.grid, self.config = require_patches(network, "mae"), config
        self.network = headless(network)
        shape = network.architecture.backbone
        self.patch, cells = shape.patch_size, self.grid[0] * self.grid[1]
        self.seen = int(cells * (1 - config.mask_ratio))
        require(self.seen > 0, f"a mask_ratio of {config.mask_ratio} leaves none of {cells} patches to be seen")
        values = shape.in_chans * self.patch[0] * self.patch[1]
        self.decoder = Decoder(shape.embed_dim, self.grid, shape.prefix, values, config)
        self.summary = Summary(network.head.width, cells, values) if config.summary else None

    def forward(self, batch: Batch) -> Step:
        drawn = noise(batch.key, self.grid[0] * self.grid[1]).to(batch.pixels.device)
        return self.painted(batch.pixels, drawn)[0]

    def painted(
        self, pixels: Float[Tensor, "b c h w"], drawn: Float[Tensor, "b n"]
    ) -> tuple[Step, Float[Tensor, "b n values"]]:
        """The loss for given noise, and the decoder's answer for every patch.

        `baseline` among the figures is the loss of answering every hidden patch with what seen ones are on average.
        """
        places = drawn.argsort(dim=1)
        latent = self.encode(pixels, places[:, : self.seen])
        answer = self.decoder(latent, places.argsort(dim=1))
        target, hidden = self.target(pixels), places[:, self.seen :]
        wanted = at(target, hidden)
        loss = (at(answer.float(), hidden) - wanted).square().mean()
        usual = at(target, places[:, : self.seen]).mean(dim=(0, 1))
        figures = {"baseline": (wanted - usual).square().mean()}
        if self.summary is not None:
            seen = Tokens(latent, (1, self.seen), latent.shape[1] - self.seen)
            apart = (self.summary(self.network.head.features(seen)).float() - target).square().mean()
            loss = joined(loss, apart, self.config.summary, figures)
        return Step(loss, figures), answer

    def encode(self, pixels: Float[Tensor, "b c h w"], seen: Int[Tensor, "b kept"]) -> Float[Tensor, "b k d"]:
        """The encoder's tokens of the patches `seen` alone, prefix tokens first."""
        backbone = self.network.backbone
        tokens, bias = backbone.embed(pixels)
        before = torch.arange(tokens.prefix, device=seen.device).expand(len(seen), -1)
        kept = torch.cat([before, seen + tokens.prefix], dim=1)
        return backbone.norm(backbone.encoder(at(tokens.x, kept), _between(bias, kept)))

    def target(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n values"]:
        """What the decoder has to answer for every patch."""
        patches = cut(pixels, self.grid, self.patch).float()
        if not self.config.norm_pix:
            return patches
        return (patches - patches.mean(dim=-1, keepdim=True)) / (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def _between(bias: Sequence[Tensor] | Tensor | None, kept: Int[Tensor, "b k"]) -> list[Tensor] | Tensor | None:
    """Relative positions between the kept tokens of each image alone."""
    if bias is None:
        return None
    if isinstance(bias, Tensor):
        return rearrange(bias[0][:, kept[:, :, None], kept[:, None, :]], "h b q k -> b h q k")
    return [rearrange(each[0][:, kept[:, :, None], kept[:, None, :]], "h b q k -> b h q k") for each in bias]


OBJECTIVES = {"mae": MAE}
