"""Whether an exported program answers as `predict` does: image files through both, from the file to the answer."""

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sightline.errors import UserError, WorkError, printable
from sightline.images.decode import decode
from sightline.inference.outputs import Arrays, Outputs, outputs_of
from sightline.inference.predictor import Answer, Predictor, Ready
from sightline.inference.runtimes import Runtime
from sightline.types import Placement, each

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
    tally = Tally(outputs, tolerance)
    for path, place, expected, found in _both(runtime, predictor, outputs, pictures, prepared):
        if amiss := tally.add(path.name, place, expected, found):
            raise WorkError(f"the exported program is not the model: {amiss}; nothing was written")
    return tally.agreement


def agree(ours: Predictor, other: Predictor, images: Sequence[Ready], tolerance: float, *, relative: bool) -> Agreement:
    """How far another way to compute the same model agrees with `ours` on images of one size, in batches as they come.

    A logit may differ by `tolerance`, which is `relative` to the distance of the largest and the smallest of its image
    or a plain number. Raises WorkError that names the first image that differs by more.
    """
    outputs = outputs_of(ours.network.architecture.task)
    tally = Tally(outputs, tolerance, relative)
    for start in range(0, len(images), ours.batch_size):
        batch = images[start : start + ours.batch_size]
        both = [predictor.compute(batch, features=False) for predictor in (ours, other)]
        for i, image in enumerate(batch):
            alone = (each(output, lambda values, i=i: values[i : i + 1]) for output in both)
            expected, found = (_named(outputs.names, outputs.expected(output, image.place)) for output in alone)
            if amiss := tally.add(image.path, image.place, expected, found):
                raise WorkError(amiss)
    return tally.agreement


class Tally:
    """Counts how far pairs of answers of one task agree, and says what is amiss with the first that do not."""

    def __init__(self, outputs: Outputs, tolerance: float, relative: bool = False):
        self.outputs, self.tolerance, self.relative = outputs, tolerance, relative
        self.agreement = Agreement(0, 1.0, 0.0, "")
        self._equal, self._decided = 0, 0

    def add(self, name: str, place: Placement, expected: Arrays, found: Arrays) -> str | None:
        """Takes the two answers for one picture; words for what is amiss, None where nothing is."""
        units = {key: max(place.size) if key in self.outputs.per_pixel else 1.0 for key in expected}
        if self.relative:
            units["logits"] = float(np.ptp(expected["logits"])) or 1.0
        difference, what = _difference(expected, found, units)
        before = self.agreement
        if not difference <= self.tolerance:
            allowed = f"{self.tolerance:g} is allowed" + (" of their range" if self.relative else "")
            return (
                f"on {printable(name)} its {what} differ by {difference:.2g} from those of predict, "
                f"and at most {allowed}"
            )
        unequal = np.asarray(self.outputs.chosen(expected) != self.outputs.chosen(found))
        near = 2 * self.tolerance * (units["logits"] if self.relative else 1.0)
        if unequal.any() and self.outputs.margins(expected, place, unequal).max() > near:
            return (
                f"on {printable(name)} it chooses otherwise than predict in {int(unequal.sum())} of "
                f"{unequal.size} places"
            )
        self._equal, self._decided = self._equal + int((~unequal).sum()), self._decided + unequal.size
        worse = before.pictures == 0 or difference > before.difference
        self.agreement = Agreement(
            before.pictures + 1,
            self._equal / self._decided,
            difference if worse else before.difference,
            name if worse else before.worst,
            before.ties + int(unequal.sum()),
        )
        return None


def _both(
    runtime: Runtime, predictor: Predictor, outputs: Outputs, pictures: Iterable[Path], prepared: bool
) -> Iterator[tuple[Path, Placement, Arrays, Arrays]]:
    """Of each picture where it lies in the network's input, and both answers."""
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
        yield path, place, expected, found


def _named(names: tuple[str, ...], values: tuple[Tensor, ...]) -> Arrays:
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def _difference(expected: Arrays, found: Arrays, units: Mapping[str, float]) -> tuple[float, str]:
    """The largest difference of numbers in their units, and whose it is; infinite for another shape or kind."""
    differences = {}
    for name, ours in expected.items():
        theirs = found[name]
        if ours.shape != theirs.shape or ours.dtype.kind != theirs.dtype.kind:
            return math.inf, name
        if ours.dtype.kind == "f":
            differences[name] = float(np.abs(ours - theirs).max(initial=0)) / units[name]
            if not math.isfinite(differences[name]):
                return math.inf, name
    name = max(differences, key=lambda key: differences[key])
    return differences[name], name
