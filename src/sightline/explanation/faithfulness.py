"""Whether a map is right: what the answer loses when the patches it names are taken away, and gains when they return.

Deletion and insertion are those of arXiv 1806.07421 (section 4.2), with patches in place of pixels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sightline.explanation.maps import evaluating
from sightline.explanation.relevance import chosen_class
from sightline.explanation.render import View, spread

STEPS = 20
"""In how many parts the patches are taken away and put back, at most."""

DRAWS = 5
"""How many random orders the average of `judge` is taken over."""

BATCH = 16
BLUR = 8
"""How many pixels are averaged into one along each axis to make the picture that insertion begins with."""


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How the probability of a class falls and rises along the order that a map gives to the patches.

    `deletion` and `insertion` have the probability, 0 to 1, when 0, 1, … all parts of the patches were taken away, or
    put back, the most important first; `shares` are the parts of all patches, 0 to 1. A good map has a small
    `deletion_area` and a large `insertion_area`, both 0 to 1; `score` is the second less the first, -1 to 1.
    """

    shares: Float[np.ndarray, " steps"]
    deletion: Float[np.ndarray, " steps"]
    insertion: Float[np.ndarray, " steps"]

    @property
    def deletion_area(self) -> float:
        """The area under the curve of deletion; the smaller the better."""
        return float(np.trapezoid(self.deletion, self.shares))

    @property
    def insertion_area(self) -> float:
        """The area under the curve of insertion; the larger the better."""
        return float(np.trapezoid(self.insertion, self.shares))

    @property
    def score(self) -> float:
        """What insertion has more than deletion; 0 is what an order without knowledge gets where both curves agree."""
        return self.insertion_area - self.deletion_area


def faithfulness(
    network: nn.Module,
    pixels: Float[Tensor, "3 h w"],
    cells: Float[np.ndarray, "rows columns"],
    view: View,
    *,
    target: int | None = None,
    steps: int = STEPS,
    seed: int = 0,
) -> Faithfulness:
    """The curves of one map over one image.

    `view` says where the map's grid lies on the image (`Explanation.view` of the size of `pixels`); each pixel goes
    with the cell whose centre is nearest, pixels that no cell sees stay. What is taken away becomes the image's mean
    colour; insertion begins with the image blurred (averaged over `BLUR` pixels). Equal values come in an order drawn
    by `seed`. The class is `target`, or the most probable of the whole image. Raises UserError where there is no such
    class.
    """
    first = next(network.parameters())
    pixels = pixels.to(first.device, first.dtype)
    height, width = pixels.shape[-2:]
    # Cells are numbered from 1, in the order in which they go; 0 is for pixels that no cell sees.
    random = np.random.default_rng(seed).permutation(cells.size)
    order = np.lexsort((random, -cells.ravel().astype(np.float64)))
    turn = np.empty(cells.size, dtype=np.float32)
    turn[order] = np.arange(1, cells.size + 1)
    turns, seen = spread(turn.reshape(cells.shape), height, width, view, blocks=True)
    turns = torch.from_numpy(np.where(seen, np.rint(turns), 0).astype(np.int64)).to(pixels.device)
    gone = np.unique(np.rint(np.linspace(0, cells.size, min(steps, cells.size) + 1)).astype(np.int64))
    grey = pixels.mean(dim=(-2, -1), keepdim=True).expand_as(pixels)
    with evaluating(network):
        index = chosen_class(_logits(network, pixels[None])[0], target)
        deletion = _probabilities(network, pixels, grey, turns, gone, index)
        insertion = _probabilities(network, _blurred(pixels), pixels, turns, gone, index)
    return Faithfulness((gone / cells.size).astype(np.float32), deletion, insertion)


def judge(
    network: nn.Module,
    pixels: Float[Tensor, "3 h w"],
    maps: Mapping[str, tuple[Float[np.ndarray, "_ _"], View]],
    *,
    target: int | None = None,
    steps: int = STEPS,
    seed: int = 0,
) -> dict[str, Faithfulness]:
    """The curves of several maps over one image, and under the name "random" the mean of `DRAWS` random orders.

    Random orders are of the patches of the first map. The arguments are those of `faithfulness`.
    """
    settings: dict[str, Any] = {"target": target, "steps": steps}
    found = {name: faithfulness(network, pixels, *given, seed=seed, **settings) for name, given in maps.items()}
    cells, view = next(iter(maps.values()))
    blank = np.zeros_like(cells)
    drawn = [faithfulness(network, pixels, blank, view, seed=seed + 1 + draw, **settings) for draw in range(DRAWS)]
    curves = (np.mean([getattr(one, name) for one in drawn], axis=0) for name in ("deletion", "insertion"))
    return found | {"random": Faithfulness(drawn[0].shares, *curves)}


def _logits(network: nn.Module, batch: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
    return network(batch).float()


def _probabilities(
    network: nn.Module,
    before: Float[Tensor, "3 h w"],
    after: Float[Tensor, "3 h w"],
    turns: Int[Tensor, "h w"],
    gone: Int[np.ndarray, " steps"],
    index: int,
) -> Float[np.ndarray, " steps"]:
    """The probability of a class when the cells whose turn has come have changed from one picture to the other."""
    answers = [
        _logits(network, torch.where(rearrange(changed, "b h w -> b 1 h w"), after, before)).softmax(dim=1)[:, index]
        for changed in _changed(turns, gone)
    ]
    return torch.cat(answers).cpu().numpy()


def _changed(turns: Int[Tensor, "h w"], gone: Int[np.ndarray, " steps"]) -> Iterator[Bool[Tensor, "b h w"]]:
    for part in torch.from_numpy(gone).to(turns.device).split(BATCH):
        yield (turns > 0) & (turns <= part[:, None, None])


def _blurred(pixels: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 h w"]:
    height, width = pixels.shape[-2:]
    small = F.interpolate(pixels[None].float(), (-(-height // BLUR), -(-width // BLUR)), mode="area")
    wide = F.interpolate(small, (height, width), mode="bilinear", align_corners=False)
    return wide[0].to(pixels.dtype)
