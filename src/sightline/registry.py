"""Finds the parts of each room by reading its folder, so that adding one means adding a file and nothing else.

Every room keeps its parts in module-level tables (`VARIANTS`, `FAMILIES`, `TOKENIZERS`, `HEADS`, `OBJECTIVES`,
`SCHEMES`, …). `table("tokenizers", "TOKENIZERS")` imports each file of the room and merges the tables it finds.
"""

import fnmatch
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sightline.errors import UserError, printable, suggest


@dataclass(frozen=True)
class Variant:
    """One published architecture: a family, its settings, and the number that proves them.

    `settings` override the defaults of the family's configuration; `head` those of its head, which is the one for
    `task`; `preprocess` is the pixel contract its published weights expect. `parameters` is the exact count, with
    `num_classes` outputs where the head has classes, asserted by the contract tests.
    """

    family: str
    parameters: int
    paper: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int = 1000
    sources: tuple[str, ...] = ()
    task: str = "classify"


@cache
def table(room: str, name: str) -> Mapping[str, Any]:
    """All entries of the tables called `name` in the files of `sightline.<room>`, in order of file and row.

    Raises AssertionError where two files claim the same entry.
    """
    package = importlib.import_module(f"sightline.{room}")
    merged: dict[str, Any] = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if not _speaks_of(f"sightline.{room}.{module.name}", name):
            continue  # a reading of names should not cost the framework
        entries = getattr(importlib.import_module(f"sightline.{room}.{module.name}"), name, {})
        clash = merged.keys() & entries.keys()
        assert not clash, f"{room}/{module.name}.py repeats {name} entries of another file: {sorted(clash)}"
        merged.update(entries)
    return MappingProxyType(merged)


def _speaks_of(module: str, name: str) -> bool:
    """Whether a module's text has a name in it; True where its text cannot be read."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return True
    try:
        return name in Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return True


def find(room: str, name: str, key: str, what: str) -> Any:
    """The entry `key` of a room's table; an unknown key is the user's fault and is answered with near names."""
    entries = table(room, name)
    if key not in entries:
        known = ", ".join(sorted(entries)[:12])
        raise UserError(f"unknown {what} '{printable(key)}'.{suggest(key, entries)} Known: {known} …")
    return entries[key]


def layouts(library: str) -> dict[str, Any]:
    """The entries of every `LAYOUTS` table that a library's files are read and written with."""
    tables = [table(room, "LAYOUTS") for room in ("backbones", "tokenizers", "checkpoints")]
    rows = {key: row for entries in tables for key, row in entries.items()}
    return {key: rows[key] for key in sorted(rows) if library in rows[key].libraries}


def variants(pattern: str = "*") -> dict[str, Variant]:
    """The rows of every `VARIANTS` table whose name matches a shell pattern, in order of names."""
    rows = {**table("backbones", "VARIANTS"), **table("tokenizers", "VARIANTS"), **table("heads", "VARIANTS")}
    return {name: rows[name] for name in sorted(fnmatch.filter(rows, pattern))}


def variant(name: str) -> Variant:
    """The row called `name`. Raises UserError with near names where there is none."""
    rows, name = variants(), name.replace("/", "-")
    if name not in rows:
        raise UserError(
            f"unknown model '{printable(name)}'.{suggest(name, rows)} `sightline models` lists all {len(rows)}."
        )
    return rows[name]
