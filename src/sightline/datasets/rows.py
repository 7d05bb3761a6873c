"""Tables of images with something said of each: read line by line, in bounds, every faulty row named."""

import csv
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

from sightline.datasets.naming import some
from sightline.datasets.split import TRAINING, VALIDATION
from sightline.errors import UserError, printable

TOLD = 50
"""Most faulty rows that a message names."""

LINE = 2**20
"""Most characters of a line."""

Cells = Mapping[Any, Any] | str
"""A row's values by column, or what is wrong with it."""

Row = TypeVar("Row")


def each_row(
    file: Path,
    what: str,
    lines: Callable[[TextIO, str], Iterator[tuple[int, Cells]]],
    make: Callable[[Mapping[Any, Any], str, str, int], Row],
    faults: list[tuple[int, str]] | None = None,
) -> Iterator[Row]:
    """The rows of a UTF-8 file, which messages call `what`, in order.

    `lines(text, where)` gives the number and the cells of each, `make(cells, home, where, number)` the row; `home` is
    the file's folder. Raises UserError for a file or a row that cannot be meant; where `faults` is given, such a row is
    left out, and its line and what is wrong with it are added there.
    """
    where = printable(file)
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would block, a device never end
            raise UserError(f"{where}: it is not a regular file")
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            home = f"{os.path.abspath(file.parent).rstrip(os.sep)}{os.sep}"  # noqa: PTH100  (links stay what they are)
            for number, cells in lines(text, where):
                here = f"{where}, line {number}"
                try:
                    if isinstance(cells, str):
                        raise UserError(f"{here}: {cells}")
                    row = make(cells, home, here, number)
                except UserError as fault:
                    if faults is None:
                        raise
                    faults.append((number, str(fault)))
                else:
                    yield row
    except OSError as error:
        raise UserError(f"{where}: cannot read the {what}: {error.strerror or error}") from error
    except csv.Error as error:
        raise UserError(f"{where}: not a CSV table: {error}") from error


def bounded(text: TextIO, where: str) -> Iterator[str]:
    """Lines of bounded length: a file of one line, or of holes, does not end up in memory."""
    while line := text.readline(LINE):
        if len(line) == LINE:
            raise UserError(f"{where}: a line has more than {LINE:,} characters")
        yield line


def csv_lines(text: TextIO, where: str, column: str) -> Iterator[tuple[int, Cells]]:
    """The rows of a CSV table that has the columns `path` and `column`."""
    reader = csv.DictReader(bounded(text, f"{where}: not a CSV table"), strict=True)
    columns = [name.strip().lower() for name in reader.fieldnames or []]
    if columns.count("path") != 1 or columns.count(column) != 1:
        found = f"'{printable(','.join(columns))}'" if columns else "nothing"
        raise UserError(f"{where}: the first line has to name the columns path,{column} and reads {found}")
    reader.fieldnames = columns
    for cells in reader:
        wrong = "more" if None in cells else "fewer" if None in cells.values() else None
        yield reader.line_num, cells if wrong is None else f"{wrong} cells than columns"


def name_in(home: str, path: str, where: str, what: str) -> str:
    """A path relative to the folder of the file, which messages call `what`. Raises UserError where it leads out."""
    whole = os.path.normpath(os.path.join(home, path))  # noqa: PTH118
    if not whole.startswith(home):
        raise UserError(f"{where}: '{printable(path)}' lies outside of the folder of the {what}")
    return whole.removeprefix(home)


def part_of(cells: Mapping[Any, Any], where: str) -> str:
    """The part that a row belongs to, '' where none is told. Raises UserError for one of no known name."""
    part = cells.get("split", "").strip().lower()
    part = "train" if part in TRAINING else part
    if "split" in cells and part not in ("train", *VALIDATION):
        raise UserError(f"{where}: the split is '{printable(part)}', not train, {', '.join(VALIDATION)}")
    return part


def refuse(faults: list[tuple[int, str]]) -> None:
    """Raises UserError that names the faulty rows, in order of their lines, where there are any."""
    if faults:
        more = [f"… and {len(faults) - TOLD:,} more"] if len(faults) > TOLD else []
        raise UserError("\n".join([*(text for _, text in sorted(faults)[:TOLD]), *more]))


def validation_among(parts: set[str], complaint: str) -> tuple[str, list[str]]:
    """The part to judge by, and what is to be said of others. Raises UserError where it or `train` is missing."""
    validation = next((name for name in VALIDATION if name in parts), None)
    if validation is None or "train" not in parts:
        raise UserError(f"{complaint} '{'train' if validation else 'val'}'")
    unused = parts - {"train", validation}
    return validation, [f"parts left out: {some(sorted(unused))}"] if unused else []
