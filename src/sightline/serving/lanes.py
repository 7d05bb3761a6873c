"""Whether requests are better computed one after the other on all cores, or side by side, each on its share of them."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sightline.inference.predictor import Predictor, Ready
from sightline.types import each

MOST = 4
"""Lanes at most: a request in a lane takes about as many times as long as it would on all cores."""

ENOUGH = 1.05
"""Lanes are taken where an image takes less than so many times what it takes without: under load, when readers and the
event loop want the cores too, an image on all cores is held up more than was seen when nothing else was there."""

_ROUNDS, _PATIENCE = 3, 0.5  # images to each measurement, and the seconds that it should take


class Lanes(NamedTuple):
    """How requests of one image are computed where several wait: so many at a time, each on `share` threads.

    One that comes alone has all `threads`. `seconds` are those between the answers of a busy server.
    """

    count: int
    share: int
    threads: int
    seconds: float


def measured(predictor: Predictor, *, apart: bool) -> Lanes:
    """The better of both ways, by a few answers; lanes only where every number is the same to the last bit.

    An image alone is cut into small pieces of work, and all cores wait for the slowest after each of them; in lanes
    nobody waits. How a sum is cut among threads may change its last digits, and `predict` has all threads: a network of
    which that is true gets no lanes. Which is the case depends on shapes, not on pixels, so that noise can tell.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (*predictor.preprocess.size, 3), dtype=np.uint8)
    noise = predictor.prepare(pixels)
    assert isinstance(noise, Ready), "an array is an image"
    threads = torch.get_num_threads()
    compute: Callable[[], Any] = lambda: predictor.compute([noise], features=False)  # noqa: E731
    list(predictor.answers([noise]))
    seconds, alone = _timed(compute, 1)
    rounds = max(min(_ROUNDS, int(_PATIENCE / max(seconds, 1e-9))), 1)
    seconds, alone = _timed(compute, rounds)
    one = Lanes(1, threads, threads, seconds)
    count = min(threads, MOST)
    if not apart or count == 1:
        return one
    share = threads // count

    def lane(_: int) -> Any:
        torch.set_num_threads(share)
        return _timed(compute, rounds)[1]

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lane, range(count)))  # the first answer of a thread makes what it needs
        began = time.perf_counter()
        found = list(pool.map(lane, range(count)))
        beside = (time.perf_counter() - began) / (rounds * count)
    torch.set_num_threads(threads)
    same = all(_bits(output) == _bits(alone) for output in found)
    return Lanes(count, share, threads, beside) if same and beside < ENOUGH * seconds else one


def _timed(compute: Callable[[], Any], times: int) -> tuple[float, Any]:
    began = time.perf_counter()
    output = None
    for _ in range(times):
        output = compute()
    return (time.perf_counter() - began) / times, output


def _bits(output: Any) -> list[bytes]:
    """Every number of an output."""
    found: list[bytes] = []

    def kept(values: Tensor) -> Tensor:
        found.append(values.numpy().tobytes())
        return values

    each(output, kept)
    return found
