"""Images for learning without labels: a plain folder suffices, and labels, where there are some, judge."""

import hashlib
import os
from pathlib import Path

import numpy as np

from sightline.datasets.folder import Folder
from sightline.datasets.image_set import ImageSet, Names
from sightline.datasets.open import open_dataset
from sightline.datasets.scan import Skipped
from sightline.datasets.split import Splits
from sightline.errors import UserError, printable

WATCHED = 0.05
"""Share of images without labels that are set apart to watch the features."""

MOST_WATCHED = 1000
"""And how many of them at most."""


def open_images(source: str | Path, *, seed: int = 0) -> Splits:
    """Whatever `open_dataset` opens, or a folder of images in any order, whose splits then have no classes.

    A folder counts as unlabelled where images lie right in it, or where its folders are no classes to learn; all images
    in it and below are then read, and of these a share is set apart by `seed` and their names. Raises UserError for
    what holds no two images.
    """
    path = Path(source)
    if str(source).startswith("builtin:") or not os.path.isdir(path):  # noqa: PTH112  (False where it is closed to us)
        return open_dataset(source, seed=seed)
    place, skipped = Folder(path), Skipped()
    loose = place.contents("", skipped)[1]
    reason = f"{len(loose):,} images lie in no class folder"
    if not loose:
        try:
            return open_dataset(source, seed=seed)
        except UserError as fault:
            reason = str(fault)
    skipped = Skipped()
    names = Names(place.images_below("", skipped))
    if len(names) < 2:
        raise UserError(f"{place.where}: {len(names)} images are too few to learn from{skipped.hint()}")
    images = ImageSet((), place.samples(names, np.full(len(names), -1, dtype=np.int64)))
    watched = min(max(round(WATCHED * len(names)), 1), MOST_WATCHED)
    ranks = [hashlib.blake2b(f"{seed}\0".encode() + os.fsencode(name), digest_size=8).digest() for name in names]
    held = np.zeros(len(names), dtype=bool)
    held[np.argsort(np.array(ranks), kind="stable")[:watched]] = True
    notes = [
        *skipped.notes(),
        f"{len(names):,} images without labels ({printable(reason, 200)}); {watched:,} are set apart by seed {seed}",
    ]
    train, val = (images.select(np.flatnonzero(part)) for part in (~held, held))
    return Splits(train, val, place.source, notes, drawn=True)
