"""Whether an exported program answers as `predict` does: image files through both, from the file to the answer."""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sightline.errors import UserError, WorkError, printable
from sightline.images.decode import decode
from sightline.inference.outputs import Arrays, Outputs
from sightline.inference.predictor import Answer, Predictor
from sightline.inference.runtimes import Runtime
from sightline.types import each

TOLERANCE = 1e-4
"""By how much a logit may differ in fp32; a box, in parts of the picture's longer side."""

SIZES = {
    "one-pixel.png": (1, 1),
    "line.png": (1, 500),
    "column.png": (701, 1),
    "tiny.png": (3, 5),
    "panorama.jpg": (61, 1201),
    "tower.jpg": (997, 83),
    "upright.jpg": (389, 257),
    "wide.png": (211, 353),
    "square.png": (224, 224),
    "grey.png": (131, 173),
    "dark.png": (97, 89),
    "turned.jpg": (149, 271),
    "big.jpg": (1511, 1999),
}
"""Pictures that are made on the spot, with their (height, width)."""


@dataclass(frozen=True)
class Agreement:
    """How far a program and `predict` agree: on how many pictures, the share of equal choices, the largest difference.

    `ties` counts choices that differ where the two best are nearer to one another than twice the tolerance.
    """

    pictures: int
    top1: float
    difference: float
    worst: str
    ties: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))

    def describe(self) -> str:
        """One line for people."""
        ties = f" ({self.ties} ties apart)" if self.ties else ""
        return (
            f"{self.pictures} pictures from file to answer: top-1 agreement {self.top1:.2%}{ties}, "
            f"largest difference {self.difference:.1e} ({printable(self.worst)})"
        )


def draw_pictures(folder: Path) -> list[Path]:
    """Writes pictures of odd sizes into a folder: waves, edges and noise, so that every kernel shows itself."""
    paths = []
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(y / rng.uniform(2, 40) + x / rng.uniform(2, 40) + rng.uniform(0, 6)) for _ in range(3)]
        image = 128 + 70 * np.stack(waves, axis=-1) + rng.normal(0, 25, (height, width, 3))
        image[(y // 17 + x // 29) % 5 == 0] += rng.uniform(-120, 120, 3)
        image = np.clip(image * (0.2 if name.startswith("dark") else 1), 0, 255).astype(np.uint8)
        picture = Image.fromarray(image).convert("L" if name.startswith("grey") else "RGB")
        exif = Image.Exif()
        if name.startswith("turned"):
            exif[0x0112] = 6
        picture.save(folder / name, exif=exif)
        paths.append(folder / name)
    return paths


def photographs() -> list[Path]:
    """The two photographs that come with scikit-learn, where it is installed."""
    found = importlib.util.find_spec("sklearn")
    folders = found.submodule_search_locations if found else None
    return [path for folder in folders or () for path in sorted(Path(folder, "datasets", "images").glob("*.jpg"))]


def judge(
    runtime: Runtime,
    predictor: Predictor,
    outputs: Outputs,
    pictures: Iterable[Path],
    *,
    prepared: bool = False,
    tolerance: float = TOLERANCE,
) -> Agreement:
    """How far the answers agree on image files; `prepared` programs are given pixels that are ready.

    Raises WorkError that names the first picture whose answer is another one, UserError for one that cannot be read.
    """
    count, equal, decided, ties, largest, worst = 0, 0, 0, 0, 0.0, ""
    for path, size, expected, found, margins in _both(runtime, predictor, outputs, pictures, prepared):
        difference, what = _difference(expected, found, outputs, max(size))
        if count == 0 or difference > largest:
            largest, worst = difference, path.name
        if not difference <= tolerance:
            raise WorkError(
                f"the exported program is not the model: on {printable(path.name)} its {what} differ by "
                f"{difference:.2g} from those of predict, and at most {tolerance:g} is allowed; nothing was written"
            )
        unequal = np.asarray(outputs.chosen(expected) != outputs.chosen(found))
        if unequal.any() and margins(unequal).max() > 2 * tolerance:
            raise WorkError(
                f"the exported program is not the model: on {printable(path.name)} it chooses otherwise than predict "
                f"in {int(unequal.sum())} of {unequal.size} places; nothing was written"
            )
        count, ties = count + 1, ties + int(unequal.sum())
        equal, decided = equal + int((~unequal).sum()), decided + unequal.size
    return Agreement(count, equal / max(decided, 1), largest, worst, ties)


def _both(
    runtime: Runtime, predictor: Predictor, outputs: Outputs, pictures: Iterable[Path], prepared: bool
) -> Iterator[tuple[Path, tuple[int, int], Arrays, Arrays, Callable[[np.ndarray], np.ndarray]]]:
    """Of each picture its size, both answers, and how clear a choice is where that is asked."""
    for path in pictures:
        ready = predictor.prepare(path)
        if isinstance(ready, Answer):
            raise UserError(f"{printable(path)}: {ready.error}")
        place, output = ready.place, predictor.compute([ready], features=False)
        expected = _named(outputs.names, outputs.expected(output, place))
        if prepared:
            batch = runtime.run(np.stack([ready.pixels.numpy()] * 3))
            rows = iter([torch.from_numpy(batch[name][-1:]) for name in outputs.plain])
            found = _named(outputs.names, outputs.expected(each(output, lambda _, rows=rows: next(rows)), place))
        else:
            found = runtime.run(decode(path))
        yield path, place.size, expected, found, partial(outputs.margins, expected, place)


def _named(names: tuple[str, ...], values: tuple[Tensor, ...]) -> Arrays:
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def _difference(expected: Arrays, found: Arrays, outputs: Outputs, side: int) -> tuple[float, str]:
    """The largest difference of numbers, and whose it is; infinite for arrays of another shape or kind."""
    differences = {}
    for name, ours in expected.items():
        theirs = found[name]
        if ours.shape != theirs.shape or ours.dtype.kind != theirs.dtype.kind:
            return math.inf, name
        if ours.dtype.kind == "f":
            unit = side if name in outputs.per_pixel else 1
            differences[name] = float(np.abs(ours - theirs).max(initial=0)) / unit
            if not math.isfinite(differences[name]):
                return math.inf, name
    name = max(differences, key=lambda key: differences[key])
    return differences[name], name
