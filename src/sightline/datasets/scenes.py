"""Drawn scenes with exact boxes, masks and captions: shapes of many colours, sizes and turns on textured grounds.

They are drawn, not stored, so that there are as many as are wanted; a scene is a function of a seed and its number.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.marks import Objects, Scene
from sightline.datasets.split import Splits
from sightline.schema import require

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 46, 40),
    "green": (58, 158, 62),
    "blue": (44, 88, 206),
    "yellow": (240, 200, 40),
    "purple": (146, 60, 176),
    "white": (240, 240, 238),
}
Pair = tuple[str, str]
"""A colour and a shape."""

PAIRS: tuple[Pair, ...] = tuple((colour, shape) for shape in SHAPES for colour in COLOURS)

UNSEEN: tuple[Pair, ...] = (
    *(("red", "circle"), ("red", "star")),
    *(("green", "square"), ("green", "circle")),
    *(("blue", "star"), ("blue", "square")),
)
"""What captioned scenes do not show, though every colour and every shape is in them: whoever knows what words mean can
still find it. Three colours and three shapes, each twice, so that neither alone tells one pair from the others."""

SIZE = 64
"""Rows and columns of a scene."""

HELD_OUT = 500
"""Scenes of `builtin:scenes` that are judged by."""

MOST = 5
"""Objects in a scene, at most."""

MOST_IMAGES = 1_000_000
"""Scenes to learn from, at most."""

SINGLE, SINGLE_HELD_OUT = 50, 20
"""Images of each pair in `builtin:objects`."""

VISIBLE = 0.4
"""Share of an object that nothing may cover."""

_FINE = 4  # shapes are drawn so many times as large and averaged down, which makes their edges smooth


def scene(
    seed: int, number: int, *, size: int = SIZE, most: int = MOST, pairs: Collection[Pair] = PAIRS
) -> tuple[UInt8[np.ndarray, "h w 3"], Scene]:
    """One scene and what is in it: pixels [size, size, 3], and 1 to `most` objects of the classes `SHAPES`.

    Boxes are those of the visible pixels. Objects cover one another, but none so that less than `VISIBLE` of it shows.
    `pairs` are the colours and shapes that there are, at least one.
    """
    shapes = [shape for shape in SHAPES if any(shape == one for _, one in pairs)]
    random = np.random.default_rng([seed, number, size])
    picture = _ground(random, size)
    owner = np.full((size, size), -1)
    found: list[tuple[int, str, int, float]] = []  # class, colour, whole area, radius
    for _ in range(random.integers(1, most + 1)):
        shape = shapes[int(random.integers(len(shapes)))]
        kind, colour = SHAPES.index(shape), str(random.choice([c for c in COLOURS if (c, shape) in pairs]))
        radius = size * random.uniform(0.1, 0.26)
        middle = random.uniform(0.8 * radius, size - 0.8 * radius, 2)
        cover = _shape(shape, middle, radius, random.uniform(0, 2 * math.pi), size)
        inside = cover >= 0.5
        covered = owner.copy()
        covered[inside] = len(found)
        whole = [area for *_, area, _ in found] + [int(inside.sum())]
        shown = [int((covered == i).sum()) for i in range(len(whole))]
        if min(whole) == 0 or any(s < VISIBLE * w for s, w in zip(shown, whole, strict=True)):
            continue
        shade = np.clip(np.array(COLOURS[colour]) + random.normal(0, 10, 3) + random.normal(0, 8), 0, 255)
        light = 1 + 0.12 * np.linspace(-1, 1, size)[:, None] * random.choice([-1, 1])
        picture += (shade * light[..., None] - picture) * cover[..., None]
        owner = covered
        found.append((kind, colour, whole[-1], radius))
    picture += random.normal(0, 4, picture.shape)
    kinds = [kind for kind, *_ in found]
    boxes = [_box(owner == i) for i in range(len(found))]
    plain = Objects.of(kinds, boxes)
    area = np.array([(owner == i).sum() for i in range(len(found))], dtype=np.float32)
    mask = np.concatenate([[0], np.array(kinds, dtype=np.int64) + 1])[owner + 1].astype(np.uint8)
    objects = Objects(plain.labels, plain.boxes, plain.crowd, area)
    colours = tuple(colour for _, colour, *_ in found)
    caption = _caption([(SHAPES[kind], colour, radius / size) for kind, colour, _, radius in found])
    return np.clip(picture, 0, 255).astype(np.uint8), Scene(objects, mask, colours, caption)


def _ground(random: np.random.Generator, size: int) -> np.ndarray:
    """A muted texture: clouds of two grains, and stripes over some."""
    base = random.uniform(60, 190, 3)
    picture = np.tile(base, (size, size, 1))
    for cells, strength in ((random.integers(2, 5), 34), (random.integers(8, 20), 16)):
        noise = Image.fromarray(random.normal(0, 1, (int(cells), int(cells))).astype(np.float32))
        cloud = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
        picture += strength * cloud[..., None] * random.uniform(0.5, 1.0, 3)
    if random.random() < 0.4:
        turn, period = random.uniform(0, math.pi), random.uniform(5, 14)
        rows, columns = np.mgrid[:size, :size]
        wave = np.sin(2 * math.pi * (rows * math.sin(turn) + columns * math.cos(turn)) / period)
        picture += 14 * wave[..., None]
    grey = picture.mean(axis=2, keepdims=True)
    return grey + 0.35 * (picture - grey)  # the colours are those of the objects


def _shape(name: str, middle: np.ndarray, radius: float, turn: float, size: int) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1."""
    canvas = Image.new("L", (size * _FINE, size * _FINE))
    draw, at = ImageDraw.Draw(canvas), middle * _FINE
    if name == "circle":
        r = 0.9 * radius * _FINE
        draw.ellipse([*(at - r), *(at + r)], fill=255)
    else:
        angles, lengths = _outline(name)
        reach = radius * _FINE * lengths
        points = np.stack([at[0] + reach * np.cos(angles + turn), at[1] + reach * np.sin(angles + turn)], axis=1)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    return np.asarray(canvas.reduce(_FINE), dtype=np.float64) / 255


@lru_cache
def _outline(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The corners of a shape as angles and distances from its middle, the farthest at 1."""
    if name == "star":
        return np.arange(10) * math.pi / 5, np.where(np.arange(10) % 2, 0.45, 1.0)
    if name == "cross":
        arm, wide = 0.95, 0.32
        corners = [(arm, wide), (wide, wide), (wide, arm), (-wide, arm), (-wide, wide), (-arm, wide)]
        corners = np.array([*corners, *[(-x, -y) for x, y in corners]])
        return np.arctan2(corners[:, 1], corners[:, 0]), np.hypot(corners[:, 0], corners[:, 1])
    count = {"triangle": 3, "square": 4}[name]
    return np.arange(count) * 2 * math.pi / count, np.ones(count)


def _box(inside: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _caption(objects: Sequence[tuple[str, str, float]]) -> str:
    """What a person would say of the scene, the largest object first."""
    words = []
    for name, colour, radius in sorted(objects, key=lambda one: -one[2]):
        size = "large" if radius > 0.2 else "small" if radius < 0.15 else "middle-sized"
        words.append(f"a {size} {colour} {name}")
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@dataclass(frozen=True)
class SceneSettings:
    """What `builtin:scenes:NAME=VALUE,…` may say. Raises UserError for values out of range.

    `images` are to learn from, `objects` is the most that there are in one, and `size` the side in pixels.
    """

    images: int = 4_000
    objects: int = MOST
    size: int = SIZE

    def __post_init__(self) -> None:
        for name, least, most in (("images", 2, MOST_IMAGES), ("objects", 1, 12), ("size", 32, 512)):
            value = getattr(self, name)
            require(least <= value <= most, f"scenes: {name} must lie in [{least}, {most:,}], not {value:,}")
        pixels = self.images * self.size**2
        require(pixels <= 2**32, f"scenes: {self.images:,} of {self.size}×{self.size} are more than memory may hold")


@lru_cache(maxsize=2)
def _drawn(seed: int, first: int, last: int, size: int, most: int, pairs: tuple[Pair, ...]) -> Samples:
    found = [scene(seed, number, size=size, most=most, pairs=pairs) for number in range(first, last)]
    names = Names(f"{number:06}.png" for number in range(first, last))
    arrays, marks = [picture for picture, _ in found], [marks for _, marks in found]
    return Samples(names, np.full(len(found), -1), arrays=arrays, marks=marks)


def scenes(
    seed: int,
    numbers: range,
    classes: tuple[str, ...] = SHAPES,
    *,
    size: int = SIZE,
    most: int = MOST,
    pairs: tuple[Pair, ...] = PAIRS,
) -> ImageSet:
    """The scenes of these numbers as a set; what is marked in each is a `Scene`."""
    return ImageSet(classes, _drawn(seed, numbers.start, numbers.stop, size, most, pairs))


def _split(classes: tuple[str, ...], unseen: Collection[Pair] = ()) -> Callable[..., Splits]:
    pairs = tuple(pair for pair in PAIRS if pair not in unseen)

    def split(seed: int, held_out: float, told: SceneSettings) -> Splits:
        """Scenes to learn from, and 500 others to judge by, whatever share is held out of sets that are given."""
        notes = [f"{told.images:,} scenes are drawn to learn from and {HELD_OUT} others to judge by, by seed {seed}"]
        if unseen:
            names = ", ".join(" ".join(pair) for pair in unseen)
            notes.append(f"in none of them is a {names}: `evaluate MODEL builtin:objects:pairs=unseen` asks for these")
        # Those to judge by come first: they are the same ones however many there are to learn from.
        parts = range(HELD_OUT, HELD_OUT + told.images), range(HELD_OUT)
        train, val = (scenes(seed, p, classes, size=told.size, most=told.objects, pairs=pairs) for p in parts)
        return Splits(train, val, "builtin:scenes", notes, drawn=True)

    return split


@dataclass(frozen=True)
class ObjectSettings:
    """What `builtin:objects:NAME=VALUE,…` may say.

    `pairs` are the colours with shapes that there are images of, and `choices` those that are classes: the same, or
    all thirty.
    """

    pairs: Literal["all", "seen", "unseen"] = "all"
    choices: Literal["pairs", "all"] = "pairs"


@lru_cache(maxsize=2)
def _single(seed: int, first: int, each: int, pairs: tuple[Pair, ...], choices: tuple[Pair, ...]) -> Samples:
    """Images of one object each, of every pair equally many; their classes count among the choices."""
    shown = [(first + i * len(PAIRS) + PAIRS.index(pair), pair) for pair in pairs for i in range(each)]
    names = Names(f"{number:06}.png" for number, _ in shown)
    arrays = [scene(seed, number, most=1, pairs=(pair,))[0] for number, pair in shown]
    return Samples(names, np.array([choices.index(pair) for _, pair in shown]), arrays=arrays)


def _objects(seed: int, held_out: float, told: ObjectSettings) -> Splits:
    """Scenes of one object, whose class is its colour and its shape."""
    chosen = {"all": PAIRS, "seen": tuple(pair for pair in PAIRS if pair not in UNSEEN), "unseen": UNSEEN}
    pairs = chosen[told.pairs]
    choices = PAIRS if told.choices == "all" else pairs
    first = MOST_IMAGES + HELD_OUT  # behind those of scenes, so that no ground is in both
    val = _single(seed, first, SINGLE_HELD_OUT, pairs, choices)
    train = _single(seed, first + SINGLE_HELD_OUT * len(PAIRS), SINGLE, pairs, choices)
    notes = [f"{len(train)} images to learn from and {len(val)} others to judge by are drawn by seed {seed}"]
    classes = tuple(" ".join(pair) for pair in choices)
    return Splits(ImageSet(classes, train), ImageSet(classes, val), "builtin:objects", notes, drawn=True)


BUILTIN = {
    "scenes": {"detect": _split(SHAPES), "segment": _split(("background", *SHAPES)), "clip": _split(SHAPES, UNSEEN)},
    "objects": {"classify": _objects, "clip": _objects},
}
OPTIONS = {"scenes": SceneSettings, "objects": ObjectSettings}
