"""Training and validation images: two sets with the same classes and no image in common."""

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from sightline.datasets.image_set import ImageSet
from sightline.datasets.naming import some
from sightline.errors import UserError, printable

TRAINING = ("train", "training")
"""What the training part may be called."""

VALIDATION = ("val", "valid", "validation", "test")
"""What the validation part may be called; where several are there, the first of these is taken."""


@dataclass(frozen=True)
class Splits:
    """What to learn from and what to judge by.

    `notes` are sentences for people: what was found and what left out. `drawn` says that the data has no validation
    part of its own, and that this one was drawn from it by a seed.
    """

    train: ImageSet
    val: ImageSet
    source: str
    notes: list[str]
    drawn: bool = False

    def together(self) -> ImageSet:
        """All images of both parts."""
        return self.train.joined(self.val)


def hold_out(images: ImageSet, source: str, *, seed: int, share: float, notes: Sequence[str] = ()) -> Splits:
    """Sets a share of every class apart for validation: at least one image, never all; a lone image is learnt from.

    Which images these are follows from their names and the seed alone: within each class, names are ranked by a hash.
    Raises UserError for a share outside of 0 to 1 (both excluded), and where no class has a second image.
    """
    if not 0 < share < 1:
        raise UserError(f"the held-out share must lie between 0 and 1, not {share}")
    hashes = (hashlib.blake2b(f"{seed}\0".encode() + os.fsencode(name), digest_size=8) for name in images.samples.names)
    ranks = np.fromiter((int.from_bytes(h.digest(), "big") for h in hashes), dtype=np.uint64, count=len(images))
    held = np.zeros(len(images), dtype=bool)
    whole = images.samples.marks is not None  # images with marks have not one class each
    counts = {"": len(images)} if whole else images.counts()
    for target, count in enumerate(counts.values()):
        rows = np.arange(len(images)) if whole else np.flatnonzero(images.targets == target)
        taken = min(max(int(count * share + 0.5), 1), count - 1)
        held[rows[np.argsort(ranks[rows], kind="stable")[:taken]]] = True
    if not held.any():
        if whole:
            raise UserError(f"{printable(source)}: {len(images)} images are too few to hold one out")
        raise UserError(f"{printable(source)}: no class has more than one image, so that none is left to validate with")
    told = [f"{share:.0%} of {'the images are' if whole else 'each class is'} held out for validation, by seed {seed}"]
    if lone := [name for name, count in counts.items() if count == 1]:
        told.append(f"with a single image each, these classes have none to validate with: {some(lone)}")
    train, val = (images.select(np.flatnonzero(part)) for part in (~held, held))
    return Splits(train, val, source, [*notes, *told], drawn=True)


def check_classes(train: Collection[str], val: Collection[str], where: str) -> None:
    """Raises UserError where the training and the validation part do not have the same classes."""
    missing, extra = [n for n in train if n not in val], [n for n in val if n not in train]
    if missing or extra:
        gaps = [f"only in the training part: {some(missing)}"] if missing else []
        gaps += [f"only in the validation part: {some(extra)}"] if extra else []
        raise UserError(f"{where}: the two parts have different classes; {'; '.join(gaps)}")


def check_several(classes: Sequence[str], where: str, hint: str = "") -> None:
    """Raises UserError for fewer than two classes; a `hint` may say what was left out."""
    if not classes:
        remedy = hint or "; put those of each class into a folder of its own"
        raise UserError(f"{where}: no images found in class folders{remedy}")
    if len(classes) < 2:
        only = f"only one class has images ('{printable(classes[0])}')"
        raise UserError(
            f"{where}: {only}, and a classifier needs two{hint or '; if classes lie deeper, name that folder'}"
        )
