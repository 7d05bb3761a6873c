"""Whether images keep their meaning when they are mirrored or turned over, measured on the images themselves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sightline.datasets.image_set import ImageSet
from sightline.images.decode import ImageError, decode
from sightline.images.preprocess import Preprocess

LOOKED_AT = 600
"""Training images that are looked at, evenly over the set."""

SIDE, PATCH, FILTERS, CELLS = 32, 6, 128, 3
"""The probe: images of SIDE² pixels, filters of PATCH² pixels, responses averaged over CELLS² parts of the image."""

FOLDS = 4
RIDGE = 0.03

SURE = 2.0
"""Standard deviations at which a class counts as hurt."""

EASY = 0.9
"""Share of right answers above which a reflection that changes nothing is taken for harmless."""


@dataclass(frozen=True)
class Mirroring:
    """Which reflections help, and the sentence that says why."""

    horizontal: bool
    vertical: bool
    why: str


UNKNOWN = Mirroring(False, False, "what mirroring does to the images was not measured, so none is mirrored")


def mirroring(images: ImageSet, seed: int) -> Mirroring:
    """Asks whether reflected copies help a small classifier to read images that it has not seen.

    A ridge regression on the responses of whitened random patches (Coates et al. 2011) is taught on three quarters of
    at most `LOOKED_AT` training images and reads the last quarter; four times around, with and without reflected copies
    of what it is taught. A reflection is used where it wins more images than it loses by more than chance, or loses
    none of a set that is easily read, and where no class is hurt: a mirrored b is a d, and a classifier that is taught
    so confuses them. Where nothing can be told, nothing is reflected.
    """
    pixels, targets = _sample(images)
    if len(targets) < 2 * FOLDS:
        return Mirroring(False, False, "there are too few images to measure what mirroring does, so none is mirrored")
    random = torch.Generator().manual_seed(seed)
    filters = _filters(pixels, random)
    plain, *reflected = (_responses(view, filters) for view in (pixels, pixels.flip(-1), pixels.flip(-2)))
    fold = torch.randperm(len(pixels), generator=random) % FOLDS
    without = _right(plain, plain[:0], targets, fold)
    having = [_right(plain, copies, targets, fold) for copies in reflected]
    return _verdict(without, having, targets)


def _sample(images: ImageSet) -> tuple[Float[Tensor, "n 3 h w"], Int64[np.ndarray, " n"]]:
    fit = Preprocess((SIDE, SIDE), resize="squash")
    pixels, targets = [], []
    for row in np.unique(np.linspace(0, len(images) - 1, num=min(LOOKED_AT, len(images))).astype(int)).tolist():
        sample = images.samples[row]
        try:
            pixels.append(fit(decode(sample.image)))
        except ImageError:
            continue  # the loader will name it
        targets.append(sample.target)
    stacked = torch.stack(pixels) if pixels else torch.zeros(0, 3, SIDE, SIDE)
    return stacked, np.array(targets, dtype=np.int64)


def _filters(pixels: Float[Tensor, "n 3 h w"], random: torch.Generator) -> Float[Tensor, "filters c p q"]:
    """Random patches of the images, whitened: edges and colours as these images have them."""
    patches = F.unfold(pixels, PATCH, stride=PATCH // 2)
    patches = rearrange(patches, "n d places -> (n places) d")
    patches = patches[torch.randperm(len(patches), generator=random)[:20_000]]
    patches = patches - patches.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    whiten = vectors @ torch.diag((values + 0.1 * values.mean() + 1e-8).rsqrt()) @ vectors.T
    drawn = patches[patches.std(dim=1).argsort(descending=True)[: len(patches) // 2]]
    drawn = drawn[torch.randperm(len(drawn), generator=random)[:FILTERS]] @ whiten
    drawn = F.normalize(drawn) @ whiten
    drawn = drawn - drawn.mean(dim=1, keepdim=True)
    return rearrange(drawn, "f (c p q) -> f c p q", c=3, p=PATCH)


def _responses(pixels: Float[Tensor, "n 3 h w"], filters: Float[Tensor, "filters c p q"]) -> Float[Tensor, "n d"]:
    parts = []
    for some in pixels.split(8):  # so few that their responses stay in the cache: six times as fast as 128
        seen = F.conv2d(some, filters)
        seen = torch.cat([F.relu(seen - 0.5), F.relu(-seen - 0.5)], dim=1)
        parts.append(F.adaptive_avg_pool2d(seen, CELLS).flatten(1))
    return torch.cat(parts)


def _right(
    plain: Float[Tensor, "n d"],
    copies: Float[Tensor, "m d"],
    targets: Int64[np.ndarray, " n"],
    fold: Int64[Tensor, " n"],
) -> Bool[np.ndarray, " n"]:
    """Which images are read rightly by a regression on the other folds, and on `copies` of those, if there are any."""
    mean, spread = plain.mean(dim=0), plain.std(dim=0) + 1e-3
    known = torch.cat([(plain - mean) / spread, (copies - mean) / spread]) / plain.shape[1] ** 0.5
    kernel = (known @ known[: len(plain)].T).double()
    if len(copies):
        kernel = torch.cat([kernel, (known @ known[len(plain) :].T).double()], dim=1)
    places, labels = (torch.cat([x, x[: len(copies)]]) for x in (fold, torch.as_tensor(targets)))
    wanted = F.one_hot(labels).double()
    answers = torch.zeros(len(plain), dtype=torch.long)
    for part in range(FOLDS):
        taught, asked = (places != part).nonzero()[:, 0], (fold == part).nonzero()[:, 0]
        level = wanted[taught].mean(dim=0)
        inner = kernel[taught][:, taught]
        inner.diagonal().add_(RIDGE)
        weights = torch.linalg.solve(inner, wanted[taught] - level)
        answers[asked] = (kernel[asked][:, taught] @ weights + level).argmax(dim=1)
    return answers.numpy() == targets


def _verdict(
    without: Bool[np.ndarray, " n"], having: Sequence[Bool[np.ndarray, " n"]], targets: Int64[np.ndarray, " n"]
) -> Mirroring:
    used = [_helps(without, copies, targets) for copies in having]
    shares = [f"{right.mean():.0%}" for right in (without, *having)]
    verdict = " and ".join(name for name, good in zip(("mirrored", "turned over"), used, strict=True) if good)
    return Mirroring(
        *used,
        f"a quick classifier reads {shares[0]} of the images that it has not seen, {shares[1]} with mirrored copies of "
        f"those it has seen and {shares[2]} with copies turned over: images are {verdict or 'neither'}",
    )


def _helps(without: Bool[np.ndarray, " n"], having: Bool[np.ndarray, " n"], targets: Int64[np.ndarray, " n"]) -> bool:
    def gain(chosen: Bool[np.ndarray, " n"]) -> float:
        won, lost = int((having & ~without & chosen).sum()), int((without & ~having & chosen).sum())
        return (won - lost) / max(won + lost, 1) ** 0.5

    hurt = any(gain(targets == target) <= -SURE for target in np.unique(targets))
    everywhere = gain(np.ones_like(without))
    return bool(not hurt and (everywhere >= 1 or (everywhere >= 0 and without.mean() > EASY)))
