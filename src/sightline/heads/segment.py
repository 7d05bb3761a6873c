"""Tokens to a class for every pixel: Segmenter (arXiv 2105.05633)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8, UInt16
from PIL import Image
from torch import Tensor, nn

from sightline.layers.dense import Dense
from sightline.layers.encoder import Encoder
from sightline.schema import require
from sightline.types import Area, Gaze, Placement, Reply, Score, Step, Tokens

IGNORE = 255
"""The class of pixels that teach nothing."""

_AT_ONCE = 2**24
"""Numbers that are computed at a time when class maps are brought to the size of an image."""


@dataclass(frozen=True)
class SegmentConfig:
    """The settings of a `SegmentHead`.

    `decoder="linear"` is a dense layer on each patch (section 3.2.1); "mask" is the mask transformer of section 3.2.2
    with `decoder_layers` blocks of `decoder_heads` heads, left out one for every 64 channels. `cells` is the number of
    cells along the side of a patch that each patch tells apart; the paper's one lets the maps be no finer than the
    patches are. `class_weights` weigh the classes in the loss. Raises UserError for values out of range.
    """

    num_classes: int = 150
    decoder: Literal["linear", "mask"] = "mask"
    decoder_layers: int = 2
    decoder_heads: int | None = None
    norm_eps: float = 1e-5
    drop_rate: float = 0.1
    cells: int = 1
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require(0 < self.num_classes < IGNORE, f"num_classes must lie between 1 and 254, not {self.num_classes}")
        require(0 <= self.decoder_layers <= 64, f"decoder_layers must lie in 0 to 64, not {self.decoder_layers}")
        require(
            self.decoder_heads is None or self.decoder_heads > 0,
            f"decoder_heads must be positive, not {self.decoder_heads}",
        )
        require(0 <= self.norm_eps < 1, f"norm_eps must lie in [0, 1), not {self.norm_eps}")
        require(0 <= self.drop_rate < 1, f"drop_rate must lie in [0, 1), not {self.drop_rate}")
        require(0 < self.cells <= 64, f"cells must lie between 1 and 64, not {self.cells}")
        weights = self.class_weights
        sane = weights is None or (len(weights) == self.num_classes and min(weights) >= 0 and max(weights) > 0)
        require(sane, "class_weights needs a number for each class, none negative and one above zero")


@dataclass(frozen=True)
class SemanticMask(Reply):
    """The answer for one image: `mask` [h, w] has the class index of every pixel of the upright original.

    `path` is the file that it was written to.
    """

    mask: UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"]
    labels: Sequence[str]
    path: str | None = None

    def rows(self) -> Sequence[Score]:
        """The classes that are there, with their share of the pixels, the largest first."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.labels)) / self.mask.size
        found = sorted(np.flatnonzero(counts).tolist(), key=lambda i: (-counts[i], i))
        return [Score(self.labels[i], i, float(counts[i])) for i in found]

    def save(self, write: Callable[[str, bytes], str]) -> "SemanticMask":
        """The mask becomes a grey PNG whose values are class indices."""
        buffer = BytesIO()
        Image.fromarray(self.mask).save(buffer, format="PNG")
        return replace(self, path=write(".png", buffer.getvalue()))

    def to_json(self) -> dict[str, Any]:
        classes = [{"label": s.label, "index": s.index, "fraction": s.score} for s in self.rows()]
        return {"mask": self.path, "classes": classes}


class SegmentHead(nn.Module):
    """Patches to a logit of each class for every pixel.

    Class maps on the grid of patches are enlarged bilinearly to the whole patches and cut off where the image ends.
    """

    Config = SegmentConfig
    task = "segment"
    before_classes: tuple[str, ...] = ()
    per_class = ("classifier.", "class_tokens", "mask_norm.")

    def __init__(self, config: SegmentConfig, width: int):
        super().__init__()
        self.config = config
        linear, parts = config.decoder == "linear", config.cells**2
        outputs = config.num_classes * parts
        self.classifier = Dense(width, outputs) if linear else None
        self.decoder = None
        if not linear:
            heads = config.decoder_heads or max(width // 64, 1)
            require(width % heads == 0, f"the decoder's width {width} is not a multiple of its {heads} heads")
            block: dict[str, Any] = {"width": width, "heads": heads, "hidden": 4 * width, "drop": config.drop_rate}
            self.projection = Dense(width, width)
            self.class_tokens = nn.Parameter(torch.randn(1, config.num_classes, width) * 0.02)
            self.decoder = (
                Encoder(config.decoder_layers, eps=config.norm_eps, **block) if config.decoder_layers else None
            )
            self.norm = nn.LayerNorm(width, eps=config.norm_eps)
            self.patch_projection = nn.Parameter(torch.randn(width, width) * width**-0.5)
            self.class_projection = nn.Parameter(torch.randn(width, width) * width**-0.5)
            self.mask_norm = nn.LayerNorm(config.num_classes, eps=config.norm_eps)
            self.split = Dense(width, parts * width) if parts > 1 else None
            nn.init.trunc_normal_(self.class_tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def renew(self) -> None:
        """Forgets the classes."""
        if self.classifier is not None:
            nn.init.trunc_normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)
        else:
            nn.init.trunc_normal_(self.class_tokens, std=0.02)
            nn.init.ones_(self.mask_norm.weight)
            nn.init.zeros_(self.mask_norm.bias)

    def features(self, tokens: Tokens) -> Float[Tensor, "b d"]:
        """The mean of the patches."""
        return tokens.mean()

    def maps(self, tokens: Tokens) -> Float[Tensor, "b k rows columns"]:
        """Logits of each class on the grid of cells, `cells` along each side of a patch."""
        side = self.config.cells
        cells = self._masks(tokens) if self.classifier is None else self.classifier(tokens.patches)
        form = "b (r c) (k y x) -> b k (r y) (c x)"
        return rearrange(cells, form, r=tokens.grid[0], y=side, x=side)

    def _masks(self, tokens: Tokens) -> Float[Tensor, "b n k"]:
        """The fit of every patch with every class token, after both went through the decoder (equation 3)."""
        x = self.projection(tokens.patches)
        count = self.config.num_classes
        x = torch.cat([x, self.class_tokens.expand(x.shape[0], -1, -1)], dim=1)
        if self.decoder is not None:
            x = self.decoder(x, self._hidden(tokens, x))
        x = self.norm(x)
        patches, classes = x[:, :-count], x[:, -count:]
        parts = 1 if self.split is None else self.config.cells**2
        if self.split is not None:
            patches = rearrange(self.split(patches), "b n (p d) -> b (n p) d", p=parts)
        patches, classes = patches @ self.patch_projection, classes @ self.class_projection
        fit = F.normalize(patches, dim=-1) @ rearrange(F.normalize(classes, dim=-1), "b k d -> b d k")
        return rearrange(self.mask_norm(fit), "b (n p) k -> b n (k p)", p=parts)

    def _hidden(self, tokens: Tokens, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b 1 1 n"] | None:
        if tokens.mask is None:
            return None
        real = F.pad(tokens.mask[:, tokens.prefix :], (0, self.config.num_classes), value=True)
        hidden = torch.zeros_like(real, dtype=x.dtype).masked_fill(~real, -torch.inf)
        return rearrange(hidden, "b n -> b 1 1 n")

    def forward(self, tokens: Tokens, area: Area | None = None) -> Float[Tensor, "b k height width"]:
        """Logits for every pixel of the images; on the grid of cells where nobody says how large these are.

        In a batch of unlike sizes each image is enlarged by itself, and zero where the batch is filled up.
        """
        maps = self.maps(tokens)
        if area is None:
            return maps
        if area.sizes is None or tokens.mask is None:
            return _enlarged(maps, tokens.grid, area.stride, area.size)
        canvas = maps.new_zeros(*maps.shape[:2], *area.size)
        real = rearrange(tokens.mask[:, tokens.prefix :], "b (r c) -> b r c", r=tokens.grid[0])
        side = self.config.cells
        for i, (height, width) in enumerate(area.sizes.tolist()):
            grid = int(real[i, :, 0].sum()), int(real[i, 0].sum())
            own = maps[i : i + 1, :, : grid[0] * side, : grid[1] * side]
            canvas[i, :, :height, :width] = _enlarged(own, grid, area.stride, (height, width))[0]
        return canvas

    def gaze(self, output: Float[Tensor, "1 k h w"], labels: Sequence[str]) -> Gaze | None:
        """What the classes that are there ask of the patches, in the last layer of the mask transformer."""
        if self.decoder is None:
            return None
        there = output[0].argmax(dim=0).unique().tolist()
        patches = -self.config.num_classes  # the classes' tokens come last
        rows = [patches + i for i in there]
        return Gaze(f"decoder.blocks.{self.config.decoder_layers - 1}.attention", rows, 0, [labels[i] for i in there])

    def loss(self, output: Float[Tensor, "b k h w"], target: UInt8[Tensor, "b h w"]) -> Step:
        """Cross-entropy over the pixels that have a class, and the share of them that is right."""
        target = target.long()
        weights = self.config.class_weights
        weight = None if weights is None else output.new_tensor(weights, dtype=torch.float32)
        real = target != IGNORE
        loss = F.cross_entropy(output.float(), target, weight, ignore_index=IGNORE, reduction="sum")
        total = real.sum() if weight is None else weight[target[real]].sum()
        right = (output.detach().argmax(dim=1) == target)[real]
        accuracy = right.float().sum() / real.sum().clamp(min=1)
        return Step(loss / total.clamp(min=1e-6), {"pixel_accuracy": accuracy})

    def read(
        self,
        output: Float[Tensor, "b k h w"],
        labels: Sequence[str],
        top: int = 5,
        places: Sequence[Placement] | None = None,
    ) -> list[SemanticMask]:
        """The class of every pixel of each original image, or of the input where nobody says how large that is."""
        if places is None:
            found = [maps.argmax(dim=0) for maps in output]
        else:
            found = [classes_at(maps, place) for maps, place in zip(output, places, strict=True)]
        return [SemanticMask(classes.to(torch.uint8).cpu().numpy(), labels) for classes in found]


def _enlarged(
    maps: Float[Tensor, "b k rows columns"], grid: tuple[int, int], stride: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "b k height width"]:
    """Maps enlarged to the whole patches of a grid, and cut off at `size`."""
    whole = grid[0] * stride[0], grid[1] * stride[1]
    large = F.interpolate(maps, size=whole, mode="bilinear", align_corners=False)
    return large[..., : size[0], : size[1]]


def classes_at(maps: Float[Tensor, "k h w"], place: Placement) -> Int[Tensor, "height width"]:
    """The most probable class at every pixel of an image that lies so in the input; its nearest edge where it is not.

    Logits are read bilinearly at the pixels' centres, as many rows at a time as memory is spent on.
    """
    height, width = place.size
    at = []
    for length, scale, offset, side in zip(place.size, place.scale, place.offset, maps.shape[1:], strict=True):
        centres = (torch.arange(length, device=maps.device) + 0.5) * scale + offset
        at.append(2 * centres / side - 1)
    step = max(_AT_ONCE // (width * len(maps)), 1)
    parts = []
    for top in range(0, height, step):
        rows, columns = torch.meshgrid(at[0][top : top + step], at[1], indexing="ij")
        grid = torch.stack([columns, rows], dim=-1)[None].to(maps.dtype)
        logits = F.grid_sample(maps[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
        parts.append(logits[0].argmax(dim=0))
    return torch.cat(parts)


HEADS = {"segment": SegmentHead}
