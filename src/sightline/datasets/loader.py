"""Batches from an image set: each is a pure function of its step, so that workers and resuming cannot change it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from sightline.datasets.effort import Effort, measured
from sightline.datasets.image_set import ImageSet
from sightline.datasets.order import rows, share
from sightline.datasets.readers import Load, Readers, Watch
from sightline.errors import UserError
from sightline.images.augment import sample_keys
from sightline.images.decode import ImageError, Stored, decode
from sightline.images.preprocess import collate
from sightline.types import Batch

Picture = Path | Stored | UInt8[np.ndarray, "h w 3"]


Say = Callable[[str], None]


def _in_silence(line: str) -> None:
    pass


Transform = Callable[[UInt8[np.ndarray, "h w 3"], int], Any]
"""From an image and a number that seeds whatever is random about it to pixels [3, h, w], or to a tuple: pixels first,
then further tensors of the same shapes for every image, which become the `views` of the batch."""


class Joint(ABC):
    """Prepares an image together with what is marked in it, and puts the results of a batch together.

    A loader takes one in place of a function of images alone. It has to be one that can be sent to processes.
    """

    @abstractmethod
    def __call__(self, image: Picture, marks: Any, key: int) -> tuple[Float[Tensor, "c rows columns"], Any]:
        """Pixels and the target that goes with them; `key` seeds whatever is random. Raises ImageError."""

    @abstractmethod
    def together(self, targets: Sequence[Any]) -> Any:
        """The targets of a batch, as `Batch.targets` has them."""


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

    Every image that cannot be decoded is left out of its batch and named; none takes its place. Of worker processes
    that had to be replaced `say` hears; see `Readers`. `effort` is what reading took so far. Raises WorkError where
    worker processes die again and again.
    """

    def __init__(self, load: Load, steps: range, *, workers: int = 0, pin_memory: bool = False, say: Say = _in_silence):
        self._load, self._steps, self._pin, self.say = load, steps, pin_memory, say
        self.readers = Readers(load, workers, say) if workers else None
        self.effort = Effort() if self.readers is None else self.readers.effort

    def tell(self, say: Say) -> None:
        """Lets `say` hear from here on what befalls the worker processes."""
        self.say = say
        if self.readers is not None:
            self.readers.say = say

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Loaded]:
        loaded = map(self._read, self._steps) if self.readers is None else self.readers.read(self._steps)
        yield from map(_pinned, loaded) if self._pin else loaded

    def _read(self, step: int) -> Loaded:
        loaded, took = measured(lambda: self._load(step, lambda index: None))
        self.effort.add(took)
        return loaded


class TrainLoader(Loader):
    """Shuffled, augmented batches of the training steps in `steps`.

    `transform` makes pixels [3, h, w] of an image, or several views of it (see `Transform`), or is a `Joint` where more
    than a class goes with an image. `batch_size` counts the samples of all `world` processes; this one, `rank`, gets
    its `share` of each batch. Order follows from (seed, epoch), a sample's number from (seed, epoch, view); see
    `order.rows`, also for `repeats`. Raises UserError for a batch that leaves nothing for some process.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: "Transform | Joint",
        *,
        batch_size: int,
        seed: int,
        steps: range,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        say: Say = _in_silence,
    ):
        length = min(batch_size, len(images))
        if length < world:
            raise UserError(f"{world} processes cannot share batches of {length} images")
        load = _Shuffled(images, transform, batch_size, seed, repeats, share(length, rank, world))
        super().__init__(load, steps, workers=workers, pin_memory=pin_memory, say=say)


class OrderedLoader(Loader):
    """Every image once, in order, unchanged but for `preprocess` (or a `Joint`); its step is the number of the batch.

    Each of `world` processes gets a contiguous share of the set, which may be empty.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocess: "Callable[[Picture], Float[Tensor, 'c rows columns']] | Joint",
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        say: Say = _in_silence,
    ):
        part = range(len(images) * rank // world, len(images) * (rank + 1) // world)
        load = _Ordered(images, preprocess, batch_size, part)
        super().__init__(load, range(-(-len(part) // batch_size)), workers=workers, pin_memory=pin_memory, say=say)


class _Classes(Joint):
    """Images alone, whose targets are class indices."""

    def __init__(self, read: Callable[[Picture, int], Any]):
        self.read = read

    def __call__(self, image: Picture, marks: int, key: int) -> tuple[Any, int]:
        return self.read(image, key), marks

    def together(self, targets: Sequence[int]) -> Int[Tensor, " b"]:
        return torch.tensor(targets)


@dataclass(frozen=True)
class _Shuffled:
    images: ImageSet
    transform: Transform | Joint
    batch_size: int
    seed: int
    repeats: int
    share: slice

    def __call__(self, step: int, watch: Watch) -> Loaded:
        epoch, views = rows(step, len(self.images), self.batch_size, self.seed, self.repeats)
        views = views[self.share]
        keys = sample_keys(self.seed, epoch, views)
        joint = self.transform if isinstance(self.transform, Joint) else _Classes(self._augmented)
        return _load(step, self.images, views % len(self.images), keys, joint, watch)

    def _augmented(self, image: Picture, key: int) -> Any:
        assert not isinstance(self.transform, Joint)
        return self.transform(image if isinstance(image, np.ndarray) else decode(image), key)


@dataclass(frozen=True)
class _Ordered:
    images: ImageSet
    preprocess: Callable[[Picture], Float[Tensor, "c rows columns"]] | Joint
    batch_size: int
    part: range

    def __call__(self, step: int, watch: Watch) -> Loaded:
        index = np.array(self.part[step * self.batch_size : (step + 1) * self.batch_size])
        joint = self.preprocess if isinstance(self.preprocess, Joint) else _Classes(self._prepared)
        return _load(step, self.images, index, np.zeros_like(index), joint, watch)

    def _prepared(self, image: Picture, key: int) -> Float[Tensor, "c rows columns"]:
        assert not isinstance(self.preprocess, Joint)
        return self.preprocess(image)


def _load(
    step: int,
    images: ImageSet,
    index: Int64[np.ndarray, " b"],
    keys: Int64[np.ndarray, " b"],
    joint: Joint,
    watch: Watch,
) -> Loaded:
    views, targets, facts, refused = [], [], [], []
    for i, key in zip(index.tolist(), keys.tolist(), strict=True):
        image, marks, name = images.samples[i]
        if (why := watch(i)) is not None:
            refused.append(Refused(name, why))
            continue
        try:
            seen, target = joint(image, marks, key)
        except ImageError as error:
            refused.append(Refused(name, error.reason))
        else:
            views.append(seen if isinstance(seen, tuple) else (seen,))
            targets.append(target)
            facts.append((i, key))
    if not views:
        return Loaded(step, None, refused)
    pixels, *others = zip(*views, strict=True)
    together, sizes = collate(pixels)
    further = tuple(torch.stack(view) for view in others)
    batch = Batch(together, joint.together(targets), *torch.tensor(facts).unbind(dim=1), sizes, further)
    return Loaded(step, batch, refused)


def _pinned(loaded: Loaded) -> Loaded:
    """The same in memory that a GPU can fetch by itself."""
    if loaded.batch is None:
        return loaded
    pixels, views = loaded.batch.pixels.pin_memory(), tuple(view.pin_memory() for view in loaded.batch.views)
    return loaded._replace(batch=loaded.batch._replace(pixels=pixels, views=views))
