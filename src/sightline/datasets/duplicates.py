"""Images that are the same, and images that are nearly the same: sought by small pictures, confirmed by larger ones.

A near duplicate is the same picture saved again: with another compression, at another size, a little brighter or of
other contrast. Another moment of the same scene, a crop or a mirrored copy is none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Bool, Float16, Float32, Int64, UInt8
from PIL import Image

from sightline.datasets.examine import unexplained

DETAIL = 1.5
"""Least standard deviation of a `luma`, in levels of 0 to 255, that has something to be recognised by."""

ALIKE = 0.975
"""Least correlation of the small pictures of two near duplicates."""

ASPECT = 0.06
"""Largest difference of the logarithms of their aspect ratios."""

BLOCK = 1024
MOST = 300_000
"""Most candidates that are kept: each costs a third of a millisecond to confirm."""

# What saving a picture again may do to it: contrast and brightness as a whole; light in each block, in levels or as a
# share of the block's own detail; light over all, as a share of its detail; colour, in levels. Chosen on photographs,
# noise, drawings, digits, gradients and text that were saved anew in thirty ways, and on unlike images of these kinds.
_GAIN, _SHIFT = (0.75, 1.35), 40
_FLOOR, _LEAST, _SHARE, _WHOLE, _CHROMA = 8.0, 0.2, 0.35, 0.25, 12.0


def same(digests: UInt8[np.ndarray, "n 16"], known: Bool[np.ndarray, " n"]) -> list[list[int]]:
    """The groups of rows whose pixels are equal, in order of their first; `known` says which rows have a digest."""
    rows = np.flatnonzero(known)
    if not len(rows):
        return []
    keys = np.ascontiguousarray(digests[rows]).view("V16")[:, 0]
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    groups: dict[int, list[int]] = {}
    for i in np.flatnonzero(counts[group] > 1).tolist():
        groups.setdefault(int(group[i]), []).append(int(rows[i]))
    return sorted(groups.values())


def candidates(
    lumas: Float16[np.ndarray, "n cells cells"],
    aspects: Float32[np.ndarray, " n"],
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Int64[np.ndarray, "m 2"], Float32[np.ndarray, " m"], bool]:
    """Pairs (i < j) of pictures that correlate by at least ALIKE and have about the same aspect ratio, the best first.

    `lumas` are those of `examine`. With the pairs come their correlations, and whether these are all pairs: at most
    MOST are kept, the best of them.
    """
    coarse, full = _unit(reduce(lumas.astype(np.float32), "n (h a) (w b) -> n (h w)", "mean", a=2, b=2)), _flat(lumas)
    slant = np.log(aspects)
    pairs, scores = [np.empty((0, 2), dtype=np.int64)], [np.empty(0, dtype=np.float32)]
    kept, least = 0, ALIKE
    for start in range(0, len(lumas), BLOCK):
        mine = slice(start, min(start + BLOCK, len(lumas)))
        for other in range(start, len(lumas), 8 * BLOCK):
            # A mean of four cells correlates a little less or more than the cells do: the coarse bar is lower.
            i, j = np.nonzero(coarse[mine] @ coarse[other : other + 8 * BLOCK].T > least - 0.02)
            i, j = i + start, j + other
            close = (i < j) & (np.abs(slant[i] - slant[j]) < ASPECT)
            i, j = i[close], j[close]
            for part in range(0, len(i), 100_000):
                a, b = i[part : part + 100_000], j[part : part + 100_000]
                score = (_unit(full[a].astype(np.float32)) * _unit(full[b].astype(np.float32))).sum(axis=1)
                good = score >= least
                pairs.append(np.stack([a[good], b[good]], axis=1))
                scores.append(score[good])
                kept += int(good.sum())
            if kept > MOST:  # only the best half goes on, and only better ones are added
                pairs, scores = _best(pairs, scores, MOST // 2)
                kept, least = len(pairs[0]), float(scores[0].min())
        progress(mine.stop)
    (pair,), (score,) = _best(pairs, scores, MOST)
    return pair, score, least == ALIKE


def _flat(lumas: Float16[np.ndarray, "n cells cells"]) -> Float16[np.ndarray, "n d"]:
    return rearrange(lumas, "n h w -> n (h w)")


def _unit(vectors: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    vectors = vectors - vectors.mean(axis=1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def _best(
    pairs: Sequence[np.ndarray], scores: Sequence[np.ndarray], most: int
) -> tuple[list[Int64[np.ndarray, "m 2"]], list[Float32[np.ndarray, " m"]]]:
    pair, score = np.concatenate(pairs), np.concatenate(scores)
    order = np.argsort(-score, kind="stable")[:most]
    return [pair[order]], [score[order]]


def confirmed(
    pairs: Iterable[Sequence[int]], pictures: Mapping[int, UInt8[np.ndarray, "h w 3"]], count: int
) -> list[list[int]]:
    """The groups of rows that pairs of near duplicates join; a pair within a group is not looked at again."""
    home = list(range(count))

    def root(row: int) -> int:
        while home[row] != row:
            home[row] = home[home[row]]
            row = home[row]
        return row

    for i, j in pairs:
        a, b = root(i), root(j)
        if a != b and i in pictures and j in pictures and nearly(pictures[i], pictures[j]):
            home[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for row in range(count):
        groups.setdefault(root(row), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def nearly(one: UInt8[np.ndarray, "h w 3"], other: UInt8[np.ndarray, "h2 w2 3"]) -> bool:
    """Whether two pictures are the same one: nowhere do they differ by more than compression and resizing explain.

    Brightness and contrast may differ a little. Light is compared in blocks, by what detail there is in each; colour
    more coarsely.
    """
    height, width = (min(x, y) for x, y in zip(one.shape[:2], other.shape[:2], strict=True))
    height, width = (max(side * 5 // 8, min(side, 8)) for side in (height, width))  # the finest details are the codec's
    a, b = (_resized(picture, height, width) for picture in (one, other))
    return _becomes(a, b) or _becomes(b, a)


def _resized(picture: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> Float32[np.ndarray, "rows columns 3"]:
    if picture.shape[:2] != (height, width):
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
    return picture.astype(np.float32)


def _light(picture: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
    return picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _becomes(one: Float32[np.ndarray, "h w 3"], other: Float32[np.ndarray, "h w 3"]) -> bool:
    """Whether one, made brighter and of other contrast, is the other."""
    free = (one > 4) & (one < 251) & (other > 4) & (other < 251)  # what is cut off at black or white says little
    if free.mean() < 0.05:
        free[:] = True
    x, y = one[free] - one[free].mean(), other[free] - other[free].mean()
    gain = float(np.clip((x * y).sum() / max(float((x * x).sum()), 1e-6), *_GAIN))
    offset = float(other[free].mean() - gain * one[free].mean())
    if abs(offset) > _SHIFT:
        return False
    expected = np.clip(gain * one + offset, 0, 255)
    light, wrong = _light(other), _light(other) - _light(expected)
    detail = float(unexplained(light).std())
    limit = np.maximum(_FLOOR * np.clip(detail / 20, _LEAST, 1), _SHARE * _blocks(light).std(axis=1))
    worst = float((np.sqrt((_blocks(wrong) ** 2).mean(axis=1)) / limit).max())
    whole = float(np.sqrt((wrong**2).mean())) / max(1.0, _WHOLE * detail)
    tint = float(np.abs(_tint(expected) - _tint(other)).max()) / _CHROMA
    STATS.append((worst, whole, float(tint)))
    return worst <= 1 and whole <= 1 and tint <= 1


STATS = []


def _blocks(values: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "blocks pixels"]:
    """Eight rows and columns of equal blocks, or single pixels where there are no more; what is over is left out."""
    height, width = max(values.shape[0] // 8, 1), max(values.shape[1] // 8, 1)
    rows, columns = values.shape[0] // height, values.shape[1] // width
    cut = values[: rows * height, : columns * width]
    return rearrange(cut, "(r h) (c w) -> (r c) (h w)", h=height, w=width)


def _tint(picture: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "rows columns 3"]:
    """Colour less brightness, in at most eight rows and columns."""
    size = min(8, *picture.shape[:2])
    height, width = picture.shape[0] // size, picture.shape[1] // size
    tint = (picture - _light(picture)[..., None])[: size * height, : size * width]
    return reduce(tint, "(r h) (c w) k -> r c k", "mean", h=height, w=width)
