"""Objects with boxes in COCO's JSON (cocodataset.org/#format-data) beside folders of images."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sightline.datasets.findings import Finding
from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.marks import Objects
from sightline.datasets.naming import class_names, some
from sightline.datasets.rle import box_of
from sightline.datasets.split import TRAINING, VALIDATION, Splits, check_classes, hold_out
from sightline.errors import UserError, printable

LARGEST = 2**30
"""Bytes that a file of annotations may have."""

_FORMS = "an object with 'images', 'annotations' and 'categories'"


@dataclass(frozen=True)
class Document:
    """One file of annotations, read but not yet believed."""

    path: Path
    images: Sequence[Mapping[str, Any]]
    annotations: Sequence[Mapping[str, Any]]
    categories: Sequence[Mapping[str, Any]]

    @property
    def where(self) -> str:
        """The file, for messages."""
        return printable(self.path)


class Row(NamedTuple):
    """An object that can be meant: its box as left, top, right and bottom, cut off at the edges of its image."""

    category: str
    box: list[float]
    crowd: bool
    area: float


def open_objects(path: Path, seed: int, held_out: float) -> Splits:
    """Opens a JSON file, or a folder with one for each part (`train`, `val` in its name or its folder's).

    Images are sought beside the file: in its own folder, in one of its part's name, or in `images`. Boxes that reach
    out of their image are cut off, and those without area left out, which notes say. Raises UserError for what is no
    such file, for numbers that are none, and for images or categories that are referred to and not there.
    """
    parts = find_documents(path)
    root = path if path.is_dir() else path.parent
    if len(parts) == 1:
        images, notes = _image_set(_read(next(iter(parts.values()))), root)
        return hold_out(images, str(path), seed=seed, share=held_out, notes=notes)
    train, notes = _image_set(_read(parts["train"]), root)
    val, more = _image_set(_read(parts["val"]), root)
    check_classes(train.classes, val.classes, printable(path))
    return Splits(train, val, str(path), [*notes, *more])


def find_documents(path: Path) -> dict[str, Path]:
    """The files of annotations by part, `train` and `val`, or one by the name `all`. Raises UserError for none."""
    if path.is_file():
        return {"all": path}
    if not path.is_dir():
        raise UserError(
            f"{printable(path)} does not exist: objects are read from COCO's JSON beside a folder of images"
        )
    found = [file for pattern in ("*.json", "*/*.json") for file in sorted(path.glob(pattern)) if _speaks_of(file)]
    parts: dict[str, Path] = {}
    for part, names in (("train", TRAINING), ("val", VALIDATION)):
        for name in names:
            mine = [file for file in found if _belongs(file.relative_to(path), name)]
            if len(mine) > 1:
                raise UserError(f"{printable(path)}: more than one file for '{name}': {some(map(str, mine))}")
            if mine:
                parts[part] = mine[0]
                break
    if len(parts) == 2:
        return parts
    if len(found) == 1:
        return {"all": found[0]}
    what = f"of {len(found)} JSON files none is named for a part" if found else "no JSON file"
    raise UserError(f"{printable(path)}: {what}; expected annotations such as train.json and val.json, or a single one")


def _belongs(file: Path, part: str) -> bool:
    """Whether a part's name stands in that of a file (`instances_val2017.json`) or is its folder's."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    return part in words or any(re.fullmatch(rf"{part}\d*", folder.lower()) for folder in file.parent.parts)


def _speaks_of(file: Path) -> bool:
    """Whether the beginning of a file looks like annotations of images."""
    try:
        with file.open("rb") as stream:
            head = stream.read(2**16)
    except OSError:
        return False
    return b'"images"' in head or b'"annotations"' in head or b'"categories"' in head


def _read(path: Path) -> Document:
    where = printable(path)
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{where} is larger than {LARGEST / 2**30:g} GiB, the most that annotations may have")
        data = json.loads(path.read_bytes())
    except OSError as fault:
        raise UserError(f"{where} cannot be read: {fault.strerror}") from fault
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{where} is not valid JSON: {printable(fault, 200)}") from fault
    lists = []
    for name in ("images", "annotations", "categories"):
        part = data.get(name) if isinstance(data, dict) else None
        if not isinstance(part, list) or not all(isinstance(row, dict) for row in part):
            raise UserError(f"{where}: '{name}' is not a list of objects; COCO's JSON is {_FORMS}")
        lists.append(part)
    return Document(path, *lists)


def _image_set(document: Document, root: Path) -> tuple[ImageSet, list[str]]:
    """The images of a file with their objects, and what was left out. Raises UserError at the first fault."""
    found: list[Finding] = []
    images = gather(document, root, found.append)
    errors = [finding for finding in found if finding.severity == "error"]
    if errors:
        raise UserError(f"{document.where}: {errors[0].reason}")
    return images, [f"{document.path.name}: {finding.reason}" for finding in found]


def gather(document: Document, root: Path, tell: Callable[[Finding], None]) -> ImageSet:
    """The images of a file with the objects that can be meant; `tell` hears what is wrong with the others."""
    categories = _categories(document, tell)
    classes = class_names(categories.values(), document.where)
    number = {name: i for i, name in enumerate(classes)}
    place = _folder(document, root)
    images: dict[Any, Mapping[str, Any]] = {}
    for row in document.images:
        if not isinstance(row.get("file_name"), str) or not isinstance(row.get("id"), int | str):
            tell(Finding("annotation", f"an image without 'id' or 'file_name': {printable(row, 80)}"))
        elif row["id"] in images:
            tell(Finding("annotation", f"two images have the id {printable(row['id'])}", [row["file_name"]]))
        else:
            images[row["id"]] = row
    objects: dict[Any, list[Row]] = {key: [] for key in images}
    for row in document.annotations:
        take(row, images, categories, objects, tell)
    names = Names(os.path.relpath(place / row["file_name"], root) for row in images.values())
    marks = [marked(objects[key], number) for key in images]
    return ImageSet(tuple(classes.values()), Samples(names, np.full(len(names), -1), root, marks=marks))


def marked(rows: Sequence[Row], number: Mapping[str, int]) -> Objects:
    """The objects of an image, whose categories have these numbers."""
    return Objects(
        np.array([number[row.category] for row in rows], dtype=np.int64),
        np.array([row.box for row in rows], dtype=np.float32).reshape(-1, 4),
        np.array([row.crowd for row in rows], dtype=bool),
        np.array([row.area for row in rows], dtype=np.float32),
    )


def _categories(document: Document, tell: Callable[[Finding], None]) -> dict[Any, str]:
    found: dict[Any, str] = {}
    for row in document.categories:
        key, name = row.get("id"), row.get("name")
        if not isinstance(key, int | str) or not isinstance(name, str) or not name:
            tell(Finding("annotation", f"a category without 'id' or 'name': {printable(row, 80)}"))
        elif key in found or name in found.values():
            tell(Finding("annotation", f"the category '{printable(name)}' or its id {printable(key)} is there twice"))
        else:
            found[key] = name
    if not found:
        tell(Finding("annotation", "there is no category, so that there is nothing to tell apart"))
    return found


def take(
    row: Mapping[str, Any],
    images: Mapping[Any, Mapping[str, Any]],
    categories: Mapping[Any, str],
    objects: Mapping[Any, list[Row]],
    tell: Callable[[Finding], None],
) -> None:
    """Enters one annotation, or says why it cannot be meant."""
    called = f"annotation {printable(row.get('id'), 40)}"
    image, category = row.get("image_id"), row.get("category_id")
    if not isinstance(image, int | str) or image not in images:
        tell(Finding("annotation", f"{called} is of image {printable(image, 40)}, which is not there"))
        return
    name = images[image]["file_name"]
    if not isinstance(category, int | str) or category not in categories:
        tell(Finding("unknown-class", f"{called} is of category {printable(category, 40)}, which is not there", [name]))
        return
    try:
        left, top, width, height = _box(row)
    except ValueError as fault:
        tell(Finding("annotation", f"{called}: {fault}", [name]))
        return
    if not (width > 0 and height > 0):
        tell(Finding("zero-area", f"{called} has a box of {width:g}×{height:g} pixels and is left out", [name]))
        return
    corners, limits = [left, top, left + width, top + height], _limits(images[image])
    inside = [min(max(side, 0.0), limit) for side, limit in zip(corners, limits, strict=True)]
    if any(abs(a - b) > 1 for a, b in zip(corners, inside, strict=True)):
        tell(Finding("box-outside", f"{called} reaches out of its image of {limits[0]:g}×{limits[1]:g} pixels", [name]))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return  # wholly outside, which was said
    area = row.get("area")
    good = isinstance(area, int | float) and not isinstance(area, bool) and math.isfinite(area) and area > 0
    size = float(area) if good and area is not None else width * height
    objects[image].append(Row(categories[category], inside, bool(row.get("iscrowd", 0)), size))


def _box(row: Mapping[str, Any]) -> Sequence[float]:
    """Left, top, width and height of an annotation; those of its mask where it has no box. Raises ValueError."""
    box = row.get("bbox")
    if box is None and row.get("segmentation"):
        return box_of(row["segmentation"])
    good = isinstance(box, list) and len(box) == 4
    if not good or not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in box):
        raise ValueError(f"its box {printable(box, 60)} is not four numbers: left, top, width, height")
    return [float(side) for side in box]


def _limits(image: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Width and height of an image as its file of annotations has them, twice; unlimited where it does not say."""
    sides = []
    for name in ("width", "height"):
        side = image.get(name)
        good = isinstance(side, int | float) and not isinstance(side, bool) and 0 < side < math.inf
        sides.append(float(side) if good and side is not None else math.inf)
    return sides[0], sides[1], sides[0], sides[1]


def _folder(document: Document, root: Path) -> Path:
    """Where the images lie: the first likely folder that has the first of them."""
    path = document.path
    stem = re.sub(r"^(instances|annotations|coco)[_-]|[._-](annotations?|coco|instances)$", "", path.stem)
    stem = stem.removeprefix("_annotations.").strip("._-") or path.stem
    likely = [path.parent, *(base / name for base in (path.parent, root, root / "images") for name in (stem, "images"))]
    likely += [root, root / "data"]
    for row in document.images[:1]:
        name = row.get("file_name")
        for folder in likely:
            if isinstance(name, str) and (folder / name).is_file():
                return folder
    return path.parent


def stock(path: Path) -> Iterator[tuple[str, ImageSet, list[Finding]]]:
    """Every part of a set with what is wrong in its annotations, for a check. Raises UserError for no such set."""
    root = path if path.is_dir() else path.parent
    for part, file in find_documents(path).items():
        found: list[Finding] = []
        images = gather(_read(file), root, found.append)
        yield part, images, found


def recognised(path: Path) -> bool:
    """Whether a file or folder looks like annotations of objects."""
    if path.is_file():
        return path.suffix.lower() == ".json"
    if not path.is_dir():
        return False
    try:
        return bool(find_documents(path))
    except UserError:
        return False


READERS = {"detect": open_objects}
STOCKS = {"detect": (recognised, stock)}
