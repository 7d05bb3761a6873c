"""Images to answers, many at a time: files are read by threads while the network computes."""

import copy
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.device import computing_with
from sightline.errors import UserError, WorkError, printable
from sightline.images.decode import ImageError, Source
from sightline.images.preprocess import Preprocess
from sightline.inference.packed import computes_bf16, packed, packs
from sightline.inference.quantised import Grids, quantised
from sightline.inference.reading import readers
from sightline.layers.dense import fast_products
from sightline.types import Placement, Reply, each, finite


@dataclass(frozen=True)
class Answer:
    """What came of one source: a `prediction`, or an `error` that says why there is none."""

    path: str
    prediction: Reply | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        assert (self.prediction is None) != (self.error is None), "an answer is a prediction or an error"


@dataclass(frozen=True)
class Ready:
    """An image that has been read: what the network takes of it, and what it is called."""

    path: str
    pixels: Float[Tensor, "3 h w"]
    place: Placement


class Predictor:
    """A network with its pixel contract and its labels, ready to answer.

    The network is moved to `device`. `precision` is that of its matrix products (`sightline.device` chooses both);
    scores are computed in float32. `batch_size` is the most images at a time, `top` the number of classes in an
    answer, `cores` the number of threads that the network computes with (None: as many as torch takes). Images are read
    while others are computed, or `in_turn`: all cores read a few batches, then all compute them. Raises UserError where
    the labels do not fit the network.

    On a processor that multiplies bf16 itself, a copy of the network with its weights in bf16 computes; in fp32 it is,
    with `pack`, a copy whose weights are packed for the processor (`inference.packed`): faster, with more memory.
    Whatever is done to the weights afterwards does not count then. Predictors that were `altered` from one another
    share such a copy while one of them is there. With torch.int8 and the `grids` that were chosen for it a copy
    computes in 8 bits (`inference.quantised`), in which answers change: `inference.eight_bits` makes such.

    In fp32 the other images of a batch change a score by less than 1e-6; in bf16 and fp16 the kernels that a device
    chooses for a batch size show in the third digit.
    """

    def __init__(
        self,
        network: Any,
        preprocess: Preprocess,
        labels: Sequence[str],
        *,
        device: torch.device | None = None,
        precision: torch.dtype = torch.float32,
        batch_size: int = 32,
        top: int = 5,
        pack: bool = False,
        cores: int | None = None,
        grids: Grids | None = None,
        in_turn: bool = False,
    ):
        classes = getattr(network.architecture.head, "num_classes", len(labels))
        if len(labels) != classes:
            raise UserError(f"the model tells {classes} classes apart, and there are {len(labels)} labels")
        self.device = device or torch.device("cpu")
        self.network = network.to(self.device)
        self.preprocess, self.labels = preprocess, list(labels)
        self.precision, self.batch_size, self.top = precision, batch_size, top
        self.pack, self.cores, self.grids, self.in_turn = pack, cores, grids, in_turn
        self._made: WeakValueDictionary[Any, Any] = WeakValueDictionary()
        self._require_positive()
        self.threads = min(8, os.cpu_count() or 1)

    @cached_property
    def computing(self) -> Any:
        """The network as it is computed: itself, or a copy that is made for this processor."""
        made = self._made.get((self.precision, self.pack))
        if made is None:
            made = self._made[self.precision, self.pack] = self._for_processor()
        return made

    def _for_processor(self) -> Any:
        on_processor = self.device.type == "cpu"
        if self.precision == torch.int8:
            assert on_processor, "8 bits are for the processor"
            assert self.grids is not None, "8 bits are calibrated first"
            return quantised(self.network, self.grids)
        if on_processor and self.precision == torch.bfloat16 and computes_bf16():
            return packed(self.network, torch.bfloat16)
        if on_processor and self.precision == torch.float32 and self.pack and packs(torch.float32):
            return packed(self.network)
        return self.network

    def altered(self, **changes: Any) -> "Predictor":
        """The same with some of `precision`, `pack`, `grids`, `cores`, `batch_size`, `in_turn` or `network` changed."""
        other = copy.copy(self)
        if changes.keys() - {"cores", "batch_size", "in_turn"}:
            vars(other).pop("computing", None)
        if changes.keys() & {"network", "grids"}:
            other._made = WeakValueDictionary()
        vars(other).update(changes)
        other._require_positive()
        return other

    def _require_positive(self) -> None:
        names = {"batch_size": "batch size", "top": "number of classes to show", "cores": "number of threads"}
        for name, words in names.items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"the {words} has to be at least 1, and is {value}")

    @property
    def look_ahead(self) -> int:
        """The most sources that are read beyond the batch that is being answered."""
        return 2 * self.batch_size + self.threads

    def predict(self, sources: Iterable[Source | Ready | Answer]) -> Iterator[Answer]:
        """An answer for every source, in order: paths, encoded bytes, PIL images or uint8 arrays.

        Sources are drawn as they are needed, so that there may be millions. One that cannot be read costs its own
        answer only; an `Answer` among the sources is passed on, and a `Ready` image is not read again. Raises WorkError
        where the device's memory is too small.
        """
        return self.answers(self._prepared(sources))

    def prepare(self, source: Source | Ready | Answer, path: str | None = None) -> Ready | Answer:
        """Reads one source, which is called `path` where that is given; an `Answer` with an error where it cannot."""
        if isinstance(source, (Answer, Ready)):
            return source
        if path is None:
            path = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else "image"
        try:
            return Ready(path, *self.preprocess.placed(source))
        except ImageError as error:
            return Answer(path, error=f"cannot decode: {error.reason}")

    def answers(self, items: Iterable[Ready | Answer], *, top: int | None = None) -> Iterator[Answer]:
        """An answer for every item that `prepare` gave, in order, as `predict` groups and answers them.

        `top` is the number of classes in an answer, that of the predictor where None.
        """
        if not self.labels:
            remedy = "name labels to choose from" if hasattr(self.network.head, "encode_text") else "use embed"
            raise UserError(f"this model has no classifier: it gives features, not predictions ({remedy})")
        for batch in self._batches(items):
            images = [item for item in batch if isinstance(item, Ready)]
            answers = iter(self._answer(images, top or self.top) if images else [])
            yield from (next(answers) if isinstance(item, Ready) else item for item in batch)

    def embed(self, sources: Iterable[Source]) -> Float[Tensor, "n d"]:
        """The feature vectors that the classifier reads, in order, float32 on the CPU.

        Raises UserError for the first source that cannot be read, for a matrix has no place for an error.
        """
        rows: list[Tensor] = []
        for batch in self._batches(self._prepared(sources)):
            for item in batch:
                if isinstance(item, Answer):
                    raise UserError(f"{printable(item.path)}: {item.error}")
            rows.append(self.compute([item for item in batch if isinstance(item, Ready)], features=True))
        if not rows:
            raise UserError("there is no image to embed")
        return torch.cat(rows)

    def _answer(self, images: Sequence[Ready], top: int) -> Iterator[Answer]:
        output = self.compute(images, features=False)
        predictions = self.network.head.read(output, self.labels, top, [image.place for image in images])
        for image, prediction, good in zip(images, predictions, finite(output).tolist(), strict=True):
            if good:
                yield Answer(image.path, prediction)
            else:
                yield Answer(image.path, error="the model's answer is not a number: damaged weights, or try fp32")

    def compute(self, images: Sequence[Ready], *, features: bool) -> Any:
        """The network's output, or its features, for images of one size, in float32 on the CPU.

        Raises WorkError where the device has too little memory.
        """
        pixels = torch.stack([image.pixels for image in images]).to(self.device)
        network = self.computing.eval()
        halved = self.precision != torch.float32 and network is self.network
        try:
            with (
                computing_with(self.cores),
                fast_products(),
                torch.inference_mode(),
                torch.autocast(self.device.type, self.precision if halved else None, enabled=halved),
            ):
                output = network.embed(pixels) if features else network(pixels)
            return each(output, lambda values: values.float().cpu())
        except torch.OutOfMemoryError as error:
            raise WorkError(
                f"{self.device} has too little memory for {len(images)} images at a time: choose a smaller batch size"
            ) from error

    def _batches(self, items: Iterable[Ready | Answer]) -> Iterator[list[Ready | Answer]]:
        """Neighbours of equal size, at most `batch_size`, with the failures between them."""
        batch: list[Ready | Answer] = []
        shape: torch.Size | None = None
        for item in items:
            unlike = isinstance(item, Ready) and shape is not None and item.pixels.shape != shape
            if unlike or len(batch) == self.batch_size:
                yield batch
                batch, shape = [], None
            batch.append(item)
            if isinstance(item, Ready):
                shape = item.pixels.shape
        if batch:
            yield batch

    def _prepared(self, sources: Iterable[Source | Ready | Answer]) -> Iterator[Ready | Answer]:
        """The sources as pixels or failures, in order; reading runs ahead of whoever asks, by `look_ahead`."""
        pool = readers(self.threads, yielding=not self.in_turn)
        rest = iter(sources)
        try:
            if self.in_turn:
                while drawn := list(itertools.islice(rest, 2 * self.batch_size)):
                    yield from list(pool.map(self.prepare, drawn))  # all of them, before the first is computed
                return
            running = deque()
            for source in rest:
                running.append(pool.submit(self.prepare, source))
                if len(running) == self.look_ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
