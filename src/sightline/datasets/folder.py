"""Folders of images, one folder per class, with or without a validation part; archives are laid out alike."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from PIL import Image

from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.naming import class_names, some
from sightline.datasets.scan import Skipped, contents, images_below
from sightline.datasets.split import TRAINING, VALIDATION, Splits, check_classes, check_several, hold_out
from sightline.errors import UserError, printable
from sightline.images.decode import decode


class Place(ABC):
    """Where class folders lie: `source` is what the user called it, `where` the same for messages."""

    where: str
    source: str

    @abstractmethod
    def contents(self, part: str, skipped: Skipped) -> tuple[list[str], list[str]]:
        """The folders and the images right inside a part ('' for everything), sorted."""

    @abstractmethod
    def images_below(self, folder: str, skipped: Skipped) -> list[str]:
        """All images in a folder ('a/b/') and below, sorted."""

    @abstractmethod
    def samples(self, names: Names, targets: Int64[np.ndarray, " n"]) -> Samples:
        """These images as samples."""


class Folder(Place):
    """A folder on disk."""

    def __init__(self, root: Path):
        self.root, self.where, self.source = root, printable(root), str(root)

    def contents(self, part: str, skipped: Skipped) -> tuple[list[str], list[str]]:
        return contents(str(self.root / part), skipped, home=str(self.root))

    def images_below(self, folder: str, skipped: Skipped) -> list[str]:
        return images_below(str(self.root), skipped, folder)

    def samples(self, names: Names, targets: Int64[np.ndarray, " n"]) -> Samples:
        return Samples(names, targets, self.root)


def read_splits(root: Path, *, seed: int, held_out: float) -> Splits:
    """`ROOT/train/CLASS/*` with `ROOT/val` (or valid, validation, test), or `ROOT/CLASS/*` with a share held out.

    Deeper folders belong to the class above them; links that lead out of the root are left out (see `scan`). Raises
    UserError for unreadable folders, for no images or fewer than two classes, for class names that a file system could
    confuse, and for parts whose classes differ.
    """
    return arrange(Folder(root), seed=seed, held_out=held_out)


def arrange(place: Place, *, seed: int, held_out: float) -> Splits:
    """The two parts of whatever holds class folders; see `read_splits`."""
    skipped = Skipped()
    folders, loose = place.contents("", skipped)
    training, validation = _parts(place, folders)
    if training is None:
        images, notes = _all_classes(place)
        return hold_out(images, place.source, seed=seed, share=held_out, notes=notes)
    skipped.loose += loose
    train = _classes(place, training, skipped)
    if validation is None:
        images = _image_set(place, _filled(train, place, skipped))
        notes = [*_empty(train), *skipped.notes(), "there is no folder 'val'"]
        return hold_out(images, place.source, seed=seed, share=held_out, notes=notes)
    val = _classes(place, validation, skipped)
    check_classes(train, val, place.where)
    if unseen := [label for label in train if val[label] and not train[label]]:
        raise UserError(f"{place.where}: classes with images in '{validation}' but none to learn: {some(unseen)}")
    learnt = _filled(train, place, skipped)
    judged = {label: val[label] for label in learnt}
    if not any(judged.values()):
        raise UserError(f"{place.where}: no images in '{validation}' to validate with{skipped.hint()}")
    notes = [*_empty(train), *_empty(judged, f" of '{validation}'"), *skipped.notes()]
    if unused := [name for name in folders if name not in (training, validation)]:
        notes.append(f"folders left out: {some(unused)}")
    return Splits(_image_set(place, learnt), _image_set(place, judged), place.source, notes)


def read_classes(root: Path) -> tuple[ImageSet, list[str]]:
    """All images of `ROOT/CLASS/*` as one set, and notes about what was left out. Raises UserError as `read_splits`."""
    return _all_classes(Folder(root))


def _all_classes(place: Place) -> tuple[ImageSet, list[str]]:
    skipped = Skipped()
    found = _classes(place, "", skipped)
    return _image_set(place, _filled(found, place, skipped)), [*_empty(found), *skipped.notes()]


def _parts(place: Place, folders: Sequence[str]) -> tuple[str | None, str | None]:
    """Which folders are the training and the validation part; none where the folders are classes."""
    known = {label.casefold(): folder for folder, label in class_names(folders, place.where).items()}
    training, validation = (next((known[n] for n in names if n in known), None) for names in (TRAINING, VALIDATION))
    if training is None:
        if folders and all(name in VALIDATION for name in known):
            raise UserError(f"{place.where}: there is '{validation}' but no folder 'train'")
        return None, None
    if validation is None and place.contents(training, Skipped())[1]:
        return None, None  # images right inside: a class of railway trains
    return training, validation


def _classes(place: Place, part: str, skipped: Skipped) -> dict[str, list[str]]:
    """The image files of each class folder of a part, relative to the root, in natural order of classes."""
    folders, loose = place.contents(part, skipped)
    skipped.loose += loose
    found = {}
    where = f"{place.where}/{printable(part)}" if part else place.where
    for folder, label in class_names(folders, where).items():
        found[label] = place.images_below(f"{part}/{folder}/" if part else f"{folder}/", skipped)
    return found


def _image_set(place: Place, found: Mapping[str, Sequence[str]]) -> ImageSet:
    names = Names(name for files in found.values() for name in files)
    targets = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])
    return ImageSet(tuple(found), place.samples(names, targets))


def _filled(found: Mapping[str, Sequence[str]], place: Place, skipped: Skipped) -> dict[str, Sequence[str]]:
    """The classes that have images. Raises UserError for fewer than two."""
    filled = {label: files for label, files in found.items() if files}
    check_several(tuple(filled), place.where, skipped.hint())
    return filled


def _empty(found: Mapping[str, Sequence[str]], part: str = "") -> list[str]:
    empty = [label for label, files in found.items() if not files]
    return [f"classes{part} without images: {some(empty)}"] if empty else []


def write_images(images: ImageSet, directory: Path, *, scale: int = 1) -> list[Path]:
    """Writes every sample as a PNG file `directory/NAME.png`, each pixel a square of `scale`², and returns the files.

    Raises UserError for an image that cannot be read.
    """
    files = []
    for image, _, name in images.samples:
        file = (directory / name).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(decode(image).repeat(scale, axis=0).repeat(scale, axis=1)).save(file)
        files.append(file)
    return files
