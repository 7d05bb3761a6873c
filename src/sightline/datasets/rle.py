"""COCO's masks: run lengths, plain or packed into text, and polygons."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sightline.errors import printable

LARGEST = 2**28
"""Pixels that a mask may have."""


def decode(mask: Mapping[str, Any]) -> UInt8[np.ndarray, "h w"]:
    """The mask, 0 and 1, of `counts` (run lengths, column by column, or a text) and `size` (height, width).

    Raises ValueError for what is none.
    """
    size, counts = mask.get("size"), mask.get("counts")
    sane = isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    if not sane or size is None or size[0] * size[1] > LARGEST:
        raise ValueError(f"a mask of size {printable(size, 40)}")
    runs = unpacked(counts) if isinstance(counts, str | bytes) else counts
    if not isinstance(runs, list) or not all(isinstance(n, int) and n >= 0 for n in runs):
        raise ValueError("run lengths that are no numbers")
    if sum(runs) != size[0] * size[1]:
        raise ValueError(f"run lengths of {sum(runs)} pixels for a mask of {size[0]}×{size[1]}")
    values = np.arange(len(runs), dtype=np.uint8) % 2
    return np.repeat(values, runs).reshape(size[1], size[0]).T


def unpacked(text: str | bytes) -> list[int]:
    """The run lengths in a text: five bits a character from the 48th on, low ones first, the sixth for more.

    From the fourth run on the difference to the one before the last is stored. Raises ValueError for what is none.
    """
    data = text.encode("latin-1", "replace") if isinstance(text, str) else text
    runs: list[int] = []
    at = 0
    while at < len(data):
        value, shift, more = 0, 0, True
        while more:
            if at == len(data) or not 48 <= data[at] < 112 or shift > 60:
                raise ValueError("packed run lengths that end or hold what they cannot")
            bits = data[at] - 48
            value |= (bits & 31) << shift
            more, shift, at = bool(bits & 32), shift + 5, at + 1
            if not more and bits & 16:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    if any(run < 0 for run in runs):
        raise ValueError("packed run lengths below zero")
    return runs


def box_of(segmentation: Any) -> Sequence[float]:
    """Left, top, width and height of what a `segmentation` covers, run lengths or polygons. Raises ValueError."""
    if isinstance(segmentation, Mapping):
        mask = decode(segmentation)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            return 0.0, 0.0, 0.0, 0.0
        return float(columns[0]), float(rows[0]), float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1)
    try:
        points = np.concatenate([np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation])
    except (TypeError, ValueError) as fault:
        raise ValueError("a segmentation that is neither run lengths nor polygons") from fault
    if not len(points) or not np.isfinite(points).all():
        raise ValueError("a polygon without points, or with some that are no numbers")
    low, high = points.min(axis=0), points.max(axis=0)
    return float(low[0]), float(low[1]), float(high[0] - low[0]), float(high[1] - low[1])
