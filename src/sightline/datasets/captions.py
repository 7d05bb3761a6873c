"""Images with captions: a CSV or JSONL file of paths and texts."""

import csv
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from jaxtyping import Int64

from sightline.datasets.findings import Finding
from sightline.datasets.image_set import ImageSet, Marks, Names, Samples
from sightline.datasets.naming import some
from sightline.datasets.split import TRAINING, VALIDATION, Splits
from sightline.errors import UserError, printable

TOLD = 50
"""Most faulty rows that a message names."""

LINE = 2**20
"""Most characters of a line."""

LONGEST = 10_000
"""Most characters of a caption."""

_FILES = ("captions.jsonl", "captions.csv")


@dataclass(frozen=True, eq=False)
class Captions(Marks):
    """What is said of an image, in one text or several."""

    captions: tuple[str, ...]

    def content(self) -> bytes:
        return hashlib.sha256("\0".join(self.captions).encode("utf-8", "surrogateescape")).hexdigest().encode()

    def renumbered(self, places: Int64[np.ndarray, " k"]) -> "Captions":
        return self


def captions_of(marks: Any) -> tuple[str, ...]:
    """What is said of an image, whatever else is marked in it."""
    return marks.captions


class Row(NamedTuple):
    """One line: the image relative to the folder of the file, a caption, its part ('' where none is told)."""

    name: str
    caption: str
    part: str
    line: int


def has_captions(path: Path) -> bool:
    """Whether this is a JSONL file, a folder with `captions.csv` or `captions.jsonl`, or a CSV of captions."""
    if os.path.isdir(path):  # noqa: PTH112  (False where a folder above is closed to us, not an exception)
        return any((path / name).is_file() for name in _FILES)
    if path.suffix.lower() == ".jsonl":
        return True
    if path.suffix.lower() != ".csv" or not os.path.isfile(path):  # noqa: PTH113
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as text:
        return "caption" in [name.strip().strip('"').lower() for name in text.readline(LINE).split(",")]


def read_captions(path: Path, seed: int, held_out: float) -> Splits:
    """Images with their captions from a UTF-8 file: CSV with the columns `path,caption`, or JSONL with those keys.

    A folder stands for its `captions.jsonl` or `captions.csv`. Paths are relative to the file and stay in its folder.
    An image that is listed several times has several captions. A column `split` (train, val, …) tells the parts apart;
    without it a share of the images is held out by seed and name. Raises UserError, with each line, for rows that
    cannot be meant: an empty caption, one that is not UTF-8, an image that is missing, elsewhere, or in two parts.
    """
    file = _file(path)
    where = printable(file)
    if not has_captions(file):
        problem = "has no captions" if os.path.exists(file) else "does not exist"  # noqa: PTH110
        raise UserError(f"{where} {problem}: images with texts are a CSV with path,caption or a JSONL file of the same")
    told = _gathered(file)
    if told.faults:
        more = [f"… and {len(told.faults) - TOLD:,} more"] if len(told.faults) > TOLD else []
        raise UserError("\n".join([*(text for _, text in told.faults[:TOLD]), *more]))
    notes = [f"rows that repeat another one, left out: {told.repeated}"] if told.repeated else []
    return _split(file, told.captions, told.parts, seed, held_out, notes)


def list_captions(path: Path) -> Iterator[tuple[str, ImageSet, list[Finding]]]:
    """The parts of a file that may have faults, with what is wrong in it: for `check`."""
    file = _file(path)
    told = _gathered(file)
    findings = [Finding("caption" if "the caption" in text else "row", text) for _, text in told.faults]
    if told.repeated:
        findings.append(Finding("repeated-row", f"{told.repeated:,} rows repeat another one"))
    for part in sorted(set(told.parts.values()), key=lambda name: (name not in TRAINING, name)) or [""]:
        names = [name for name, other in told.parts.items() if other == part]
        yield part or "all", _image_set(file, names, told.captions), findings
        findings = []


class _Told(NamedTuple):
    """What a file says of each image, and what is wrong with its rows."""

    captions: dict[str, list[str]]
    parts: dict[str, str]
    faults: list[tuple[int, str]]
    repeated: int


def _file(path: Path) -> Path:
    return next((path / name for name in _FILES if (path / name).is_file()), path) if path.is_dir() else path


def _gathered(file: Path) -> _Told:
    where = printable(file)
    captions: dict[str, list[str]] = {}
    parts: dict[str, str] = {}
    lines: dict[str, int] = {}
    faults: list[tuple[int, str]] = []
    repeated = 0
    for row in read_rows(file, faults):
        line = lines.setdefault(row.name, row.line)
        if parts.setdefault(row.name, row.part) != row.part:
            told = f"'{printable(row.name)}' stands in another part in line {line}"
            faults.append((row.line, f"{where}, line {row.line}: {told}"))
        said = captions.setdefault(row.name, [])
        repeated += row.caption in said
        if row.caption not in said:
            said.append(row.caption)
    for name, line in lines.items():
        if not os.path.isfile(file.parent / name):  # noqa: PTH113
            faults.append((line, f"{where}, line {line}: there is no such file: '{printable(name)}'"))
            del captions[name], parts[name]
    return _Told(captions, parts, sorted(faults), repeated)


def _split(
    file: Path, captions: Mapping[str, list[str]], parts: Mapping[str, str], seed: int, share: float, notes: list[str]
) -> Splits:
    where = printable(file)
    if not 0 < share < 1:
        raise UserError(f"the held-out share must lie between 0 and 1, not {share}")
    if len(captions) < 2:
        raise UserError(
            f"{where}: {len(captions)} images have captions, and two are the least to learn from and judge by"
        )
    found = set(parts.values())
    if found <= {""}:
        taken = min(max(int(len(captions) * share + 0.5), 1), len(captions) - 1)
        held = set(sorted(captions, key=lambda name: _rank(name, seed))[:taken])
        rows = [[name for name in captions if (name in held) == val] for val in (False, True)]
        told = f"{share:.0%} of the images are held out for validation, by seed {seed}"
        train, val = (_image_set(file, names, captions) for names in rows)
        return Splits(train, val, str(file), [*notes, told], drawn=True)
    validation = next((name for name in VALIDATION if name in found), None)
    if validation is None or "train" not in found:
        raise UserError(f"{where}: 'split' never says '{'train' if validation else 'val'}'")
    if unused := found - {"train", validation}:
        notes = [*notes, f"parts left out: {some(sorted(unused))}"]
    train, val = (
        _image_set(file, [name for name in captions if parts[name] == part], captions) for part in ("train", validation)
    )
    return Splits(train, val, str(file), notes)


def _rank(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0".encode() + os.fsencode(name), digest_size=8).digest()


def _image_set(file: Path, names: list[str], captions: Mapping[str, list[str]]) -> ImageSet:
    names = sorted(names)
    marks = [Captions(tuple(captions[name])) for name in names]
    return ImageSet((), Samples(Names(names), np.full(len(names), -1), file.parent, marks=marks))


def read_rows(file: Path, faults: list[tuple[int, str]] | None = None) -> Iterator[Row]:
    """The rows of a file, in order.

    Raises UserError for a file or a row that cannot be meant; where `faults` is given, such a row is left out, and its
    line and what is wrong with it are added there.
    """
    where = printable(file)
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would block, a device never end
            raise UserError(f"{where}: it is not a regular file")
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            home = f"{os.path.abspath(file.parent).rstrip(os.sep)}{os.sep}"  # noqa: PTH100  (links stay what they are)
            lines = _from_json(text, where) if file.suffix.lower() == ".jsonl" else _from_csv(text, where)
            for number, cells in lines:
                try:
                    row = _row(cells, home, f"{where}, line {number}", number)
                except UserError as fault:
                    if faults is None:
                        raise
                    faults.append((number, str(fault)))
                else:
                    yield row
    except OSError as error:
        raise UserError(f"{where}: cannot read the file: {error.strerror or error}") from error
    except csv.Error as error:
        raise UserError(f"{where}: not a CSV table: {error}") from error


def _lines(text: TextIO, where: str) -> Iterator[str]:
    """Lines of bounded length: a file of one line, or of holes, does not end up in memory."""
    while line := text.readline(LINE):
        if len(line) == LINE:
            raise UserError(f"{where}: a line has more than {LINE:,} characters")
        yield line


def _from_csv(text: TextIO, where: str) -> Iterator[tuple[int, Mapping[Any, Any] | str]]:
    reader = csv.DictReader(_lines(text, where), strict=True)
    columns = [name.strip().lower() for name in reader.fieldnames or []]
    if columns.count("path") != 1 or columns.count("caption") != 1:
        found = f"'{printable(','.join(columns))}'" if columns else "nothing"
        raise UserError(f"{where}: the first line has to name the columns path,caption and reads {found}")
    reader.fieldnames = columns
    for cells in reader:
        wrong = "more" if None in cells else "fewer" if None in cells.values() else None
        yield reader.line_num, cells if wrong is None else f"{wrong} cells than columns"


def _from_json(text: TextIO, where: str) -> Iterator[tuple[int, Mapping[Any, Any] | str]]:
    for number, line in enumerate(_lines(text, where), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as fault:
            yield number, f"it is not JSON: {printable(fault)}"
            continue
        whole = isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("path", "caption"))
        whole = whole and isinstance(found.get("split", ""), str)
        yield number, found if whole else "an object with the texts path and caption is expected"


def _row(cells: Mapping[Any, Any] | str, home: str, where: str, line: int) -> Row:
    if isinstance(cells, str):
        raise UserError(f"{where}: {cells}")
    path, caption = cells["path"], cells["caption"].strip()
    if not path or "\0" in path:
        raise UserError(f"{where}: the path is {'missing' if not path else 'not one'}")
    if not caption:
        raise UserError(f"{where}: the caption is empty")
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise UserError(f"{where}: the caption is not UTF-8 (save the file in that encoding)")
    if len(caption) > LONGEST:
        raise UserError(f"{where}: a caption of {len(caption):,} characters is longer than any ({LONGEST:,})")
    whole = os.path.normpath(os.path.join(home, path))  # noqa: PTH118
    if not whole.startswith(home):
        raise UserError(f"{where}: '{printable(path)}' lies outside of the folder of the file")
    part = cells.get("split", "").strip().lower()
    part = "train" if part in TRAINING else part
    if "split" in cells and part not in ("train", *VALIDATION):
        raise UserError(f"{where}: the split is '{printable(part)}', not train, {', '.join(VALIDATION)}")
    return Row(whole.removeprefix(home), caption, part, line)


READERS = {"clip": read_captions}
STOCKS = {"captions": (has_captions, list_captions)}
