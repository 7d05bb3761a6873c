"""Which patches of an image are hidden: a pure function of the image's key, whatever batch it is in."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ASPECT = (0.3, 1 / 0.3)
"""Range of the aspect ratios of blocks."""

LEAST = 16 / 196
"""Share of an image's patches that a block has at least: 16 of 196."""

TRIES = 10
"""Places that are tried for a block before the rest is left out."""


def noise(keys: Int[Tensor, " b"], cells: int, salt: int = 0) -> Float[Tensor, "b cells"]:
    """Even noise in [0, 1) for the patches of each image; another `salt` gives other noise for the same key.

    The patches of the smallest noises are a random choice without repetition (arXiv 2111.06377, section 3).
    """
    drawn = [np.random.default_rng([salt, key]).random(cells, dtype=np.float32) for key in keys.tolist()]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, cells)


def blockwise(
    keys: Int[Tensor, " b"], grid: tuple[int, int], counts: int | Sequence[int], salt: int = 0
) -> Bool[Tensor, "b cells"]:
    """Masks of rectangular blocks, row by row, True at hidden patches: `counts` in each image, or a little fewer.

    Blocks are laid until so many patches are hidden: of an area between `LEAST` of the image and what is left to hide,
    of an aspect ratio between 0.3 and 1/0.3, even on a logarithmic scale, at an even place; the last block may find no
    place in ten tries (arXiv 2106.08254, algorithm 1).
    """
    each = [counts] * len(keys) if isinstance(counts, int) else counts
    masks = [
        _blocks(np.random.default_rng([salt, key]), grid, count) for key, count in zip(keys.tolist(), each, strict=True)
    ]
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, grid[0] * grid[1], dtype=torch.bool)


def _blocks(random: np.random.Generator, grid: tuple[int, int], count: int) -> np.ndarray:
    hidden, (rows, columns) = np.zeros(grid, dtype=bool), grid
    least = max(LEAST * rows * columns, 1.0)
    while (left := count - int(hidden.sum())) > 0:
        for _ in range(TRIES):
            area = least + (left - least) * random.random()
            aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height <= rows and 0 < width <= columns):
                continue
            top, start = random.integers(rows - height + 1), random.integers(columns - width + 1)
            block = hidden[top : top + height, start : start + width]
            if 0 < int((~block).sum()) <= left:
                block[:] = True
                break
        else:
            break
    return hidden.ravel()
