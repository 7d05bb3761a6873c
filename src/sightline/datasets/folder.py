"""Folders of images, one folder per class, with or without a validation part."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.naming import class_names, some
from sightline.datasets.scan import Skipped, contents, images_below
from sightline.datasets.split import TRAINING, VALIDATION, Splits, check_classes, check_several, hold_out
from sightline.errors import UserError, printable
from sightline.images.decode import decode


def read_splits(root: Path, *, seed: int, held_out: float) -> Splits:
    """`ROOT/train/CLASS/*` with `ROOT/val` (or valid, validation, test), or `ROOT/CLASS/*` with a share held out.

    Deeper folders belong to the class above them. Raises UserError for unreadable folders, for no images or fewer than
    two classes, for class names that a file system could confuse, and for parts whose classes differ.
    """
    skipped = Skipped()
    folders, loose = contents(str(root), skipped)
    training, validation = _parts(root, folders)
    if training is None:
        images, notes = read_classes(root)
        return hold_out(images, str(root), seed=seed, share=held_out, notes=notes)
    skipped.loose += loose
    train = _classes(root, training, skipped)
    if validation is None:
        images = _image_set(root, _filled(train, root))
        notes = [*_empty(train), *skipped.notes(), "there is no folder 'val'"]
        return hold_out(images, str(root), seed=seed, share=held_out, notes=notes)
    val = _classes(root, validation, skipped)
    check_classes(train, val, printable(root))
    if unseen := [label for label in train if val[label] and not train[label]]:
        raise UserError(f"{printable(root)}: classes with images in '{validation}' but none to learn: {some(unseen)}")
    learnt = _filled(train, root)
    judged = {label: val[label] for label in learnt}
    if not any(judged.values()):
        raise UserError(f"{printable(root)}: no images in '{validation}' to validate with")
    notes = [*_empty(train), *_empty(judged, f" of '{validation}'"), *skipped.notes()]
    if unused := [name for name in folders if name not in (training, validation)]:
        notes.append(f"folders left out: {some(unused)}")
    return Splits(_image_set(root, learnt), _image_set(root, judged), str(root), notes)


def read_classes(root: Path) -> tuple[ImageSet, list[str]]:
    """All images of `ROOT/CLASS/*` as one set, and notes about what was left out. Raises UserError as `read_splits`."""
    skipped = Skipped()
    found = _classes(root, "", skipped)
    return _image_set(root, _filled(found, root)), [*_empty(found), *skipped.notes()]


def _parts(root: Path, folders: Sequence[str]) -> tuple[str | None, str | None]:
    """Which folders are the training and the validation part; none where the folders are classes."""
    known = {label.casefold(): folder for folder, label in class_names(folders, printable(root)).items()}
    training, validation = (next((known[n] for n in names if n in known), None) for names in (TRAINING, VALIDATION))
    if training is None:
        if folders and all(name in VALIDATION for name in known):
            raise UserError(f"{printable(root)}: there is '{validation}' but no folder 'train'")
        return None, None
    if validation is None and contents(str(root / training), Skipped())[1]:
        return None, None  # images right inside: a class of railway trains
    return training, validation


def _classes(root: Path, part: str, skipped: Skipped) -> dict[str, list[str]]:
    """The image files of each class folder of a part, relative to the root, in natural order of classes."""
    folders, loose = contents(str(root / part), skipped)
    skipped.loose += loose
    found = {}
    for folder, label in class_names(folders, printable(root / part)).items():
        found[label] = images_below(str(root), skipped, f"{part}/{folder}/" if part else f"{folder}/")
    return found


def _image_set(root: Path, found: Mapping[str, Sequence[str]]) -> ImageSet:
    names = Names(name for files in found.values() for name in files)
    targets = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])
    return ImageSet(tuple(found), Samples(names, targets, root))


def _filled(found: Mapping[str, Sequence[str]], root: Path) -> dict[str, Sequence[str]]:
    """The classes that have images. Raises UserError for fewer than two."""
    filled = {label: files for label, files in found.items() if files}
    check_several(tuple(filled), printable(root))
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
