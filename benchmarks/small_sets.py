"""Small image sets, unlike each other, for experiments on learning from little: each is written as a folder.

    python benchmarks/small_sets.py FOLDER [--seed 0] [--only NAME]

Everything is drawn here or cut from what scikit-learn and scikit-image carry; the same seed makes the same files.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Picture = Image.Image
Draw = Callable[[np.random.Generator, str], Picture]

PHOTOGRAPHS = [
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "ihc",
    "moon",
    "motorcycle_left",
    "page",
    "retina",
    "rocket",
    "text",
]


def digits(seed: int) -> Iterator[tuple[str, str, Picture]]:
    """1,797 handwritten digits of 8×8 grey pixels in ten classes; a fifth is held out."""
    from sklearn.datasets import load_digits

    random, found = np.random.default_rng(seed), load_digits()
    held = random.permutation(len(found.target)) < len(found.target) // 5
    for image, target, out in zip(found.images, found.target, held, strict=True):
        yield ("val" if out else "train"), str(target), Image.fromarray((image * 255 / 16).astype(np.uint8))


def photographs(seed: int) -> Iterator[tuple[str, str, Picture]]:
    """Which photograph a crop of 64×64 pixels is from: 16 classes; crops of the right third are held out."""
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    for number, name in enumerate(PHOTOGRAPHS):
        random = np.random.default_rng([seed, number])
        with Image.open(next(folder.glob(f"{name}.*"))) as image:
            whole = image.convert("RGB")
        if min(whole.size) > 600:
            whole.thumbnail((900, 900))
        width, height = whole.size
        border = int(width * 0.64)
        for part, count, left, right in (("train", 60, 0, border), ("val", 25, border, width)):
            for _ in range(count):
                side = int(random.integers(60, 110)) if right - left > 120 and height > 120 else 60
                x, y = random.integers(left, right - side + 1), random.integers(0, height - side + 1)
                yield part, name, whole.crop((x, y, x + side, y + side)).resize((64, 64), Image.Resampling.BICUBIC)


def _drawn(names: list[str], train: int, val: int, draw: Draw) -> Callable[[int], Iterator[tuple[str, str, Picture]]]:
    def made(seed: int) -> Iterator[tuple[str, str, Picture]]:
        for place, name in enumerate(names):
            random = np.random.default_rng([seed, place])
            for part, count in (("train", train), ("val", val)):
                for _ in range(count):
                    yield part, name, draw(random, name)

    return made


def _ground(random: np.random.Generator, width: int, height: int) -> Picture:
    """A background of a soft colour gradient under noise."""
    corners = (random.integers(40, 150) + random.integers(-40, 41, (2, 2, 3))).astype(np.uint8)
    plane = np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR), dtype=float)
    return Image.fromarray((plane + random.normal(0, 14, plane.shape)).clip(0, 255).astype(np.uint8))


def _colour(random: np.random.Generator, lowest: int = 0) -> tuple[int, int, int]:
    r, g, b = random.integers(lowest, 256, 3).tolist()
    return r, g, b


def _outline(name: str) -> np.ndarray:
    """The corners of a shape around the origin, [n, 2], within radius one."""
    turn = 2 * np.pi * np.arange(100) / 100

    def polygon(n: int, inner: float = 1.0) -> np.ndarray:
        count = n if inner == 1 else 2 * n
        angle = 2 * np.pi * np.arange(count) / count
        radius = np.where(np.arange(count) % 2 == 0, 1.0, inner)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

    return {
        "circle": lambda: np.stack([np.cos(turn), np.sin(turn)], axis=1),
        "ellipse": lambda: np.stack([np.cos(turn), 0.5 * np.sin(turn)], axis=1),
        "triangle": lambda: polygon(3),
        "square": lambda: polygon(4),
        "pentagon": lambda: polygon(5),
        "bar": lambda: np.array([[-1, -0.25], [1, -0.25], [1, 0.25], [-1, 0.25]]),
        "cross": lambda: (
            np.array(
                [
                    [1, 3],
                    [1, 1],
                    [3, 1],
                    [3, -1],
                    [1, -1],
                    [1, -3],
                    [-1, -3],
                    [-1, -1],
                    [-3, -1],
                    [-3, 1],
                    [-1, 1],
                    [-1, 3],
                ]
            )
            / 3.2
        ),
        "star": lambda: polygon(5, 0.42),
        "heart": lambda: np.stack(
            [np.sin(turn) ** 3, -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn)) / 16], axis=1
        ),
        "moon": lambda: np.concatenate(
            [
                np.stack([np.cos(turn[12:88]), np.sin(turn[12:88])], axis=1),
                np.stack([0.45 + 0.75 * np.cos(turn[85:15:-1]), 0.75 * np.sin(turn[85:15:-1])], axis=1),
            ]
        ),
    }[name]()


def _shape(random: np.random.Generator, name: str) -> Picture:
    """A bright shape of any colour, size and place, somewhat turned, before a coloured ground, 80×48 pixels."""
    width, height, scale = 80, 48, 4
    image = _ground(random, width, height)
    large = image.resize((width * scale, height * scale), Image.Resampling.NEAREST)
    radius = random.uniform(9, 20)
    x, y = random.uniform(radius, width - radius), random.uniform(radius, height - radius)
    angle = random.normal(0, 0.35)
    spin = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (_outline(name) @ spin.T * radius + (x, y)) * scale
    ImageDraw.Draw(large).polygon([tuple(corner) for corner in corners.tolist()], fill=_colour(random, 150))
    return large.resize((width, height), Image.Resampling.BOX)


def _letter(random: np.random.Generator, name: str) -> Picture:
    """A slanted letter of a plain face, 32×32 grey pixels; several are each other's mirror images."""
    size = int(random.integers(30, 50))
    canvas = Image.new("L", (96, 96), 0)
    ImageDraw.Draw(canvas).text((48, 48), name, fill=255, font=ImageFont.load_default(size), anchor="mm")
    turn = canvas.rotate(random.normal(0, 9), Image.Resampling.BICUBIC)
    shear, (dx, dy) = random.normal(0, 0.15), random.uniform(-9, 9, 2)
    moved = turn.transform((96, 96), Image.Transform.AFFINE, (1, shear, dx - 48 * shear, 0, 1, dy))
    small = np.asarray(moved.resize((32, 32), Image.Resampling.BOX), dtype=float)
    ink, paper = random.uniform(110, 255), random.uniform(0, 80)
    noisy = paper + (ink - paper) * small / 255 + random.normal(0, 18, small.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _spiral(random: np.random.Generator, name: str) -> Picture:
    """A pattern of waves or arms, 56×56 pixels: only their sense of turning tells half of the classes apart."""
    side = 56
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    x, y = x - random.uniform(-0.12, 0.12), y - random.uniform(-0.12, 0.12)
    radius, angle, phase = np.hypot(x, y), np.arctan2(y, x), random.uniform(0, 2 * np.pi)
    rate = random.uniform(18, 26)
    kinds = {
        "left": 2 * angle - rate * radius,
        "right": 2 * angle + rate * radius,
        "rings": rate * 1.4 * radius,
        "rays": 7 * angle,
        "rising": rate * (x + y) * 1.2,
        "falling": rate * (x - y) * 1.2,
    }
    wave = 0.5 + 0.5 * np.cos(kinds[name] + phase)
    first, second = (np.array(_colour(random)) for _ in range(2))
    plane = wave[..., None] * first + (1 - wave[..., None]) * second + random.normal(0, 20, (side, side, 3))
    return Image.fromarray(plane.clip(0, 255).astype(np.uint8))


def _dots(random: np.random.Generator, name: str) -> Picture:
    """So many bright dots of any colour and size before a ground, 96×96 pixels."""
    side, placed = 96, list[Any]()
    image = _ground(random, side, side)
    draw = ImageDraw.Draw(image)
    while len(placed) < int(name):
        r = random.uniform(5, 11)
        x, y = random.uniform(r, side - r, 2)
        if all(np.hypot(x - a, y - b) > r + c + 3 for a, b, c in placed):
            placed.append((x, y, r))
            draw.ellipse((x - r, y - r, x + r, y + r), fill=_colour(random, 150))
    return image


SETS: dict[str, Callable[[int], Iterator[tuple[str, str, Picture]]]] = {
    "digits": digits,
    "photographs": photographs,
    "shapes": _drawn(
        ["circle", "ellipse", "triangle", "square", "pentagon", "bar", "cross", "star", "heart", "moon"],
        120,
        50,
        _shape,
    ),
    "letters": _drawn([chr(97 + i) for i in range(26)], 40, 20, _letter),
    "spirals": _drawn(["left", "right", "rings", "rays", "rising", "falling"], 40, 60, _spiral),
    "dots": _drawn(["1", "2", "3", "4", "5", "6"], 150, 60, _dots),
}


def write(name: str, folder: Path, seed: int = 0) -> Path:
    """Writes a set as `folder/PART/CLASS/NUMBER.png` and returns the folder."""
    for number, (part, label, image) in enumerate(SETS[name](seed)):
        file = folder / part / label / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    return folder


def main() -> None:
    """Writes the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SETS)
    request = parser.parse_args()
    for name in [request.only] if request.only else SETS:
        print(write(name, request.folder / name, request.seed))


if __name__ == "__main__":
    main()
