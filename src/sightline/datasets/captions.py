"""Images with captions: a CSV or JSONL file of paths and texts."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from jaxtyping import Int64

from sightline.datasets.findings import Finding
from sightline.datasets.image_set import ImageSet, Marks, Names, Samples
from sightline.datasets.rows import (
    LINE,
    Cells,
    bounded,
    csv_lines,
    each_row,
    name_in,
    part_of,
    refuse,
    validation_among,
)
from sightline.datasets.split import TRAINING, Splits
from sightline.errors import UserError, printable

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
    refuse(told.faults)
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
    validation, left_out = validation_among(found, f"{where}: 'split' never says")
    train, val = (
        _image_set(file, [name for name in captions if parts[name] == part], captions) for part in ("train", validation)
    )
    return Splits(train, val, str(file), [*notes, *left_out])


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
    lines = _from_json if file.suffix.lower() == ".jsonl" else partial(csv_lines, column="caption")
    return each_row(file, "file", lines, _row, faults)


def _from_json(text: TextIO, where: str) -> Iterator[tuple[int, Cells]]:
    for number, line in enumerate(bounded(text, where), start=1):
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


def _row(cells: Mapping[Any, Any], home: str, where: str, line: int) -> Row:
    path, caption = cells["path"], cells["caption"].strip()
    if not path or "\0" in path:
        raise UserError(f"{where}: the path is {'missing' if not path else 'not one'}")
    if (fault := caption_fault(caption)) is not None:
        raise UserError(f"{where}: {fault}")
    return Row(name_in(home, path, where, "file"), caption, part_of(cells, where), line)


def caption_fault(caption: str) -> str | None:
    """Why a caption cannot be meant; None where it can."""
    if not caption:
        return "the caption is empty"
    if any("\ud800" <= character <= "\udfff" for character in caption):
        return "the caption is not UTF-8 (save the file in that encoding)"
    if len(caption) > LONGEST:
        return f"a caption of {len(caption):,} characters is longer than any ({LONGEST:,})"
    return None


READERS = {"clip": read_captions}
STOCKS = {"captions": (has_captions, list_captions)}
