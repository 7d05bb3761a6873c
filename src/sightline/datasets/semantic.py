"""Images and masks with a class for every pixel, in two folders with equal file stems."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from sightline.datasets.findings import Finding
from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.marks import IGNORE, Masked
from sightline.datasets.naming import natural, some
from sightline.datasets.scan import Skipped, images_below
from sightline.datasets.split import TRAINING, VALIDATION, Splits, hold_out
from sightline.errors import UserError, printable
from sightline.images.decode import ImageError, Source, Stored, image_size, read

IMAGES = ("images", "image", "img", "JPEGImages")
MASKS = ("masks", "mask", "labels", "annotations", "SegmentationClass")
CLASSES = "classes.txt"


@dataclass(frozen=True, eq=False)
class MaskFile(Masked):
    """A mask on disk or in a shard: an index PNG (grey, palette, or 16 bits) whose values are the numbers of classes.

    `IGNORE`, in 16 bits 65535 too, is no class. `places` has the number that each of the file's values stands for.
    """

    path: Path | Stored
    places: tuple[int, ...]

    def content(self) -> bytes:
        if isinstance(self.path, Stored):
            return self.path.content + f" {self.places}".encode()
        try:
            return f"{self.path.name} {self.path.stat().st_size} {self.places}".encode()
        except OSError:
            return b"-1"

    def renumbered(self, places: Int64[np.ndarray, " k"]) -> "MaskFile":
        return replace(self, places=tuple(int(places[i]) for i in self.places))

    def mask(self, height: int, width: int) -> UInt8[np.ndarray, "h w"]:
        name = printable(self.path.where if isinstance(self.path, Stored) else self.path)
        values = _values(self.path, name, height, width)
        table = np.full(65536, -1)
        table[: len(self.places)] = self.places
        table[[IGNORE, 65535]] = IGNORE
        cells = table[values]
        if (cells < 0).any():
            odd = int(values[cells < 0][0])
            raise ImageError(name, f"its mask has a pixel of class {odd}, and there are {len(self.places)} classes")
        return cells.astype(np.uint8)


def _values(path: Path | Stored, name: str, height: int, width: int) -> Int64[np.ndarray, "h w"]:
    """The numbers in a mask of the size of its image. Raises ImageError."""
    data = read(path)
    try:
        with Image.open(BytesIO(data), formats=["PNG", "TIFF", "BMP", "GIF"]) as picture:
            if (picture.height, picture.width) != (height, width):  # before anything large is unpacked
                found = f"{picture.width}×{picture.height}"
                raise ImageError(name, f"its mask has {found} pixels, and the image {width}×{height}")
            if picture.mode not in ("L", "P", "1", "I;16", "I;16B", "I"):
                raise ImageError(name, f"its mask is a picture in {picture.mode}, not one number for each pixel")
            values = np.asarray(picture).astype(np.int64)
    except ImageError:
        raise
    except Exception as fault:  # whatever a decoder raises on hostile bytes
        raise ImageError(name, f"its mask cannot be decoded: {printable(fault, 100)}") from fault
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(name, "its mask has numbers beyond 16 bits")
    return values


def open_masks(path: Path, seed: int, held_out: float) -> Splits:
    """Opens `ROOT/images` and `ROOT/masks` with `classes.txt`, one name a line, the first for the value 0.

    Each of the two may have the folders `train` and `val`, or lie in them; otherwise a share is held out. Raises
    UserError where one of these is not there, for images without a mask, and for names of classes that are used twice.
    """
    classes = named_classes(path)
    parts = {name: _part(path, images, masks, classes) for name, (images, masks) in _folders(path).items()}
    for name, (_, missing) in parts.items():
        if missing:
            where = printable(path) if name == "all" else f"{printable(path)}, {name}"
            raise UserError(f"{where}: images without a mask of the same stem: {some(missing)}")
    if "all" in parts:
        return hold_out(parts["all"][0], str(path), seed=seed, share=held_out)
    return Splits(parts["train"][0], parts["val"][0], str(path), [])


def named_classes(path: Path, most: int = IGNORE - 1) -> tuple[str, ...]:
    """The names in a folder's `classes.txt`, the first that of the value 0. Raises UserError, also for too many."""
    file = path / CLASSES
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise UserError(
            f"{printable(file)} cannot be read ({fault.strerror}): masks need the names of their classes there, "
            "one a line, the first for the value 0"
        ) from fault
    except UnicodeDecodeError as fault:
        raise UserError(f"{printable(file)} is not text in UTF-8") from fault
    names = [line.strip() for line in text.splitlines()]
    while names and not names[-1]:
        names.pop()
    if not 2 <= len(names) <= most:
        raise UserError(f"{printable(file)} has {len(names)} classes; 2 to {most} are possible")
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"{printable(file)}: an empty line, or a name that is there twice")
    return tuple(names)


def _folders(path: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and of masks of each part. Raises UserError where there are none."""
    pair = _pair(path)
    named = {}
    for part, names in (("train", TRAINING), ("val", VALIDATION)):
        for name in names:
            inner = _pair(path / name)
            if inner is None and pair is not None and all((folder / name).is_dir() for folder in pair):
                inner = pair[0] / name, pair[1] / name
            if inner is not None:
                named[part] = inner
                break
    if len(named) == 2:
        return named
    if pair is None:
        raise UserError(
            f"{printable(path)}: no folders of images and of masks ({', '.join(IMAGES)}; {', '.join(MASKS)}), neither "
            "there nor in 'train' and 'val'"
        )
    return {"all": pair}


def _pair(path: Path) -> tuple[Path, Path] | None:
    images = next((path / name for name in IMAGES if (path / name).is_dir()), None)
    masks = next((path / name for name in MASKS if (path / name).is_dir()), None)
    return None if images is None or masks is None else (images, masks)


def _part(root: Path, images: Path, masks: Path, classes: tuple[str, ...]) -> tuple[ImageSet, list[str]]:
    """The images of a part with their masks, and those that have none."""
    found = sorted(images_below(str(images), Skipped()), key=natural)
    stems = {os.path.splitext(name)[0]: name for name in images_below(str(masks), Skipped())}  # noqa: PTH122
    names, marks, missing = [], [], []
    for name in found:
        stem = os.path.splitext(name)[0]  # noqa: PTH122
        if stem not in stems:
            missing.append(name)
            continue
        names.append(os.path.relpath(images / name, root))
        marks.append(MaskFile(masks / stems[stem], tuple(range(len(classes)))))
    if not names:
        raise UserError(f"{printable(images)}: no image has a mask of the same stem in {printable(masks)}")
    return ImageSet(classes, Samples(Names(names), np.full(len(names), -1), root, marks=marks)), missing


def stock(path: Path) -> Iterator[tuple[str, ImageSet, list[Finding]]]:
    """Every part of a set with what is wrong with its masks, which are all read. Raises UserError for no such set."""
    classes = named_classes(path)
    for part, (images, masks) in _folders(path).items():
        found, missing = _part(path, images, masks, classes)
        faults = [Finding("missing-mask", "it has no mask of the same stem", [name]) for name in missing]
        for image, marks, name in found.samples:
            faults += mask_faults(image, marks, name)
        yield part, found, faults


def mask_faults(image: Source, marks: Masked, name: str) -> list[Finding]:
    """What is wrong with the mask of an image."""
    try:
        height, width = image_size(image)
    except ImageError:
        return []  # the image itself is told of elsewhere
    try:
        marks.mask(height, width)
    except ImageError as fault:
        size, unknown = "pixels, and the image" in fault.reason, "has a pixel of class" in fault.reason
        kind = "mask-size" if size else "unknown-class" if unknown else "mask"
        return [Finding(kind, fault.reason, [name])]
    return []


def recognised(path: Path) -> bool:
    """Whether a folder looks like images with masks."""
    if not path.is_dir() or not (path / CLASSES).is_file():
        return False
    return _pair(path) is not None or any(_pair(path / name) for name in TRAINING)


READERS = {"segment": open_masks}
STOCKS = {"segment": (recognised, stock)}
