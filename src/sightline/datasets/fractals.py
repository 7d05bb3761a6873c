"""Pictures by formula: classes of fractals and contours, drawn when they are asked for, from a seed alone."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, UInt8, UInt16

from sightline.datasets.image_set import Drawn, ImageSet, Names, Samples
from sightline.datasets.split import Splits
from sightline.schema import require

Kind = Literal["ifs", "ifs3d", "contour", "one", "mixed"]

VERSION = 1
"""Of the formulas: whatever changes a pixel makes another, so that no run goes on with other images."""

MOST = 10_000_000
"""Images of a set, whose names and classes are kept in memory."""

JUDGED = 2_000
"""Images that are set apart for validation, about, however many there are."""

TRIES, FILLED, COARSE = 64, 0.15, 32
"""A formula is drawn anew, so many times at most, while it fills less than that share of a coarse grid of so many
cells along a side: most random systems make but a few specks (arXiv 2101.08515, section 3.2)."""

OF_CLASS = 1 << 40
"""Stands in a key where an instance would: more than there are."""

STEEPEST = 0.85
"""The largest singular value of a map: those of its instances then stay below one."""


@dataclass(frozen=True)
class FractalSettings:
    """What `builtin:fractals:NAME=VALUE,…` may say. Raises UserError for values out of range.

    `kind` is `ifs`, systems of 2 to 8 affine maps of the plane (FractalDB, arXiv 2101.08515); `ifs3d`, of space, seen
    from anywhere (ExFractalDB, arXiv 2206.09132, section 3.1); `contour`, rings around a centre (RCDB, section 3.2
    there); `one`, a single system whose classes are small changes of it (arXiv 2408.00677); or `mixed`, classes of the
    first three by turns. `size` is the side in pixels.
    """

    classes: int = 1000
    instances: int = 100
    size: int = 64
    kind: Kind = "ifs"

    def __post_init__(self) -> None:
        require(self.classes >= 2, f"fractals: classes must be at least 2, not {self.classes}")
        require(self.instances >= 2, f"fractals: instances must be at least 2, not {self.instances}")
        require(8 <= self.size <= 1024, f"fractals: size must lie in [8, 1024], not {self.size}")
        count = self.classes * self.instances
        require(count <= MOST, f"fractals: classes × instances must be at most {MOST:,}, and is {count:,}")


def split_fractals(seed: int, held_out: float, settings: FractalSettings) -> Splits:
    """`instances` pictures of each class, and a few more of each to judge by, which follow from `seed`.

    A class is the same whatever the number of classes, an instance whatever the number of instances.
    """
    fewest = max(JUDGED // settings.classes, 1)
    judged = min(max(round(settings.instances * held_out), 1), fewest)
    train = _images(seed, settings, range(settings.instances - judged))
    val = _images(seed, settings, range(settings.instances - judged, settings.instances))
    words = f"{judged} of {settings.instances:,} pictures of each class are held out for validation"
    return Splits(train, val, "builtin:fractals", [f"{settings.classes:,} classes drawn by seed {seed}; {words}"])


def _images(seed: int, settings: FractalSettings, instances: range) -> ImageSet:
    width, digits = len(str(settings.classes - 1)), len(str(settings.instances - 1))
    classes = tuple(f"{number:0{width}}" for number in range(settings.classes))
    names = Names(f"{label}/{instance:0{digits}}.png" for label in classes for instance in instances)
    targets = np.repeat(np.arange(settings.classes), len(instances))
    numbers = (targets << 32) + np.tile(np.array(instances), settings.classes)
    artist = Artist(seed, settings.kind, settings.size)
    return ImageSet(classes, Samples(names, targets, arrays=Drawn(artist, numbers, artist.formula)))


BUILTIN = {"fractals": {"classify": split_fractals}}
OPTIONS = {"fractals": FractalSettings}


class Cloud(NamedTuple):
    """Points of a picture: [parts, points] each way, and the colour of each part, 0 to 255."""

    x: Float32[np.ndarray, "parts points"]
    y: Float32[np.ndarray, "parts points"]
    colours: Int64[np.ndarray, " parts"]

    @property
    def extent(self) -> float:
        """The longer side of the rectangle that they fill."""
        return float(max(self.x.max() - self.x.min(), self.y.max() - self.y.min()))


@dataclass(frozen=True)
class Artist:
    """Draws the instance `number % 2**32` of the class `number >> 32`: the same pixels on every machine.

    Randomness is words of the counter-based Philox. Numbers are computed by operations that IEEE 754 rounds alone in
    one way, one array operation each, so that nothing is fused or summed in another order: no matrix products, no sums
    of fractions, no sines. Directions come from points of a diamond that are divided by their length.
    """

    seed: int
    kind: Kind
    size: int
    formula: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "formula", f"fractals {VERSION} {self.kind} seed={self.seed} size={self.size}")

    def __call__(self, number: int) -> UInt8[np.ndarray, "size size 3"]:
        chosen, instance = number >> 32, number & 0xFFFFFFFF
        kind = list(_KINDS)[chosen % 3] if self.kind == "mixed" else self.kind
        drawn = Numbers(self.seed, list(_KINDS).index(kind), chosen, instance)
        cloud = _KINDS[kind](self.seed, chosen, drawn, self.size**2 + 4096)
        return _painted(cloud, self.size, drawn)


class Numbers:
    """Random numbers that follow from a key, in the order in which they are asked for."""

    def __init__(self, *key: int):
        self._words = np.random.Philox(np.random.SeedSequence(key))

    def uniform(self, *shape: int) -> Float64[np.ndarray, "*shape"]:
        """Numbers in [0, 1)."""
        words = self._words.random_raw(int(np.prod(shape, dtype=np.int64)))
        return ((words >> 11) * 2.0**-53).reshape(shape)

    def whole(self, low: int, high: int, *shape: int) -> Int64[np.ndarray, "*shape"]:
        """Whole numbers from `low` to below `high`."""
        return np.asarray(low + (self.uniform(*shape) * (high - low)).astype(np.int64))

    def bytes(self, count: int) -> UInt8[np.ndarray, " count"]:
        """So many bytes."""
        return self._words.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


# Iterated function systems


class System(NamedTuple):
    """Affine maps [d, d + 1, maps], with the share of the points that each gets, and its colour."""

    maps: Float64[np.ndarray, "d e maps"]
    shares: Float64[np.ndarray, " maps"]
    colours: Int64[np.ndarray, " maps"]


def _system(seed: int, kind: int, chosen: int, dimensions: int) -> System:
    """A contracting system that fills a fair part of its picture.

    Singular values as in arXiv 2110.03091, section 3.2: the sum over maps of the largest plus twice the smallest lies
    between (5 + n) / 2 and (6 + n) / 2 for n maps, where nearly all systems make a rich picture.
    """
    found = None
    for attempt in range(TRIES):
        drawn = Numbers(seed, kind, chosen, OF_CLASS, attempt)
        count = int(drawn.whole(2, 9))
        stretch = 0.15 + 0.85 * drawn.uniform(dimensions, count)
        stretch[1:] *= stretch[:1]
        weight = _in_order([stretch[0, i] + 2 * stretch[-1, i] for i in range(count)])
        stretch = np.minimum(stretch * ((5 + count + float(drawn.uniform())) / 2 / weight), STEEPEST)
        first, second = (_rotations(drawn, dimensions, count) for _ in range(2))
        linear = _times(first * stretch, second)
        shift = 2 * drawn.uniform(dimensions, 1, count) - 1
        volume = np.maximum(_volumes(stretch), 1e-4)
        found = System(
            np.concatenate([linear, shift], axis=1), volume / _in_order(list(volume)), drawn.whole(0, 256, count)
        )
        cloud = _cloud(found, _words(found, 40), np.eye(dimensions)[:2, :, None])
        if _filled(cloud) >= FILLED:
            break
    assert found is not None
    return found


def _in_order(values: list[float]) -> float:
    """Their sum, from the first to the last."""
    total = 0.0
    for value in values:
        total += float(value)
    return total


def _volumes(stretch: Float64[np.ndarray, "d maps"]) -> Float64[np.ndarray, " maps"]:
    volume = stretch[0]
    for more in stretch[1:]:
        volume = volume * more
    return volume


def _rotations(drawn: Numbers, dimensions: int, count: int) -> Float64[np.ndarray, "d d maps"]:
    """Random rotations, in the plane half of them mirrored."""
    if dimensions == 2:
        x, y = _directions(4 * drawn.uniform(count))
        mirrored = np.where(drawn.uniform(count) < 0.5, 1.0, -1.0)
        return np.stack([np.stack([x, -y * mirrored]), np.stack([y, x * mirrored])])
    return _turned(2 * drawn.uniform(4, count) - 1)


def _directions(quarter: Float64[np.ndarray, "*n"]) -> tuple[Float64[np.ndarray, "*n"], Float64[np.ndarray, "*n"]]:
    """Unit vectors by quarter turns, 0 to 4: points of a diamond divided by their length."""
    x = np.abs(quarter - 2) - 1
    y = np.where(quarter < 2, 1.0, -1.0) * (1 - np.abs(x))
    length = np.sqrt(x * x + y * y)
    return x / length, y / length


def _turned(q: Float64[np.ndarray, "4 n"]) -> Float64[np.ndarray, "3 3 n"]:
    """The rotations of space that quaternions stand for, which need not have length one."""
    a, b, c, d = q
    n = a * a + b * b + c * c + d * d + 1e-9
    rows = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a - b * b + c * c - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a - b * b - c * c + d * d],
    ]
    return np.stack([np.stack([cell / n for cell in row]) for row in rows])


def _times(left: Float64[np.ndarray, "i k #n"], right: Float64[np.ndarray, "k j #n"]) -> Float64[np.ndarray, "i j #n"]:
    """Products of matrices that lie along the last axis, summed in one order."""
    products = left[:, :, None] * right[None]
    total = products[:, 0]
    for k in range(1, products.shape[1]):
        total = total + products[:, k]
    return total


def _words(system: System, count: int) -> Int64[np.ndarray, "words letters"]:
    """About so many words of maps that have about equal shares of the picture; short ones end in -1.

    The word with the largest share is prolonged by every map in turn, so that small copies of the picture are not drawn
    more finely than large ones.
    """
    shares = system.shares.tolist()
    heap: list[tuple[float, tuple[int, ...]]] = [(-share, (letter,)) for letter, share in enumerate(shares)]
    heapq.heapify(heap)
    while len(heap) < count:
        share, word = heapq.heappop(heap)
        for letter, more in enumerate(shares):
            heapq.heappush(heap, (share * more, (*word, letter)))
    words = sorted(word for _, word in heap)
    longest = max(map(len, words))
    return np.array([word + (-1,) * (longest - len(word)) for word in words])


def _cloud(system: System, words: Int64[np.ndarray, "words letters"], view: Float64[np.ndarray, "2 d 1"]) -> Cloud:
    """Points of the system's attractor: each word of maps applied to each of the points that the words lead to."""
    dimensions = len(system.maps)
    idle = np.eye(dimensions, dimensions + 1)[:, :, None]  # the last one, where -1 leads: nothing happens
    maps = np.concatenate([system.maps, idle], axis=2)
    copies = maps[:, :, words[:, 0]]
    for letters in words.T[1:]:
        step = maps[:, :, letters]
        moved = _times(copies[:, :-1], step)
        moved[:, -1] += copies[:, -1]
        copies = moved
    points = copies[:, -1]  # where the origin is led; again through all words, to come close to the attractor
    for _ in range(2):
        points = _times(copies[:, :-1], points[:, None])[:, 0] + copies[:, -1]
        points = points[:, ::-1]
    seen, points = _times(view, copies).astype(np.float32), points.astype(np.float32)
    x, y = (_moved(row, points) for row in seen)
    return Cloud(x, y, system.colours[words[:, 0]])


def _moved(
    row: Float32[np.ndarray, "e words"], points: Float32[np.ndarray, "d points"]
) -> Float32[np.ndarray, "words points"]:
    moved = row[0][:, None] * points[0]
    for cell, coordinate in zip(row[1:-1], points[1:], strict=True):
        moved += cell[:, None] * coordinate
    moved += row[-1][:, None]
    return moved


def _filled(cloud: Cloud) -> float:
    """The share of the cells of a coarse grid over the picture in which there are points."""
    columns, rows = (_placed(values, COARSE, 1.0, 0.0, cloud.extent) for values in (cloud.x, cloud.y))
    return len(np.unique(rows * COARSE + columns)) / COARSE**2


@lru_cache(maxsize=4096)
def _known_system(seed: int, kind: int, chosen: int, dimensions: int, count: int) -> tuple[System, np.ndarray]:
    system = _system(seed, kind, chosen, dimensions)
    return system, _words(system, count)


def _varied(system: System, drawn: Numbers, most: float) -> System:
    """The system with each number of its maps changed by a factor of 1 ± `most`."""
    factors = 1 + most * (2 * drawn.uniform(*system.maps.shape) - 1)
    return system._replace(maps=system.maps * factors)


def _ifs(seed: int, chosen: int, drawn: Numbers, points: int) -> Cloud:
    system, words = _known_system(seed, 0, chosen, 2, _parts(points))
    x, y = _directions(np.mod(4 + 0.3 * (2 * drawn.uniform(1) - 1), 4))
    view = np.stack([np.stack([y, -x]), np.stack([x, y])])  # a quarter turn and up to a twelfth of a turn either way
    return _cloud(_varied(system, drawn, 0.1), words, view)


def _ifs3d(seed: int, chosen: int, drawn: Numbers, points: int) -> Cloud:
    system, words = _known_system(seed, 1, chosen, 3, _parts(points))
    return _cloud(system, words, _turned(2 * drawn.uniform(4, 1) - 1)[:2])


def _one(seed: int, chosen: int, drawn: Numbers, points: int) -> Cloud:
    system, words = _known_system(seed, 3, 0, 2, _parts(points))
    changed = _varied(system, Numbers(seed, 3, chosen, 2 * OF_CLASS), 0.15)
    return _cloud(changed, words, np.eye(2)[:, :, None])


def _parts(points: int) -> int:
    return int(np.sqrt(points))


# Contours


def _contour(seed: int, chosen: int, drawn: Numbers, points: int) -> Cloud:
    """Rings of the class's number, corners and waviness; each instance waves in its own way."""
    of_class = Numbers(seed, 2, chosen, OF_CLASS)
    corners, rings = int(of_class.whole(3, 41)), int(of_class.whole(2, 17))
    inner, across, roughness = (float(of_class.uniform()) for _ in range(3))
    shape = 1 + 0.6 * roughness * (2 * of_class.uniform(corners) - 1)
    wave = 1 + 0.1 * roughness * (2 * drawn.uniform(rings, corners) - 1)
    steps = np.arange(rings)[:, None] / rings
    radius = (0.1 + 0.5 * inner + (0.9 - 0.5 * inner) * steps) * shape * wave
    x, y = _directions(np.mod(4 * np.arange(corners) / corners + float(of_class.uniform()), 4))
    x, y = radius * x, radius * y * (0.4 + 0.6 * across)
    between = np.arange(max(points // (rings * corners), 2)) / max(points // (rings * corners), 2)

    def along(corner: Float64[np.ndarray, "rings corners"]) -> Float32[np.ndarray, "rings points"]:
        edges = np.roll(corner, -1, axis=1) - corner
        return (corner[:, :, None] + edges[:, :, None] * between).reshape(rings, -1).astype(np.float32)

    colours = np.arange(rings) * 255 // rings
    return Cloud(along(x), along(y), colours)


_KINDS: dict[str, Callable[[int, int, Numbers, int], Cloud]] = {
    "ifs": _ifs,
    "ifs3d": _ifs3d,
    "contour": _contour,
    "one": _one,
}


# From points to pixels


def _placed(
    values: Float32[np.ndarray, "parts points"], side: int, share: float, place: float, extent: float
) -> Int32[np.ndarray, "parts points"]:
    """Rows or columns of a picture, of whose side an `extent` takes that share."""
    low, high = float(values.min()), float(values.max())
    scale = (side - 1) * share / max(extent, 1e-12)
    left = ((side - 1) - (high - low) * scale) * place
    values = values - np.float32(low)
    values *= np.float32(scale)
    values += np.float32(left + 0.5)
    return values.astype(np.int32)


def _painted(cloud: Cloud, size: int, drawn: Numbers) -> UInt8[np.ndarray, "size size 3"]:
    """The cloud in colours that vary with its parts and its density, before a soft ground with some noise."""
    share, right, down = 0.6 + 0.4 * float(drawn.uniform()), float(drawn.uniform()), float(drawn.uniform())
    extent = cloud.extent
    columns, rows = _placed(cloud.x, size, share, right, extent), _placed(cloud.y, size, share, down, extent)
    cells = (rows * size + columns).ravel()
    counts = np.bincount(cells, minlength=size * size)
    colours = np.repeat(cloud.colours.astype(np.float64), cloud.x.shape[1])
    summed = np.bincount(cells, weights=colours, minlength=size * size)  # of whole numbers, so exact
    mean = (summed / np.maximum(counts, 1)).astype(np.int64)
    usual, density = len(cells) // np.count_nonzero(counts), np.arange(256)
    cover = (256 * density // (density + 1 + usual // 4)).astype(np.uint16)[np.minimum(counts, 255), None]
    palette, ground = _palette(drawn), _ground(size, drawn)
    ground *= 256 - cover
    ground += palette[mean] * cover
    picture = (ground >> 8).astype(np.uint8).reshape(size, size, 3)
    return picture if drawn.uniform() < 0.5 else 255 - picture


def _palette(drawn: Numbers) -> UInt16[np.ndarray, "256 3"]:
    """256 bright colours that go over into each other, from four drawn ones."""
    ends = drawn.whole(90, 256, 4, 3)
    place = np.arange(256) * 3
    left, part = place >> 8, (place & 255)[:, None]
    return ((ends[left] * (256 - part) + ends[left + 1] * part) >> 8).astype(np.uint16)


def _ground(size: int, drawn: Numbers) -> UInt16[np.ndarray, "cells 3"]:
    """Dark colours, from one drawn in each corner, with noise."""
    corners = drawn.whole(0, 90, 2, 2, 3).astype(np.uint16)
    along = (np.arange(size) * 256 // size).astype(np.uint16)[:, None]
    top, bottom = (((row[0] * (256 - along)) + row[1] * along) >> 8 for row in corners)
    plain = (top * (256 - along[:, :, None]) + bottom * along[:, :, None]) >> 8
    noise = drawn.bytes(size * size * 3).reshape(plain.shape) * np.uint16(drawn.whole(0, 40))
    noise >>= 8
    noise += plain
    return noise.reshape(-1, 3)
