"""How fast a model is on this machine, one way and another: measured once, briefly, and kept in the user's cache."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as once
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

import torch

from sightline.device import described_processor
from sightline.errors import UserError, WorkError
from sightline.evaluation.cache import Cache, folder
from sightline.evaluation.features import weights_digest
from sightline.inference.predictor import Predictor, Ready
from sightline.inference.through import through
from sightline.schema import from_json, require, to_json

Way = Literal["plain", "packed", "bf16", "int8", "onnx", "openvino"]
WAYS: Mapping[Way, str] = {
    "plain": "torch in fp32",
    "packed": "torch in fp32 with packed weights",
    "bf16": "torch in bf16",
    "int8": "torch in int8",
    "onnx": "ONNX Runtime in fp32",
    "openvino": "OpenVINO in fp32",
}
"""What a model can be computed by, and what that is called."""

VERSION = 1
"""Of what is measured and how it is kept."""
ENOUGH = 0.4
"""Seconds after which a measurement is not repeated."""
MOST = 256
"""Timings that are kept of a model."""
_CACHE_BYTES = 2**24


@dataclass(frozen=True)
class Timing:
    """`seconds` of one image in batches of `batch`, computed with `cores` threads. Raises UserError for nonsense."""

    way: Way
    cores: int
    batch: int
    seconds: float

    def __post_init__(self) -> None:
        require(1 <= self.cores <= 4096 and 1 <= self.batch <= 4096, "a timing has cores and a batch")
        require(0 < self.seconds < 1e6, "a timing has a number of seconds")


@dataclass(frozen=True)
class Speeds:
    """What is known of a model on this machine: timings, ways that have held, and those refused, with the reason."""

    timings: tuple[Timing, ...] = ()
    held: tuple[Way, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(len(self.timings) <= MOST and len(self.held) <= len(get_args(Way)), "these are too many")
        for way, reason in self.refused.items():
            require(way in get_args(Way) and len(reason) <= 1000, "a way is refused for a reason")


class Bench:
    """A predictor, and how fast its network is each way on images of one size; what is known is not measured again."""

    def __init__(self, predictor: Predictor, cache: Cache | None = None):
        self.predictor = predictor
        self.cache = Cache(folder("speeds"), min(_CACHE_BYTES, Cache().limit)) if cache is None else cache
        self._key = json.dumps(
            [VERSION, weights_digest(predictor.network), predictor.network.backbone.merges, machine()]
        )
        self._ready: dict[Way, Predictor] = {}
        self.images: Sequence[Ready] = ()
        self.speeds = self._kept()

    def _kept(self) -> Speeds:
        """What the cache has; nothing where that is not what `keep` writes."""
        kept = self.cache.get(self._key)
        try:
            return Speeds() if kept is None else from_json(Speeds, json.loads(kept[1]), "speeds")
        except (UserError, ValueError, RecursionError):
            return Speeds()

    def keep(self) -> None:
        """Writes down what was learned."""
        self.cache.put(self._key, {}, json.dumps(to_json(self.speeds)))

    def takes(self, way: Way, predictor: Predictor) -> None:
        """Lets a predictor stand for a way, one that has been calibrated."""
        self._ready[way] = predictor

    def by(self, way: Way) -> Predictor:
        """The predictor that computes this way. Raises UserError or WorkError where it cannot."""
        if way not in self._ready:
            plain = self.predictor.altered(precision=torch.float32, pack=False)
            if way in ("onnx", "openvino"):
                self._ready[way] = through(plain, way)
            else:
                precision = torch.bfloat16 if way == "bf16" else torch.float32
                self._ready[way] = plain.altered(precision=precision, pack=way == "packed")
            assert self._ready[way].computing is not None  # made once, for all that is altered afterwards
        return self._ready[way]

    def seconds(self, way: Way, cores: int, batch: int) -> float:
        """Seconds of one image, known or measured: the best of up to three batches, after one image to warm up."""
        for known in self.speeds.timings:
            if (known.way, known.cores, known.batch) == (way, cores, batch):
                return known.seconds
        fresh = way not in self._ready
        predictor = self.by(way).altered(cores=cores)
        if fresh:
            predictor.compute(self.images[:1], features=False)
        images = (list(self.images) * (batch // len(self.images) + 1))[:batch]
        best, spent = float("inf"), 0.0
        while spent < ENOUGH and best * 3 > spent:
            began = time.perf_counter()
            predictor.compute(images, features=False)
            took = max(time.perf_counter() - began, 1e-9)
            best, spent = min(best, took), spent + took
        timings = (*self.speeds.timings, Timing(way, cores, batch, best / batch))
        self.speeds = replace(self.speeds, timings=timings[-MOST:])
        return best / batch

    def holds(self, way: Way) -> None:
        """Writes down that the answers of a way are the model's."""
        self.speeds = replace(self.speeds, held=tuple(dict.fromkeys((*self.speeds.held, way))))

    def refuses(self, way: Way, fault: UserError | WorkError) -> None:
        """Writes down why a way is not to be taken."""
        held = tuple(name for name in self.speeds.held if name != way)
        self.speeds = replace(self.speeds, held=held, refused={**self.speeds.refused, way: str(fault)[:1000]})


@once
def machine() -> list[Any]:
    """What speeds depend on besides the model: the processor, how much of it this process has, and the libraries."""
    return [
        platform.machine(),
        "\n".join(described_processor()),
        available(),
        torch.get_num_threads(),
        sys.version_info[:2],
        *versions(),
    ]


def available() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> list[str]:
    """Of the libraries that compute; empty for those that are not installed."""
    found = []
    for name in ("sightline", "torch", "onnxruntime", "openvino"):
        try:
            found.append(version(name))
        except PackageNotFoundError:
            found.append("")
    return found
