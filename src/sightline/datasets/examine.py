"""Looks at every image of a dataset once, in processes that may die of it: what it is, and a small picture of it."""

import hashlib
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float16, Float32, Int32, UInt8
from PIL import Image

from sightline.datasets.image_set import Samples
from sightline.device import keep_for_next
from sightline.images.decode import FORMATS, Header, ImageError, Source, decode, header, read
from sightline.processes import leave_ctrl_c, signals_wait

CELLS = 16
"""Rows and columns of the picture that duplicates are sought by."""

FINE = 64
"""Most rows and columns of the picture by which they are confirmed."""

ENOUGH = (512, 512)
"""A JPEG more than twice as large on both sides is decoded at a fraction of its size: half of the time is saved."""

CHUNK = 16
AHEAD = 2
"""Chunks that each process may be asked for: it goes on while this one takes what it found."""

PATIENCE = 120
"""Seconds that a chunk of images may take before its process is taken for hung."""

MODES = ("RGB", "grey", "grey, 16 bits or more", "two colours", "palette", "alpha", "CMYK", "other")
_MODES = {
    "RGB": 0,
    "RGBX": 0,
    "L": 1,
    "F": 2,
    "1": 3,
    "P": 4,
    "PA": 5,
    "LA": 5,
    "La": 5,
    "RGBA": 5,
    "RGBa": 5,
    "CMYK": 6,
}

# fmt: off
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",), "WebP": (".webp",), "GIF": (".gif",),
    "BMP": (".bmp", ".dib"), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG 2000": (".jp2", ".j2k"), "AVIF": (".avif",),
}
# fmt: on


class Look(NamedTuple):
    """What was seen of one image, or the `reason` why nothing was.

    `luma` is its brightness in CELLS × CELLS equal parts, less what a smooth surface explains; `spread` the standard
    deviation of that, in levels of 0 to 255; `digest` stands for all its pixels. Without them only the header was read.
    """

    reason: str | None = None
    header: Header | None = None
    blank: bool = False
    spread: float = 0.0
    digest: bytes = b""
    luma: np.ndarray | None = None


@dataclass
class Looks:
    """What was seen of all images, as columns; `reasons` says of each row that could not be read why.

    `formats` index the names of `FORMATS`, `modes` index `MODES`; sizes are upright. `crashed` are the rows whose
    decoder died.
    """

    formats: UInt8[np.ndarray, " n"]
    modes: UInt8[np.ndarray, " n"]
    heights: Int32[np.ndarray, " n"]
    widths: Int32[np.ndarray, " n"]
    turned: Bool[np.ndarray, " n"]
    several: Bool[np.ndarray, " n"]
    blank: Bool[np.ndarray, " n"]
    spread: Float32[np.ndarray, " n"]
    digests: UInt8[np.ndarray, "n 16"]
    lumas: Float16[np.ndarray, "n cells cells"]
    reasons: dict[int, str] = field(default_factory=dict)
    crashed: set[int] = field(default_factory=set)

    @classmethod
    def empty(cls, count: int, *, pixels: bool) -> "Looks":
        """Columns for `count` images; without `pixels` those that need them have no width."""
        cells = CELLS if pixels else 0
        return cls(
            formats=np.zeros(count, dtype=np.uint8),
            modes=np.zeros(count, dtype=np.uint8),
            heights=np.zeros(count, dtype=np.int32),
            widths=np.zeros(count, dtype=np.int32),
            turned=np.zeros(count, dtype=bool),
            several=np.zeros(count, dtype=bool),
            blank=np.zeros(count, dtype=bool),
            spread=np.zeros(count, dtype=np.float32),
            digests=np.zeros((count, 16), dtype=np.uint8),
            lumas=np.zeros((count, cells, cells), dtype=np.float16),
        )

    @property
    def readable(self) -> Bool[np.ndarray, " n"]:
        """Which images could be read."""
        good = np.ones(len(self.formats), dtype=bool)
        good[list(self.reasons)] = False
        return good

    def put(self, row: int, look: Look) -> None:
        """Enters what was seen of one image."""
        if look.reason is not None:
            self.reasons[row] = look.reason
            return
        assert look.header is not None
        seen = look.header
        self.formats[row] = list(FORMATS).index(seen.format) if seen.format in FORMATS else len(FORMATS)
        self.modes[row] = _mode(seen.mode)
        self.heights[row], self.widths[row] = seen.height, seen.width
        self.turned[row], self.several[row] = seen.orientation in range(2, 9), seen.several
        if look.luma is not None:
            self.blank[row], self.spread[row], self.lumas[row] = look.blank, look.spread, look.luma
            self.digests[row] = np.frombuffer(look.digest, dtype=np.uint8)


def _mode(name: str) -> int:
    return 2 if name.startswith("I") else _MODES.get(name, len(MODES) - 1)


def look(source: Source) -> Look:
    """Decodes one image and describes it."""
    try:
        if isinstance(source, np.ndarray):
            pixels = source
            seen = Header("", "RGB", *source.shape[:2], 1, False)
        else:
            data = read(source)
            pixels = decode(data, target=ENOUGH)  # first: its reasons are those that training gives
            seen = header(data)
    except ImageError as error:
        return Look(error.reason)
    digest = hashlib.blake2b(f"{pixels.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    luma = unexplained(_luma(pixels))
    spread = float(luma.std())
    blank = spread < 1 and bool((pixels == pixels[0, 0]).all())
    return Look(None, seen, blank, spread, digest.digest(), luma.astype(np.float16))


def look_at_header(source: Source) -> Look:
    """Describes one image by its header alone."""
    if isinstance(source, np.ndarray):
        return Look(None, Header("", "RGB", *source.shape[:2], 1, False))
    try:
        return Look(None, header(source))
    except ImageError as error:
        return Look(error.reason)


def _luma(pixels: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "cells cells"]:
    """Brightness in equal parts; means of means, so that an image of many pixels is not rounded to whole levels."""
    image = Image.fromarray(pixels)
    size = (min(image.width, 8 * CELLS), min(image.height, 8 * CELLS))
    small = np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=4), dtype=np.float32)
    grey = Image.fromarray(small @ np.array([0.299, 0.587, 0.114], dtype=np.float32))
    return np.asarray(grey.resize((CELLS, CELLS), Image.Resampling.BILINEAR))


@lru_cache(maxsize=64)
def _surfaces(height: int, width: int) -> Float32[np.ndarray, "pixels surfaces"]:
    """An orthonormal basis of the surfaces of second degree over a picture."""
    y, x = (side.reshape(-1) for side in np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j])
    surfaces = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    return np.linalg.qr(surfaces)[0].astype(np.float32)


def unexplained(light: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """Brightness less the surface of second degree that fits best: skies and gradients are alike but for the rest."""
    basis, values = _surfaces(*light.shape), light.reshape(-1)
    return (values - basis @ (basis.T @ values)).reshape(light.shape)


def fine(source: Source) -> UInt8[np.ndarray, "h w 3"] | None:
    """The image in at most FINE × FINE equal parts; None where it cannot be read."""
    try:
        image = Image.fromarray(decode(source, target=(FINE, FINE)))
    except ImageError:
        return None
    return np.asarray(image.resize((min(image.width, FINE), min(image.height, FINE)), Image.Resampling.BILINEAR))


def each(
    work: Callable[[Source], Any],
    samples: Samples,
    rows: Sequence[int],
    *,
    workers: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[int, Any]]:
    """What `work` makes of each of these samples, in any order; None where it killed or hung its process.

    With `workers=0` this process does it all, and dies with it. `progress` is told how many are done.
    """
    if not workers or samples.arrays is not None or not len(rows):
        for done, row in enumerate(rows, 1):
            yield row, work(samples[row].image)
            progress(done)
        return
    for done, (row, result) in enumerate(_Crew(work, samples, workers).run(rows), 1):
        yield row, result
        progress(done)


@dataclass
class _Crew:
    """Processes that share the work, and are replaced when one dies or hangs."""

    work: Callable[[Source], Any]
    samples: Samples
    workers: int

    def run(self, rows: Sequence[int]) -> Iterator[tuple[int, Any]]:
        lost: list[int] = []
        yield from self._share([rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)], self.workers, AHEAD, lost)
        # Nobody knows which image it was: those that a lost process was to look at are tried again, one by one.
        guilty: list[int] = []
        yield from self._share([[row] for row in lost], 1, 1, guilty)
        for row in guilty:
            yield row, None

    def _share(
        self, chunks: Sequence[Sequence[int]], workers: int, ahead: int, lost: list[int]
    ) -> Iterator[tuple[int, Any]]:
        """Works until every chunk is done or lost; `lost` is given the rows of those that went with their process.

        Each process is asked for as many as `ahead` chunks.
        """
        left = deque(chunks)
        crew: dict[Connection, _Worker] = {}
        try:
            while left or any(worker.owed for worker in crew.values()):
                while left and (worker := self._free(crew, workers, ahead)) is not None:
                    worker.ask(left.popleft())
                until = min(worker.until for worker in crew.values() if worker.owed)
                ready = wait(list(crew), timeout=max(until - time.monotonic(), 0.0))
                for line, worker in list(crew.items()):
                    answer = worker.answer() if line in ready else None
                    if answer is not None:
                        yield from answer
                    elif line in ready or worker.hangs():
                        lost += chain.from_iterable(worker.owed)
                        worker.end()
                        del crew[line]
        finally:
            for worker in crew.values():
                worker.end()

    def _free(self, crew: "dict[Connection, _Worker]", workers: int, ahead: int) -> "_Worker | None":
        """Whoever can take another chunk."""
        if len(crew) < workers:
            worker = _Worker(self.work, self.samples)
            crew[worker.line] = worker
            return worker
        worker = min(crew.values(), key=lambda worker: len(worker.owed))
        return worker if len(worker.owed) < ahead else None


class _Worker:
    """One process, the line to it, and the chunks that it was asked for and owes."""

    def __init__(self, work: Callable[[Source], Any], samples: Samples):
        # A forked process has everything at hand; elsewhere than on Linux forking is not safe.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, samples, theirs), daemon=True)
        with theirs, signals_wait():
            self.process.start()
        self.owed: deque[Sequence[int]] = deque()
        self.until = math.inf

    def ask(self, rows: Sequence[int]) -> None:
        if not self.owed:
            self.until = time.monotonic() + PATIENCE
        self.owed.append(rows)
        with suppress(OSError):  # it is dead then, as the next look will find
            self.line.send(rows)

    def answer(self) -> list[tuple[int, Any]] | None:
        """Rows with their results, None where the process is dead. Raises what the work raised."""
        try:
            made, results = self.line.recv()
        except (EOFError, OSError):
            return None
        if not made:
            raise results
        self.until = time.monotonic() + PATIENCE
        return list(zip(self.owed.popleft(), results, strict=True))

    def hangs(self) -> bool:
        return bool(self.owed) and time.monotonic() >= self.until

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.line.close()


def _serve(work: Callable[[Source], Any], samples: Samples, line: Connection) -> None:
    leave_ctrl_c()
    keep_for_next()
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Whoever was killed outright leaves nobody behind.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    while True:
        rows = line.recv()
        try:
            answer: tuple[bool, Any] = (True, [work(samples[row].image) for row in rows])
        except Exception as fault:
            fault.add_note(traceback.format_exc())
            answer = (False, fault)
        line.send(answer)
