"""Batches from an image set: each is a pure function of its step, so that workers and resuming cannot change it."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sightline.datasets.image_set import ImageSet
from sightline.datasets.order import rows, share
from sightline.errors import UserError, WorkError
from sightline.images.augment import sample_keys
from sightline.images.decode import ImageError, decode
from sightline.images.preprocess import collate
from sightline.types import Batch

PATIENCE = 300
"""Seconds to wait for one batch from worker processes before the run is given up."""

Picture = Path | UInt8[np.ndarray, "h w 3"]


class Refused(NamedTuple):
    """An image that could not be read: its name in the set, and why."""

    name: str
    reason: str


class Loaded(NamedTuple):
    """One step: its number, the batch (None where no image could be read), and the images left out of it."""

    step: int
    batch: Batch | None
    refused: list[Refused]


class Loader:
    """Batches of some steps, in order, read by this process (`workers=0`) or by others that outlive an iteration.

    Every image that cannot be decoded is left out of its batch and named; none takes its place. Raises WorkError where
    a worker process dies or gives no answer for `PATIENCE` seconds.
    """

    def __init__(self, load: Callable[[int], Loaded], steps: range, *, workers: int = 0, pin_memory: bool = False):
        self._steps = steps
        self._loader = DataLoader(
            _Batches(load),
            batch_size=None,  # an item is a whole batch
            sampler=steps,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            timeout=PATIENCE if workers else 0,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # its draws would otherwise come from the run's own random numbers
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Loaded]:
        try:
            yield from self._loader
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            remedy = "free some memory, or read images without worker processes (--workers 0)"
            raise WorkError(f"a process that reads images died or hangs ({error}); {remedy}") from error


class TrainLoader(Loader):
    """Shuffled, augmented batches of the training steps in `steps`.

    `transform` makes pixels [3, h, w] from an image and a number that seeds whatever is random about it. `batch_size`
    counts the samples of all `world` processes; this one, `rank`, gets its `share` of each batch. Order follows from
    (seed, epoch), a sample's number from (seed, epoch, view); see `order.rows`, also for `repeats`. Raises UserError
    for a batch that leaves nothing for some process.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Callable[[UInt8[np.ndarray, "h w 3"], int], Float[Tensor, "c rows columns"]],
        *,
        batch_size: int,
        seed: int,
        steps: range,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        length = min(batch_size, len(images))
        if length < world:
            raise UserError(f"{world} processes cannot share batches of {length} images")
        load = _Shuffled(images, transform, batch_size, seed, repeats, share(length, rank, world))
        super().__init__(load, steps, workers=workers, pin_memory=pin_memory)


class OrderedLoader(Loader):
    """Every image once, in order, unchanged but for `preprocess`; its step is the number of the batch.

    Each of `world` processes gets a contiguous share of the set, which may be empty.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocess: Callable[[Picture], Float[Tensor, "c rows columns"]],
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        part = range(len(images) * rank // world, len(images) * (rank + 1) // world)
        load = _Ordered(images, preprocess, batch_size, part)
        super().__init__(load, range(-(-len(part) // batch_size)), workers=workers, pin_memory=pin_memory)


@dataclass(frozen=True)
class _Shuffled:
    images: ImageSet
    transform: Callable[[UInt8[np.ndarray, "h w 3"], int], Float[Tensor, "c rows columns"]]
    batch_size: int
    seed: int
    repeats: int
    share: slice

    def __call__(self, step: int) -> Loaded:
        epoch, views = rows(step, len(self.images), self.batch_size, self.seed, self.repeats)
        views = views[self.share]
        keys = sample_keys(self.seed, epoch, views)
        return _load(step, self.images, views % len(self.images), keys, self._augmented)

    def _augmented(self, image: Picture, key: int) -> Float[Tensor, "c rows columns"]:
        return self.transform(decode(image) if isinstance(image, Path) else image, key)


@dataclass(frozen=True)
class _Ordered:
    images: ImageSet
    preprocess: Callable[[Picture], Float[Tensor, "c rows columns"]]
    batch_size: int
    part: range

    def __call__(self, step: int) -> Loaded:
        index = np.array(self.part[step * self.batch_size : (step + 1) * self.batch_size])
        return _load(step, self.images, index, np.zeros_like(index), lambda image, key: self.preprocess(image))


def _load(
    step: int,
    images: ImageSet,
    index: Int64[np.ndarray, " b"],
    keys: Int64[np.ndarray, " b"],
    read: Callable[[Picture, int], Float[Tensor, "c rows columns"]],
) -> Loaded:
    pixels, facts, refused = [], [], []
    for i, key in zip(index.tolist(), keys.tolist(), strict=True):
        image, target, name = images.samples[i]
        try:
            pixels.append(read(image, key))
        except ImageError as error:
            refused.append(Refused(name, error.reason))
        else:
            facts.append((target, i, key))
    if not pixels:
        return Loaded(step, None, refused)
    together, sizes = collate(pixels)
    return Loaded(step, Batch(together, *torch.tensor(facts).unbind(dim=1), sizes), refused)


class _Batches(Dataset[Loaded]):
    def __init__(self, load: Callable[[int], Loaded]):
        self._load = load

    def __getitem__(self, index: int) -> Loaded:
        return self._load(index)


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _begin_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which still saves its work
