"""Which samples a step of training sees: a pure function of seed and step, so that a run can be entered anywhere."""

from functools import lru_cache

import numpy as np
from jaxtyping import Int64


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in `count` samples: what is over is left out until the next epoch; a small set is one batch."""
    return max(count // batch_size, 1)


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " count"]:
    """The permutation of `range(count)` that an epoch follows; read-only.

    Samples are ranked by raw words of the counter-based generator Philox: unlike NumPy's shuffles, these are promised
    to be the same on every machine and in every version.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def rows(step: int, count: int, batch_size: int, seed: int, repeats: int = 1) -> tuple[int, Int64[np.ndarray, " b"]]:
    """The epoch that a step belongs to and the views in its batch, over all processes.

    View v shows sample v % count, for the (v // count)-th time in this epoch. With `repeats` (arXiv 1901.09335) each
    sample is in its batch that many times, an epoch has as many steps as without, and so sees fewer samples. The copies
    stand apart, so that neighbours, which mixup and CutMix pair, are different images.
    """
    epoch, turn = divmod(step, steps_per_epoch(count, batch_size))
    length = min(batch_size, count)
    distinct = -(-length // repeats)
    order = epoch_order(count, seed, epoch)[turn * distinct : (turn + 1) * distinct]
    return epoch, np.concatenate([order + view * count for view in range(repeats)])[:length]


def share(length: int, rank: int, world: int) -> slice:
    """The part of a batch that one of `world` processes takes: contiguous, together complete, never empty.

    Parts begin at even places where that leaves something for everyone, so that the pairs of mixup and CutMix stay
    together; they are equal where `length` is a multiple of 2 × world.
    """
    assert length >= world, f"{length} samples for {world} processes"
    unit = 2 if length >= 2 * world else 1
    units = -(-length // unit)
    return slice(unit * (units * rank // world), min(unit * (units * (rank + 1) // world), length))
