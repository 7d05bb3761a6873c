"""Zip archives opened with bounded work: their table of contents cannot be larger than any checkpoint's."""

import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sightline.errors import UserError, printable

_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    RuntimeError,  # and what is "not implemented": other ways to compress
    EOFError,
    ValueError,
    OverflowError,
)
"""What Python's reader of archives raises where bytes are not as they should be; a UserError is a ValueError too."""

_MAX_TABLE = 2 * 2**20  # bytes of the table of contents: some twenty thousand members


class _Bounded(io.FileIO):
    """A file that gives at most so many bytes at once while `bound` stands."""

    bound: int | None = _MAX_TABLE

    def read(self, size: int | None = -1, /) -> bytes:
        if self.bound is None:
            return super().read(size)
        data = super().read(min(self.bound + 1, size) if size is not None and size >= 0 else self.bound + 1)
        if len(data) > self.bound:
            raise zipfile.BadZipFile("its table of contents is longer than that of any checkpoint")
        return data


@contextmanager
def archive_of(path: Path) -> Generator[zipfile.ZipFile]:
    """An archive whose members have different names, open inside. Raises UserError for any damage met inside."""
    where = printable(path)
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            file.bound = None
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise UserError(f"{where}: a name appears twice in the archive")
            yield archive
    except UserError:
        raise
    except _DAMAGED as fault:
        raise UserError(f"{where} is damaged: {printable(fault)}") from fault
