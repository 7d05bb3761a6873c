"""What an exported program answers: for each task the arrays it gives, and the same arrays as `predict` has them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sightline.errors import UserError, printable
from sightline.images.program import Side
from sightline.registry import table
from sightline.types import Placement

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Outputs:
    """The answer of one task as arrays without a batch axis; one entry of an `OUTPUTS` table.

    `names` are what a program for pictures gives, `plain` what one for prepared pixels gives, a batch at a time: the
    network's own output. `compute` turns the network's output for one picture into the arrays inside the program, given
    the two sides of the picture; `expected` does so by what `predict` itself uses.
    `chosen` is what the arrays decide (a class, one for each query, for each pixel), and `margins` by how much they
    decide it where a mask [of chosen's shape] asks: the distance of the two largest logits. `per_pixel` names the
    arrays that are measured in pixels of the picture.
    """

    names: tuple[str, ...]
    plain: tuple[str, ...]
    compute: Callable[[Any, tuple[Side, Side]], tuple[Tensor, ...]]
    expected: Callable[[Any, Placement], tuple[Tensor, ...]]
    chosen: Callable[[Arrays], np.ndarray]
    margins: Callable[[Arrays, Placement, np.ndarray], np.ndarray]
    per_pixel: tuple[str, ...] = ()


def outputs_of(task: str) -> Outputs:
    """The row of a task. Raises UserError where its answers cannot be exported."""
    rows = table("inference", "OUTPUTS")
    if task not in rows:
        raise UserError(f"models for '{printable(task)}' cannot be exported; those for {', '.join(sorted(rows))} can")
    return rows[task]


def best(arrays: Arrays) -> np.ndarray:
    """The class of the largest logit, along the last axis."""
    return np.asarray(arrays["logits"].argmax(axis=-1))


def distances(arrays: Arrays, place: Placement, asked: np.ndarray) -> np.ndarray:
    """How far the largest logit is above the second, where that is asked; infinite where there is one class."""
    rows = arrays["logits"][asked] if asked.ndim else arrays["logits"][None]
    if rows.shape[-1] < 2:
        return np.full(rows.shape[:-1], np.inf)
    two = torch.from_numpy(rows).topk(2, dim=-1).values.numpy()
    return two[..., 0] - two[..., 1]
