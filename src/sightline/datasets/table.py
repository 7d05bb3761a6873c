"""A CSV file of images and their classes."""

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.naming import class_names
from sightline.datasets.rows import csv_lines, each_row, name_in, part_of, refuse, validation_among
from sightline.datasets.split import Splits, check_classes, check_several, hold_out
from sightline.errors import UserError, printable


class Row(NamedTuple):
    """One line: the image relative to the folder of the table, its class, and its part ('' where none is told)."""

    name: str
    label: str
    part: str
    line: int


def read_table(file: Path, *, seed: int, held_out: float) -> Splits:
    """Images from a UTF-8 CSV file with the columns `path,label` and, if wanted, `split` (train, val, …).

    Paths are relative to the table and stay in its folder. Without a `split` column a share is held out. An image that
    is listed twice alike counts once. Raises UserError, with each line, for rows that cannot be meant: no label, an
    image that does not exist, lies elsewhere, or is listed with two labels or in two parts.
    """
    where = printable(file)
    rows: dict[str, Row] = {}
    faults: list[tuple[int, str]] = []
    repeated = 0
    for row in read_rows(file, faults):
        first = rows.setdefault(row.name, row)
        repeated += first is not row
        if (first.label, first.part) != (row.label, row.part):
            told = f"'{printable(row.name)}' stands differently in line {first.line}"
            faults.append((row.line, f"{where}, line {row.line}: {told}"))
    notes = [f"rows that repeat another one, left out: {repeated}"] if repeated else []
    faults += [
        (row.line, f"{where}, line {row.line}: there is no such file: '{printable(row.name)}'")
        for row in rows.values()
        if not os.path.isfile(file.parent / row.name)  # noqa: PTH113
    ]
    refuse(faults)
    parts = {row.part for row in rows.values()}
    if parts <= {""}:
        return hold_out(_image_set(file, rows.values()), str(file), seed=seed, share=held_out, notes=notes)
    validation, left_out = validation_among(parts, f"{where}: the column 'split' has no")
    train, val = (
        _image_set(file, [row for row in rows.values() if row.part == part]) for part in ("train", validation)
    )
    check_classes(train.classes, val.classes, where)
    return Splits(train, val, str(file), [*notes, *left_out])


def _image_set(file: Path, rows: Iterable[Row]) -> ImageSet:
    rows = sorted(rows)
    classes = class_names((row.label for row in rows), printable(file))
    check_several(tuple(classes), printable(file))
    number = {label: i for i, label in enumerate(classes)}
    targets = np.array([number[row.label] for row in rows], dtype=np.int64)
    return ImageSet(tuple(classes.values()), Samples(Names(row.name for row in rows), targets, file.parent))


def read_rows(file: Path, faults: list[tuple[int, str]] | None = None) -> Iterator[Row]:
    """The rows of a table, in order.

    Raises UserError for a table or a row that cannot be meant; where `faults` is given, such a row is left out, and its
    line and what is wrong with it are added there.
    """
    return each_row(file, "table", partial(csv_lines, column="label"), _row, faults)


def _row(cells: Mapping[Any, Any], home: str, where: str, line: int) -> Row:
    path, label = cells["path"], cells["label"].strip()
    if not path or not label:
        raise UserError(f"{where}: {'the label' if path else 'the path'} is missing")
    return Row(name_in(home, path, where, "table"), label, part_of(cells, where), line)
