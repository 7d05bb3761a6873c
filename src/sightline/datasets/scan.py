"""Finds image files below a folder, and says what else lies there; nothing is ever written.

Links are followed within the root of a dataset. One that leads out of it is not, because whoever made the folder would
then choose what is read elsewhere, unless `SIGHTLINE_FOLLOW_LINKS=1` says that this is meant.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path

from sightline.datasets.naming import natural, some
from sightline.errors import UserError, printable

# fmt: off
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".avif",
)
# fmt: on
CLUTTER = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "@eadir"})


@dataclass
class Skipped:
    """What was met besides the images of classes."""

    hidden: int = 0
    loops: int = 0
    loose: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Sentences for people."""
        told = []
        if self.loose:
            told.append(f"images left out, being in no class folder: {some(sorted(self.loose), 3)}")
        if self.others:
            told.append(f"left out, being no image files: {some(sorted(self.others), 3)}")
        if self.odd:
            told.append(f"left out, being pipes, devices or links that lead nowhere: {some(sorted(self.odd), 20)}")
        if self.folders:
            told.append(f"folders that are named like images: {some(sorted(self.folders), 3)}")
        if self.outside:
            told.append(f"left out, being links that lead out of the folder: {some(sorted(self.outside), 3)}; {_MEANT}")
        if self.hidden:
            told.append(f"hidden files and folders left out: {self.hidden}")
        if self.loops:
            told.append(f"links to folders that are read already, not followed: {self.loops}")
        return told

    def hint(self) -> str:
        """What to add to a complaint that there are too few images."""
        if many := len(self.outside):
            return f"; {many:,} links that lead out of the folder are not followed: {_MEANT}"
        names = [name.lower() for name in self.others]
        if any(name.endswith(".cls") for name in names):
            return "; images with KEY.cls beside them are read from shards, which are .tar and not compressed"
        if any(name.endswith(".tar") for name in names):
            return "; archives in a folder are read as shards where no images lie in it"
        return ""


_MEANT = "if they are meant, set SIGHTLINE_FOLLOW_LINKS=1"


def contents(folder: str, skipped: Skipped, *, home: str | None = None) -> tuple[list[str], list[str]]:
    """The names of the folders and of the image files in a folder, sorted. Raises UserError where it is unreadable.

    Links that lead out of `home` are left out.
    """
    bounds = None if home is None or os.environ.get("SIGHTLINE_FOLLOW_LINKS") == "1" else os.path.realpath(home)
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in CLUTTER:
                    skipped.hidden += 1
                elif bounds is not None and entry.is_symlink() and leads_out(entry.path, bounds):
                    skipped.outside.append(entry.name)
                elif _is(entry, directory=True):
                    folders.append(entry.name)
                    if entry.name.lower().endswith(EXTENSIONS):
                        skipped.folders.append(entry.name)
                elif not entry.name.lower().endswith(EXTENSIONS):
                    skipped.others.append(entry.name)
                elif _is(entry, directory=False):
                    images.append(entry.name)
                else:
                    skipped.odd.append(entry.name)
    except OSError as error:
        raise UserError(f"{printable(folder)}: cannot read the folder: {error.strerror or error}") from error
    return sorted(folders), sorted(images)


def _is(entry: os.DirEntry, *, directory: bool) -> bool:
    if entry.is_symlink():  # a link that leads nowhere or round in circles is neither
        return os.path.isdir(entry.path) if directory else os.path.isfile(entry.path)  # noqa: PTH112, PTH113
    return entry.is_dir() if directory else entry.is_file()


def leads_out(link: str, home: str) -> bool:
    """Whether a link leads to something that is there, and is not below `home`."""
    real = os.path.realpath(link)
    return real != home and not real.startswith(f"{home.rstrip(os.sep)}{os.sep}") and os.path.exists(real)  # noqa: PTH110


def images_below(root: str, skipped: Skipped, below: str = "", *, anywhere: bool = False) -> list[str]:
    """Image files in the folder `below` (as 'a/b/') of a root and all under it, relative to the root, sorted.

    Links to folders are followed, after all that lies there without them; every folder is read once, and none that
    contains `below`. Links that lead out of the root are left out, unless `anywhere` is allowed. Raises UserError for
    a folder that cannot be read.
    """
    home = os.path.realpath(root)
    steps = below.split("/")[:-1]
    containing = ["/".join(steps[:i]) for i in range(len(steps))]
    entered = {*map(str, Path(home).parents), *(os.path.realpath(_join(root, path)) for path in containing)}
    found: list[str] = []
    plain, linked = [below], []
    while plain or linked:
        here = plain.pop() if plain else linked.pop(0)
        real = os.path.realpath(_join(root, here))
        if real in entered:
            skipped.loops += 1
            continue
        entered.add(real)
        folders, images = contents(_join(root, here), skipped, home=None if anywhere else home)
        found += [f"{here}{name}" for name in images]
        for name in folders:
            (linked if os.path.islink(_join(root, here + name)) else plain).append(f"{here}{name}/")  # noqa: PTH114
    return sorted(found)


def _join(root: str, path: str) -> str:
    return os.path.join(root, path)  # noqa: PTH118  (a Path per folder entry costs more than reading it)


def list_images(sources: Iterable[str | Path]) -> list[Path]:
    """Image files named one by one, by folder (with all below it) or by glob (`**` for any depth), each once.

    The order is that of the sources, and natural within each. What is named is kept, whatever it is called and whether
    or not it exists: its reader will answer for it. Raises UserError for a folder without images or without permission,
    and for a glob that matches nothing.
    """
    files: dict[str, Path] = {}
    for source in map(str, sources):
        magic = has_magic(source) and not os.path.lexists(source)
        named = sorted(glob(source, recursive=True), key=natural) if magic else [source]  # noqa: PTH207
        found = [file for name in named for file in _expand(name)]
        if not found:
            raise UserError(f"{printable(source)}: {'nothing matches' if not named else 'no images found'}")
        for file in found:
            files.setdefault(os.path.abspath(file), Path(file))  # noqa: PTH100  (links stay what they are)
    return list(files.values())


def _expand(name: str) -> list[str]:
    if not os.path.isdir(name):  # noqa: PTH112  (False, not an exception, for names that cannot exist)
        return [name]
    return [_join(name, file) for file in sorted(images_below(name, Skipped(), anywhere=True), key=natural)]
