"""Images for learning without labels: a plain folder suffices, and labels, where there are some, judge."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sightline.datasets.folder import Folder
from sightline.datasets.image_set import ImageSet, Names
from sightline.datasets.open import SIGNS, open_dataset
from sightline.datasets.scan import Skipped
from sightline.datasets.sharded import ALL, HELD_OUT, divided, gather, refuse_faults
from sightline.datasets.shards import SUFFIX, ShardFiles, find_shards
from sightline.datasets.split import Splits
from sightline.errors import UserError, printable
from sightline.registry import find

WATCHED = 0.05
"""Share of images without labels that are set apart to watch the features."""

MOST_WATCHED = 1000
"""And how many of them at most."""


def open_images(source: str | Path, *, seed: int = 0) -> Splits:
    """Whatever `open_dataset` opens, or images in any order, whose splits then have no classes.

    Shards count as unlabelled where no image has a label beside it, and an archive where it holds no classes to learn.
    A folder counts as unlabelled where images lie right in it, or where its folders are no classes to learn; all images
    in it and below are then read, and of these a share is set apart by `seed` and their names. Raises UserError for
    what holds no two images.
    """
    path = Path(source)
    if str(source).startswith("builtin:"):
        return open_dataset(source, seed=seed)
    if (shards := find_shards(path, SIGNS)) is not None:
        return _in_shards(shards, seed)
    if not os.path.isdir(path):  # noqa: PTH112  (False where it is closed to us)
        if path.suffix.lower() != SUFFIX or (shards := find_shards(path)) is None:
            return open_dataset(source, seed=seed)
        try:
            return open_dataset(source, seed=seed)
        except UserError as fault:
            return _in_shards(shards, seed, str(fault))
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
    return _watched(images, place.source, seed, reason, skipped.notes())


def _in_shards(files: ShardFiles, seed: int, reason: str = "no image has a label beside it") -> Splits:
    """The images of shards, with labels where these could be learned."""
    labels = find("datasets", "SHARDED", "classify", "task")(files)
    gathered = gather(files, [labels])
    content = labels if labels.said or labels.findings else None
    refuse_faults(gathered, content)
    if content is not None and len(set(labels.said)) > 1:
        return divided(gathered, content, gathered.image_sets(content), seed, HELD_OUT)
    sets = gathered.image_sets(None)
    notes = [*files.notes, *gathered.notes(None)]
    if ALL not in sets:
        return divided(gathered, None, sets, seed, HELD_OUT)
    if len(sets[ALL]) < 2:
        raise UserError(f"{printable(files.source)}: {len(sets[ALL])} images are too few to learn from")
    return _watched(sets[ALL], files.source, seed, reason if content is None else "all have one class", notes)


def _watched(images: ImageSet, source: str, seed: int, reason: str, notes: Sequence[str]) -> Splits:
    """Images without labels, of which a share is set apart."""
    names = images.samples.names
    watched = min(max(round(WATCHED * len(names)), 1), MOST_WATCHED)
    ranks = [hashlib.blake2b(f"{seed}\0".encode() + os.fsencode(name), digest_size=8).digest() for name in names]
    held = np.zeros(len(names), dtype=bool)
    held[np.argsort(np.array(ranks), kind="stable")[:watched]] = True
    told = [
        *notes,
        f"{len(names):,} images without labels ({printable(reason, 200)}); {watched:,} are set apart by seed {seed}",
    ]
    train, val = (images.select(np.flatnonzero(part)) for part in (~held, held))
    return Splits(train, val, source, told, drawn=True)
