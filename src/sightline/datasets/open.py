"""Whatever the user calls a dataset, as training and validation images."""

import os
import re
from dataclasses import replace
from pathlib import Path

from sightline.datasets.archive import SUFFIXES, read_archive
from sightline.datasets.folder import read_splits
from sightline.datasets.sharded import read_shards
from sightline.datasets.shards import find_shards
from sightline.datasets.split import Splits
from sightline.datasets.table import read_table
from sightline.errors import UserError, printable
from sightline.registry import find, table
from sightline.schema import from_json, require

_BUILTIN = "builtin:"


def open_dataset(source: str | Path, *, task: str = "classify", seed: int = 0, held_out: float = 0.2) -> Splits:
    """Opens what a task learns from, or `builtin:NAME`; nothing is written.

    Shards (`find_shards`) are read by the task's row of the `SHARDED` tables of this room. For whatever else lies on
    disk each task has its reader in the `READERS` tables: from (path, seed, held_out) to `Splits`. The built-in
    sets are the `BUILTIN` tables: for each name and task, from (seed, held_out) to `Splits`; settings of theirs, where
    `OPTIONS` has a dataclass of the same name, are part of the source, as in `builtin:NAME:classes=10,size=32`. Where
    the data has no validation part of its own, `held_out` (0 to 1) is set apart by `seed`. Raises UserError for what is
    not there, cannot be read, or would be wrong to train on.
    """
    if str(source).startswith(_BUILTIN):
        return _built_in(str(source), task, seed, held_out)
    reader = find("datasets", "READERS", task, "task with a format on disk")
    # A single archive is one of class folders, unless it looks like a shard; only classes come in such archives.
    shards = find_shards(Path(source), SIGNS if reader is open_classes else None)
    return reader(Path(source), seed, held_out) if shards is None else read_shards(shards, task, seed, held_out)


SIGNS = ("cls",)
"""What lies beside images in a single archive that is a shard with classes."""


def open_classes(path: Path, seed: int, held_out: float) -> Splits:
    """Opens a folder of class folders, an archive of one, or a CSV file with `path,label`. Raises UserError."""
    if os.path.isdir(path):  # noqa: PTH112  (False where a folder above is closed to us, not an exception)
        return read_splits(path, seed=seed, held_out=held_out)
    if path.suffix.lower() == ".csv":
        return read_table(path, seed=seed, held_out=held_out)
    if os.path.exists(path) and path.name.lower().endswith(SUFFIXES):  # noqa: PTH110
        return read_archive(path, seed=seed, held_out=held_out)
    known = f"a folder, an archive ({', '.join(SUFFIXES)}), a CSV file, shards, or one like builtin:digits"
    problem = "is none of these" if os.path.exists(path) else "does not exist"  # noqa: PTH110
    raise UserError(f"{printable(path)} {problem}: a dataset is {known}")


READERS = {"classify": open_classes}


def _built_in(source: str, task: str, seed: int, held_out: float) -> Splits:
    name, _, words = source.removeprefix(_BUILTIN).partition(":")
    offered = find("datasets", "BUILTIN", name, "built-in dataset")
    if task not in offered:
        fitting = " or ".join(f"--task {name}" for name in offered)
        raise UserError(f"{printable(source)} has nothing that '{printable(task)}' could learn from; it has {fitting}")
    options = table("datasets", "OPTIONS").get(name)
    if options is None:
        require(not words, f"{_BUILTIN}{printable(name)} has no settings, and '{printable(words)}' was given")
        return offered[task](seed, held_out)
    told = dict(word.partition("=")[::2] for word in words.split(",") if word)
    values = {key: int(value) if re.fullmatch("[0-9]{1,9}", value) else value for key, value in told.items()}
    return replace(offered[task](seed, held_out, from_json(options, values, f"{_BUILTIN}{name}")), source=source)
