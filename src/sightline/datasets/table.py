"""A CSV file of images and their classes."""

import csv
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.naming import class_names, some
from sightline.datasets.split import TRAINING, VALIDATION, Splits, check_classes, check_several, hold_out
from sightline.errors import UserError, printable

TOLD = 50
"""Most faulty rows that a message names."""

LINE = 2**20
"""Most characters of a line."""


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
    if faults:
        faults.sort()
        more = [f"… and {len(faults) - TOLD:,} more"] if len(faults) > TOLD else []
        raise UserError("\n".join([*(text for _, text in faults[:TOLD]), *more]))
    parts = {row.part for row in rows.values()}
    if parts <= {""}:
        return hold_out(_image_set(file, rows.values()), str(file), seed=seed, share=held_out, notes=notes)
    validation = next((name for name in VALIDATION if name in parts), None)
    if validation is None or "train" not in parts:
        raise UserError(f"{where}: the column 'split' has no '{'train' if validation else 'val'}'")
    if unused := parts - {"train", validation}:
        notes.append(f"parts left out: {some(sorted(unused))}")
    train, val = (
        _image_set(file, [row for row in rows.values() if row.part == part]) for part in ("train", validation)
    )
    check_classes(train.classes, val.classes, where)
    return Splits(train, val, str(file), notes)


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
    where = printable(file)
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would block, a device never end
            raise UserError(f"{where}: it is not a regular file")
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            reader = csv.DictReader(_lines(text, where), strict=True)
            columns = [name.strip().lower() for name in reader.fieldnames or []]
            if columns.count("path") != 1 or columns.count("label") != 1:
                found = f"'{printable(','.join(columns))}'" if columns else "nothing"
                raise UserError(f"{where}: the first line has to name the columns path,label and reads {found}")
            reader.fieldnames = columns
            home = f"{os.path.abspath(file.parent).rstrip(os.sep)}{os.sep}"  # noqa: PTH100  (links stay what they are)
            for cells in reader:
                try:
                    row = _row(cells, home, f"{where}, line {reader.line_num}", reader.line_num)
                except UserError as fault:
                    if faults is None:
                        raise
                    faults.append((reader.line_num, str(fault)))
                else:
                    yield row
    except OSError as error:
        raise UserError(f"{where}: cannot read the table: {error.strerror or error}") from error
    except csv.Error as error:
        raise UserError(f"{where}: not a CSV table: {error}") from error


def _lines(text: TextIO, where: str) -> Iterator[str]:
    """Lines of bounded length: a file of one line, or of holes, does not end up in memory."""
    while line := text.readline(LINE):
        if len(line) == LINE:
            raise UserError(f"{where}: not a CSV table: a line has more than {LINE:,} characters")
        yield line


def _row(cells: Mapping[str | None, Any], home: str, where: str, line: int) -> Row:
    if None in cells or None in cells.values():
        raise UserError(f"{where}: {'more' if None in cells else 'fewer'} cells than columns")
    path, label = cells["path"], cells["label"].strip()
    if not path or not label:
        raise UserError(f"{where}: {'the label' if path else 'the path'} is missing")
    whole = os.path.normpath(os.path.join(home, path))  # noqa: PTH118
    if not whole.startswith(home):
        raise UserError(f"{where}: '{printable(path)}' lies outside of the folder of the table")
    part = cells.get("split", "").strip().lower()
    part = "train" if part in TRAINING else part
    if "split" in cells and part not in ("train", *VALIDATION):
        raise UserError(f"{where}: the split is '{printable(part)}', not train, {', '.join(VALIDATION)}")
    return Row(whole.removeprefix(home), label, part, line)
