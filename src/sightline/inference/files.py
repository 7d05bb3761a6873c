"""Files in, documents out: what `predict` reads from the command line and what it writes."""

import csv
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from glob import has_magic
from io import TextIOBase, TextIOWrapper
from pathlib import Path
from typing import Any

from sightline.checkpoints.atomic import write_atomic
from sightline.datasets.scan import list_images
from sightline.errors import UserError, printable
from sightline.inference.predictor import Answer
from sightline.types import Reply

COLUMNS = ("path", "label", "index", "score", "error")


def expand(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str | Answer]:
    """The image files that files, folders and globs stand for, in the order given.

    A file is passed on as it is called, whatever it is: its reader will answer for it. A folder stands for the files
    below it that are images by their names, a glob for what it matches, both in natural order. A folder without images
    and a glob without matches become an `Answer` with an error, which `Predictor.predict` passes on.
    """
    for path in map(os.fsdecode, paths):
        if not Path(path).is_dir() and (os.path.lexists(path) or not has_magic(path)):
            yield path
            continue
        try:
            yield from map(str, list_images([path]))
        except UserError as error:
            yield Answer(path, error=str(error).removeprefix(f"{path}: "))


def to_json(answers: Iterable[Answer], model: str, task: str = "classify") -> dict[str, Any]:
    """The document of `predict --json`: the model, its task, and one object for each answer, in order."""
    return {"model": model, "task": task, "results": [_result(answer) for answer in answers]}


def _result(answer: Answer) -> dict[str, Any]:
    if answer.prediction is None:
        return {"path": answer.path, "error": answer.error}
    return {"path": answer.path, **answer.prediction.to_json()}


def saved(answers: Iterable[Answer], folder: str | os.PathLike[str]) -> Iterator[Answer]:
    """The answers, those that are files (masks) written into a folder under the stems of their images.

    A stem that is taken gets a number. Raises WorkError where a file cannot be written.
    """
    taken: set[str] = set()
    for answer in answers:
        if answer.prediction is None:
            yield answer
            continue
        stem, count = Path(answer.path).stem or "image", 1
        name = stem
        while name.casefold() in taken:
            name, count = f"{stem}-{count + 1}", count + 1
        taken.add(name.casefold())
        yield replace(answer, prediction=stored(answer.prediction, folder, name))


def stored(reply: Reply, folder: str | os.PathLike[str], stem: str) -> Reply:
    """A reply with what is a file written as `folder/stem.*`, whole or not at all. Raises WorkError."""

    def write(ending: str, data: bytes) -> str:
        path = Path(folder) / f"{stem}{ending}"
        write_atomic(path, data)
        return str(path)

    return reply.save(write)


def open_csv(path: str | os.PathLike[str]) -> TextIOWrapper:
    """A new text file for `write_csv`. Raises UserError where it cannot be made."""
    try:
        return Path(path).open("w", newline="", encoding="utf-8", errors="backslashreplace")
    except OSError as fault:
        raise UserError(f"cannot write {printable(os.fsdecode(path))}: {fault.strerror}") from fault


def write_csv(answers: Iterable[Answer], stream: TextIOBase) -> Iterator[Answer]:
    """Writes answers to an open text file as they pass through, so that an interrupted run keeps what it had.

    The columns are `COLUMNS`; a row for each class of an answer, the most probable first; an error is one row.
    `open_csv` makes a fit file. No cell is one that a spreadsheet would compute: a path that begins like a formula is
    written as `./path`, which is the same file, and a label with an apostrophe before it; `index` tells the class
    exactly.
    """
    plain, quoted = csv.writer(stream), csv.writer(stream, quoting=csv.QUOTE_ALL)
    plain.writerow(COLUMNS)
    for answer in answers:
        path = f"./{answer.path}" if _computes(answer.path) else answer.path
        if answer.prediction is None:
            rows = [[path, "", "", "", _inert(answer.error or "")]]
        else:
            rows = [[path, _inert(s.label), s.index, s.score, ""] for s in answer.prediction.rows()]
        for row in rows:
            # Where a spreadsheet takes semicolons or tabs for the ends of cells, quotes keep the first one together.
            (quoted if any(mark in str(cell) for cell in row for mark in ";\t") else plain).writerow(row)
        stream.flush()
        yield answer


def _inert(text: str) -> str:
    text = re.sub(r"([;\t\r\n]\s*)(?=[=+\-@＝＋－＠])", r"\1'", text)
    return f"'{text}" if _computes(text) else text


def _computes(text: str) -> bool:
    """Whether a spreadsheet would take a cell for a formula; full-width signs count as plain ones in some."""
    return text.lstrip()[:1] in set("=+-@＝＋－＠") or text[:1] in set("\t\r\n")
