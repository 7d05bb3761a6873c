"""SimMIM (arXiv 2111.09886): hidden areas are painted by one dense layer, which suits pyramids and windows too."""

from dataclasses import dataclass

import torch
from einops import rearrange

from sightline.errors import UserError
from sightline.images.masks import noise
from sightline.layers.dense import Dense
from sightline.network import Network
from sightline.objectives.masking import cut, headless, hidden_tokens, mask_token, require_patches
from sightline.objectives.objective import Objective
from sightline.objectives.summary import Summary, joined
from sightline.schema import require
from sightline.types import Batch, Step


@dataclass(frozen=True)
class SimMIMConfig:
    """The settings of `SimMIM`: `mask_ratio` of the areas are hidden.

    `summary` is the weight of the loss of `Summary`. Raises UserError for a value out of range.
    """

    mask_ratio: float = 0.6
    summary: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, f"mask_ratio must lie between 0 and 1, not {self.mask_ratio}")
        require(self.summary >= 0, f"summary must not be negative, and is {self.summary}")


class SimMIM(Objective):
    """The mean absolute error of hidden pixels (arXiv 2111.09886, sections 3.2 to 3.4).

    An area is what one token of the last layer stands for: 32×32 pixels in Swin, a patch in a Vision Transformer. Of n
    areas int(n r) are hidden, r the mask ratio, by a learned token in place of all their patch embeddings; a dense
    layer paints an area from its token z_i:

        L = mean over hidden areas i of |W z_i + b - x_i|₁ / values

    with x the normalised pixels.
    """

    Config = SimMIMConfig

    def __init__(self, network: Network, config: SimMIMConfig = SimMIMConfig()):
        super().__init__()
        fine, self.config = require_patches(network, "simmim"), config
        self.network = headless(network)
        shape = network.architecture.backbone
        self.grid = network.backbone.grid_of(shape.image_size)
        self.times = fine[0] // self.grid[0], fine[1] // self.grid[1]
        whole = all(many == few * times for many, few, times in zip(fine, self.grid, self.times, strict=True))
        if not whole:
            raise UserError(
                f"simmim hides areas of whole patches, and {fine[0]}×{fine[1]} patches do not come out evenly as "
                f"{self.grid[0]}×{self.grid[1]}: choose another --image-size"
            )
        patch = shape.patch_size
        self.area = patch[0] * self.times[0], patch[1] * self.times[1]
        self.hidden = int(self.grid[0] * self.grid[1] * config.mask_ratio)
        require(
            self.hidden > 0, f"a mask_ratio of {config.mask_ratio} hides none of {self.grid[0] * self.grid[1]} areas"
        )
        self.mask_token = mask_token(shape.embed_dim)
        values = self.area[0] * self.area[1] * shape.in_chans
        self.pixels = Dense(network.backbone.width, values)
        self.summary = Summary(network.head.width, self.grid[0] * self.grid[1], values) if config.summary else None

    def forward(self, batch: Batch) -> Step:
        places = noise(batch.key, self.grid[0] * self.grid[1]).argsort(dim=1).to(batch.pixels.device)
        areas = torch.zeros_like(places, dtype=torch.bool).scatter(1, places[:, : self.hidden], True)
        fine = rearrange(areas, "b (r c) -> b r c", r=self.grid[0])
        fine = fine.repeat_interleave(self.times[0], 1).repeat_interleave(self.times[1], 2).flatten(1)
        tokens = hidden_tokens(self.network, batch.pixels, fine, self.mask_token)
        wanted = cut(batch.pixels, self.grid, self.area)
        usual = wanted[~areas].mean(dim=0) if bool((~areas).any()) else wanted[areas].mean(dim=0)
        painted = self.pixels(tokens.patches[areas]).float()
        baseline = (wanted[areas] - usual).abs().mean()
        loss, figures = (painted - wanted[areas]).abs().mean(), {"baseline": baseline}
        if self.summary is not None:
            told = self.summary(self.network.head.features(tokens)).float()
            apart = (told - wanted).abs().mean()
            loss = joined(loss, apart, self.config.summary, figures)
        return Step(loss, figures)


OBJECTIVES = {"simmim": SimMIM}
