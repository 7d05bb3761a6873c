"""What the last tokens hold: their first principal components as colours, and those that stand out by their norm."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from threading import get_ident
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sightline.types import Tokens

OUTLIER = 3.0
"""How many times the median norm a token has whose norm is said to stand out, at least."""

SPREAD = 6.0
"""And how many robust deviations (1.4826 times the median absolute deviation) it lies above the median, at least."""


class Colours(NamedTuple):
    """Patches as colours: `pictures` has red, green and blue from 0 to 1, `variance` the share of each component."""

    pictures: list[Float[np.ndarray, "rows columns 3"]]
    variance: Float[np.ndarray, " 3"]


def principal_colours(features: Sequence[Float[np.ndarray, "_ _ d"]]) -> Colours:
    """The first three principal components of the patches of one or several images, as red, green and blue.

    All images share the components and their scale, so that one colour means one thing in all of them (arXiv
    2304.07193, figure 1, there after the background is cut off by the first component). Each component's range over all
    patches becomes 0 to 1; its sign is such that the entry of largest magnitude is positive. Where there are fewer
    components than three, the others are 0.5.
    """
    together = torch.from_numpy(np.concatenate([rearrange(f, "r c d -> (r c) d") for f in features])).double()
    together = together - together.mean(dim=0)
    few = len(together) < together.shape[1]
    values, vectors = torch.linalg.eigh(together @ together.T if few else together.T @ together)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    count = min(3, int((values > values[0] * 1e-12).sum())) if len(together) > 1 and values[0] > 0 else 0
    directions = vectors[:, :count]
    if few:
        directions = together.T @ directions / values[:count].sqrt()
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    scores = together @ (directions * largest.sign())
    low, high = (scores.amin(dim=0), scores.amax(dim=0)) if count else (scores.new_zeros(0), scores.new_ones(0))
    shown = torch.full((len(together), 3), 0.5)
    shown[:, :count] = ((scores - low) / (high - low)).float()
    variance = np.zeros(3, dtype=np.float32)
    variance[:count] = (values[:count] / values.sum()).float().numpy()
    parts = shown.split([f.shape[0] * f.shape[1] for f in features])
    pictures = [
        rearrange(part, "(r c) band -> r c band", r=f.shape[0]).numpy() for part, f in zip(parts, features, strict=True)
    ]
    return Colours(pictures, variance)


def patch_features(tokens: Tokens) -> Float[np.ndarray, "rows columns d"]:
    """The patches of one image on their grid, in float32."""
    return rearrange(tokens.patches[0].float(), "(r c) d -> r c d", r=tokens.grid[0]).cpu().numpy()


def standing_out(norms: Float[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
    """The tokens whose norm is an outlier among `norms` of patches: large networks keep notes in them.

    In arXiv 2309.16588 (section 2.1) the limit is read off a histogram for each network; here it follows from the
    image: `OUTLIER` times the median and `SPREAD` robust deviations above it, whichever is more.
    """
    middle = np.median(norms)
    deviation = 1.4826 * np.median(np.abs(norms - middle))
    return norms > max(OUTLIER * middle, middle + SPREAD * deviation)


class Norms(NamedTuple):
    """Norms of the last tokens before the final norm, which would make them all alike."""

    prefix: Float[np.ndarray, " prefix"]
    patches: Float[np.ndarray, "rows columns"]


def token_norms(entered: Sequence[Tensor], tokens: Tokens) -> Norms:
    """The Euclidean norms of the last tokens as they `entered` the final norm, or as they are where they did not."""
    x = entered[-1] if entered and entered[-1].shape == tokens.x.shape else tokens.x
    norms = x[0].float().norm(dim=-1).cpu().numpy()
    patches = rearrange(norms[tokens.prefix :], "(r c) -> r c", r=tokens.grid[0])
    return Norms(norms[: tokens.prefix], patches)


@contextmanager
def before_norm(backbone: nn.Module) -> Generator[list[Tensor]]:
    """While it is open, what enters the backbone's final `norm`, where it has one, is put into the list."""
    entered: list[Tensor] = []
    mine = get_ident()

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if get_ident() == mine:
            entered[:] = [args[0]]

    norm = getattr(backbone, "norm", None)
    with norm.register_forward_pre_hook(note) if isinstance(norm, nn.Module) else nullcontext():
        yield entered
