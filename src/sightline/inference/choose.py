"""How a job is computed: the fastest way on this machine that gives the model's answers, found by a short measurement.

What is chosen between, and within which bounds, says `choose`.
"""

import importlib.util
import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast, get_args

import torch

from sightline.device import INT8, PRECISIONS, keep_for_next
from sightline.errors import UserError, WorkError, printable
from sightline.evaluation.cache import Cache
from sightline.images.decode import Source
from sightline.inference import eight_bits
from sightline.inference.eight_bits import AGREEMENT, Measured, Pictures
from sightline.inference.export import Format
from sightline.inference.gate import TOLERANCE, Agreement, agree
from sightline.inference.packed import computes_bf16, packs
from sightline.inference.predictor import Answer, Predictor, Ready
from sightline.inference.reading import readers
from sightline.inference.speeds import WAYS, Bench, Way, available
from sightline.inference.through import through

FEW = 48
"""Images below which nothing is measured."""
LOOK, GLANCE = 16, 100
"""Of the user's first images, how many a way is held against; where it has held before, one of so many, but two."""
LOW = 0.01
"""By how much a logit may differ in bf16, in parts of the distance of the largest and the smallest of its image."""
WORTH = 1.0
"""Seconds that another way has to save, and a tenth of the time."""
LONG = 600.0
"""Seconds of a job from which on making a program for another runtime is tried: that takes half a minute."""

MODULE: Mapping[Way, str] = {"onnx": "onnxruntime", "openvino": "openvino"}
"""What has to be installed for a way that is no torch."""

RUNTIMES = ("auto", "torch", *MODULE)
Item = Source | Ready | Answer


@dataclass(frozen=True)
class Chosen:
    """Who answers, what there is to answer (what was looked at is not read again), and why, in a line or none.

    `measured` is what is known of the answers in 8 bits, and `kept` tells that it was known before.
    """

    predictor: Predictor
    sources: Iterable[Item]
    why: str = ""
    measured: Measured | None = None
    kept: bool = False


def choose(
    predictor: Predictor,
    sources: Iterable[Item],
    *,
    count: int | None = None,
    runtime: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    cache: Cache | None = None,
    calibrate: Pictures | Iterable[Source] | None = None,
    agreement: float = AGREEMENT,
) -> Chosen:
    """The predictor that answers a job of `count` images or more (None: as many as `len` says) fastest here.

    `runtime="auto"` chooses on the processor; others are what is asked for. Taken are torch in fp32; torch in fp32 with
    packed weights, where no logit differs by more than 1e-4; torch in bf16, where `precision` is auto and the processor
    multiplies bf16, if on the user's own first images no logit differs by more than a hundredth of the range of its
    image's, and every choice is the same but for ties within that; ONNX Runtime and OpenVINO in fp32, where they are
    installed and the job takes ten minutes otherwise, through the gate of `export`. Something else than plain fp32 has
    to save a second and a tenth of the time. The number of threads follows from what reading and computing one image
    take; `batch_size` from a measurement, where it is None. What was measured is kept in `cache`, under the model's
    weights and this machine; the images are looked at anew each time. In a job of 48 images or more the process keeps
    memory that is freed (`device.keep_for_next`). Raises what `through` raises.

    `precision="int8"`, which is never chosen otherwise, computes in 8 bits, calibrated on the first 256 images or on
    those of `calibrate`, if at least the share `agreement` of them keeps its first class; else it raises UserError
    (`eight_bits.in_eight_bits`).
    """
    if runtime not in RUNTIMES:
        raise UserError(f"there is no runtime '{printable(runtime)}': choose {', '.join(RUNTIMES)}")
    if precision not in (*PRECISIONS, INT8):
        raise UserError(f"there is no precision '{printable(precision)}': choose {', '.join((*PRECISIONS, INT8))}")
    if precision == INT8 and runtime in MODULE:
        raise UserError(f"8 bits are computed by torch, and the runtime is {runtime}: leave --runtime away")
    given = predictor if batch_size is None else predictor.altered(batch_size=batch_size)
    if runtime in MODULE:
        return Chosen(through(given, cast(Format, runtime)), sources)
    if count is None:
        count = len(sources) if isinstance(sources, Sequence) else 0
    if count >= FEW:
        keep_for_next()
    if precision == INT8:
        return _in_eight_bits(given, sources, count, batch_size, cache, calibrate, agreement)
    ways = _ways(given, precision)
    if runtime == "torch" or count < FEW or len(ways) < 2 or not given.labels:
        return Chosen(given, sources)
    bench = Bench(given, cache)
    number = max(2, min(LOOK, count // GLANCE)) if bench.speeds.held else LOOK
    items, rest, reading = _looked_at(given, sources, max(number, 2 * given.threads))
    sources = itertools.chain(items, rest)
    ready = [item for item in items if isinstance(item, Ready)][:number]
    bench.images = [image for image in ready if image.pixels.shape == ready[0].pixels.shape]
    if not bench.images:
        return Chosen(given, sources)
    choice = _Choice(bench, ways, count)
    found = choice.made(choice.way(), batch_size, reading)
    bench.keep()
    return Chosen(found[0], sources, found[1])


def _in_eight_bits(
    given: Predictor,
    sources: Iterable[Item],
    count: int,
    batch_size: int | None,
    cache: Cache | None,
    calibrate: Pictures | Iterable[Source] | None,
    agreement: float,
) -> Chosen:
    """The same in 8 bits, with as many threads and images at a time as is fastest where the job is long."""
    number = eight_bits.LOOK if calibrate is None else LOOK if count >= FEW else 0
    items, rest, reading = _looked_at(given, sources, number)
    ready = [item for item in items if isinstance(item, Ready)]
    if calibrate is None:
        pictures = Pictures(ready, [-1] * len(ready))
    else:
        pictures = calibrate if isinstance(calibrate, Pictures) else eight_bits.read(given, calibrate)
    found = eight_bits.in_eight_bits(given, pictures, agreement=agreement, cache=cache)
    predictor, said = found.predictor, WAYS[INT8]
    if count >= FEW and ready:
        bench = Bench(given, cache)
        bench.takes(INT8, predictor)
        bench.images = [image for image in ready if image.pixels.shape == ready[0].pixels.shape]
        predictor, said = _Choice(bench, [INT8], count).made(INT8, batch_size, reading)
        bench.keep()
    before = ", as was known" if found.kept else ""
    why = f"{said}; {found.measured.describe()}{before}"
    return Chosen(predictor, itertools.chain(items, rest), why, found.measured, found.kept)


class _Choice:
    """One choice between ways."""

    def __init__(self, bench: Bench, ways: list[Way], count: int):
        self.bench, self.ways, self.count = bench, ways, count
        self.cores = torch.get_num_threads()
        self.batch = self._first_batch()
        self.agreement: Agreement | None = None

    def made(self, way: Way, batch_size: int | None, reading: "Reading") -> tuple[Predictor, str]:
        """The predictor that computes this way, and why."""
        batch = batch_size or self._batch(way)
        cores, in_turn = self._cores(way, reading)
        predictor = self.bench.by(way).altered(batch_size=batch, cores=cores, in_turn=in_turn)
        return predictor, self._words(way, batch, cores)

    def _first_batch(self) -> int:
        """A batch that is measured in a short time, the same as before where something is known."""
        for known in self.bench.speeds.timings:
            if known.way == "plain":
                return known.batch
        predictor = self.bench.by("plain")
        predictor.compute(self.bench.images[:1], features=False)
        began = time.perf_counter()
        predictor.compute(self.bench.images[:1], features=False)
        return max(1, min(8, int(0.5 / max(time.perf_counter() - began, 1e-9))))

    def _seconds(self, way: Way) -> float:
        return self.bench.seconds(way, self.cores, self.batch)

    def way(self) -> Way:
        """The fastest whose answers are those of plain fp32."""
        for way in sorted(self.ways, key=self._seconds):
            if way == "plain" or (self._worth(way, "plain") and self._holds(way)):
                break
        else:
            way = "plain"
        if way == "bf16" or self.count * self._seconds(way) < LONG:
            return way
        for other, module in MODULE.items():
            if importlib.util.find_spec(module) is not None and self._worth_making(other, way):
                way = other
        return way

    def _worth_making(self, way: Way, than: Way) -> bool:
        """Whether a program is faster, if it can be made; who failed once is not asked again."""
        try:
            return way not in self.bench.speeds.refused and self._worth(way, than)
        except (UserError, WorkError) as fault:
            self.bench.refuses(way, fault)
            return False

    def _worth(self, way: Way, than: Way) -> bool:
        ours, theirs = self._seconds(way), self._seconds(than)
        return ours < 0.9 * theirs and (theirs - ours) * self.count >= WORTH

    def _holds(self, way: Way) -> bool:
        """Whether the answers for the first images are those of plain fp32; who failed once is not asked again."""
        if way in self.bench.speeds.refused:
            return False
        low = way == "bf16"
        plain, other = (self.bench.by(name).altered(batch_size=8) for name in ("plain", way))
        try:
            self.agreement = agree(plain, other, self.bench.images, LOW if low else TOLERANCE, relative=low)
        except (UserError, WorkError) as fault:
            self.bench.refuses(way, fault)
            return False
        self.bench.holds(way)
        return True

    def _batch(self, way: Way) -> int:
        """Small batches stay in the processor's cache, large ones spread what each call costs."""
        best, chosen = math.inf, 8
        for batch in (8, 16, 32):
            if self._seconds(way) * batch > 0.5:
                break
            seconds = self.bench.seconds(way, self.cores, batch)
            if seconds < 0.97 * best:
                best, chosen = seconds, batch
        return chosen

    def _cores(self, way: Way, reading: "Reading") -> tuple[int, bool]:
        """Threads of the network, and whether it computes in turn with reading: what does most images in a second.

        In turn, all threads compute an image in m seconds and all that read in r seconds: 1/(m + r) images. Side by
        side, with t threads, of which an image takes m seconds each, and `reading.seconds` of one: neither can there be
        more than 1/m images, nor more than all cores together bear. Where both want all cores they disturb each other,
        for the network's threads wait for the slowest: that is for images that have to be waited for.
        """
        if way in MODULE:
            return self.cores, False
        everything, together = available(), self._seconds(way)
        rates = {}
        if not reading.waits:
            hands = min(self.bench.predictor.threads, everything)
            rates[self.cores, True] = 1 / (together + reading.seconds / hands)
        if reading.seconds < 0.2 * together * everything:
            return self.cores, bool(rates)
        for cores in sorted({1, max(self.cores // 2, 1), self.cores}):
            if cores < self.cores or reading.waits:
                seconds = self.bench.seconds(way, cores, self.batch)
                rates[cores, False] = min(1 / seconds, everything / (reading.seconds + cores * seconds))
        return max(rates, key=lambda found: rates[found])

    def _words(self, way: Way, batch: int, cores: int) -> str:
        said = f"{WAYS[way]}, {cores} thread{'s' * (cores > 1)}, batches of {batch}"
        if way != "plain":
            said += f": {self._seconds('plain') / self._seconds(way):.1f} times as fast as plain fp32 here"
        if self.agreement is not None and way not in MODULE:
            most, allowed = f"{self.agreement.difference:.0e}", f"{TOLERANCE:.0e}"
            if way == "bf16":
                most, allowed = f"{self.agreement.difference:.2%} of their range", f"{LOW:.0%}"
            ties = f" but for {self.agreement.ties} near-ties" if self.agreement.ties else ""
            said += f"; the first {self.agreement.pictures} images have the same answers{ties}, "
            said += f"logits within {most} ({allowed} is allowed)"
        if way == "bf16":
            return f"{said}; --precision fp32 is exact"
        if "bf16" in self.ways and (reason := self.bench.speeds.refused.get("bf16")):
            said += f"; not in bf16: {printable(reason, 300)}"
        return said


def _ways(predictor: Predictor, precision: str) -> list[Way]:
    """What there is to choose between on this machine."""
    if predictor.device.type != "cpu" or precision not in ("auto", "fp32"):
        return []
    possible = {"plain": True, "packed": packs(torch.float32), "bf16": precision == "auto" and computes_bf16()}
    return [way for way in get_args(Way) if possible.get(way)]


class Reading(NamedTuple):
    """What reading an image takes: `seconds` of one core; `waits` tells that most of the time passes without it."""

    seconds: float
    waits: bool


def _looked_at(
    predictor: Predictor, sources: Iterable[Item], number: int
) -> tuple[list[Ready | Answer], Iterable[Item], Reading]:
    """The first items read, of which `number` are images if they can be had; the rest; what reading takes.

    The first that each thread reads takes longer, and is not counted where there are others.
    """

    def timed(source: Item) -> tuple[Ready | Answer, float, float]:
        wall, core = time.monotonic(), time.thread_time()
        return predictor.prepare(source), time.thread_time() - core, time.monotonic() - wall

    rest = iter(sources)
    items, spent = list[Ready | Answer](), list[tuple[float, float]]()
    with readers(predictor.threads) as pool:
        while len(spent) < number and len(items) < 4 * number:
            drawn = list(itertools.islice(rest, number - len(spent)))
            if not drawn:
                break
            for item, computed, passed in pool.map(timed, drawn):
                items.append(item)
                if isinstance(item, Ready):
                    spent.append((computed, passed))
    usual = spent[predictor.threads :] or spent
    computed, passed = (sum(times) for times in zip(*usual, strict=True)) if usual else (0.0, 0.0)
    crowded = max(1.0, predictor.threads / available())
    return items, rest, Reading(computed / max(len(usual), 1), passed > 2 * crowded * computed)
