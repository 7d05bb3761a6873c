"""An archive of images, read as if it were a folder, without ever being unpacked to disk."""

import os
import stat
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from sightline.datasets.folder import Place, arrange
from sightline.datasets.gzipped import Inflated, remember
from sightline.datasets.image_set import Names, Samples
from sightline.datasets.member import Bounds, Listing, Member
from sightline.datasets.scan import Skipped
from sightline.datasets.split import TRAINING, VALIDATION, Splits
from sightline.datasets.tarred import Plain, list_tar
from sightline.datasets.zipped import list_zip
from sightline.errors import printable

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
"""What the name of an archive ends in; which of them it is, its content says."""

_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar", b"\x28\xb5\x2f\xfd": "zstd"}


class Archive(Mapping[str, Member]):
    """The images of an archive by their names, as columns: light, and not copied when processes are forked."""

    def __init__(self, path: Path, names: Names, rows: Int64[np.ndarray, "n 5"]):
        self.path, self.names, self._rows = path, names, rows
        self._places = {name: i for i, name in enumerate(names)}

    def __getitem__(self, name: str) -> Member:
        return Member(str(self.path), name, *self._rows[self._places[name]].tolist())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def below(self, folder: str) -> range:
        """The places in `names` of what lies in a folder ('a/b/', or '' for all)."""
        first = os.fsencode(folder)
        return range(
            bisect_left(self.names, first, key=os.fsencode),
            bisect_left(self.names, first[:-1] + b"0", key=os.fsencode) if folder else len(self),  # '0' follows '/'
        )


def read_archive(path: Path, *, seed: int, held_out: float) -> Splits:
    """The images of a ZIP, tar or gzipped tar archive that is laid out as a folder would be; see `read_splits`.

    One folder around everything is passed over. Raises UserError for the layout as `read_splits` does; for an archive
    that is damaged or cut; for members that are no files, are encrypted, are there twice, or have names that lead out
    of it; and for more than `Bounds` allow. A member that is damaged inside is refused when it is read.
    """
    return arrange(archive_place(path), seed=seed, held_out=held_out)


def archive_place(path: Path) -> Place:
    """An archive as a place of class folders. Raises UserError."""
    return _Place(*open_archive(path))


def open_archive(path: Path) -> tuple[Archive, set[str], Skipped]:
    """Lists an archive: its images, its folders (down to three levels), and what else there is. Raises UserError."""
    listing = Listing(path, Bounds())
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise listing.refuse("it is not a regular file")
        with path.open("rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(8)
            file.seek(0)
            if other := next((name for mark, name in _OTHERS.items() if head.startswith(mark)), None):
                raise listing.refuse(f"{other} is not read; pack it as {', '.join(SUFFIXES)}")
            if head[:4] in (b"PK\3\4", b"PK\5\6"):
                list_zip(file, size, listing)
            elif head[:2] == b"\x1f\x8b":
                content = Inflated(path, listing.bounds.ratio)
                try:
                    list_tar(content, size, listing)
                finally:
                    content.close()
                remember(content)
            else:
                list_tar(Plain(file), size, listing)
    except OSError as error:
        raise listing.refuse(f"cannot read the archive: {error.strerror or error}") from error
    names, rows = listing.columns()
    return Archive(path, names, rows), listing.folders, listing.skipped


class _Place(Place):
    """An archive for `arrange`."""

    def __init__(self, archive: Archive, folders: set[str], skipped: Skipped):
        self.where, self.source = printable(archive.path), str(archive.path)
        self._archive, self._folders, self._found = archive, folders, skipped
        self._top = ""
        top = [name for name in folders if "/" not in name]
        known = (*TRAINING, *VALIDATION)
        if len(top) == 1 and top[0].casefold() not in known and any(name.startswith(f"{top[0]}/") for name in folders):
            self._top = f"{top[0]}/"

    def contents(self, part: str, skipped: Skipped) -> tuple[list[str], list[str]]:
        """The folders and images right inside a part ('' for everything)."""
        if not part:
            skipped.hidden += self._found.hidden
            skipped.others += self._found.others
        here = f"{self._top}{part}/" if part else self._top
        folders = [
            name[len(here) :] for name in self._folders if name.startswith(here) and "/" not in name[len(here) :]
        ]
        below = (self._archive.names[i] for i in self._archive.below(here))
        return sorted(folders), sorted(name[len(here) :] for name in below if "/" not in name[len(here) :])

    def images_below(self, folder: str, skipped: Skipped) -> list[str]:
        """All images in a folder ('a/b/') and below, by their names in the archive."""
        return sorted(self._archive.names[i] for i in self._archive.below(f"{self._top}{folder}"))

    def samples(self, names: Names, targets: Int64[np.ndarray, " n"]) -> Samples:
        """These images as samples."""
        return Samples(names, targets, stored=self._archive)
