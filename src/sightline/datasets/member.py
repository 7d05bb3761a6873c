"""A member of an archive: whether it may be one, and how it is read. Nothing is ever unpacked to disk."""

import os
import re
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from sightline.datasets.gzipped import inflated
from sightline.datasets.image_set import Names
from sightline.datasets.scan import CLUTTER, EXTENSIONS, Skipped
from sightline.errors import UserError, printable
from sightline.images.decode import Stored
from sightline.images.limits import Refusal, from_environment

FREE = 2**16
"""Bytes that a member may have however small it is packed: the pixels of a plain picture of 200×100."""

DEEP = 3
"""Levels of folders that layouts are told by: one around everything, the part, the class."""

ENDS = 2**12
"""Bytes at either end of an `INDEXED` member that its checksum covers."""

STORED, DEFLATED, GZIPPED, INDEXED = range(4)
"""How a member is kept: plain, deflated, in a tar archive that is gzipped, or plain with a checksum of its ends."""


@dataclass(frozen=True)
class Bounds:
    """What an archive may hold; each can be raised by SIGHTLINE_ARCHIVE_BYTES, …_FILES and …_RATIO, `inf` lifts it.

    `bytes` bounds all members together, unpacked; `files` their number; `ratio` unpacked over packed size.
    """

    bytes: float = field(default_factory=from_environment("SIGHTLINE_ARCHIVE_BYTES", 2**31))
    files: float = field(default_factory=from_environment("SIGHTLINE_ARCHIVE_FILES", 200_000))
    ratio: float = field(default_factory=from_environment("SIGHTLINE_ARCHIVE_RATIO", 100))


@dataclass(frozen=True)
class Member(Stored):
    """A member of an archive: where its bytes lie, how they are packed, and their CRC-32, or that of their `ends`."""

    archive: str
    name: str
    kind: int
    offset: int
    packed: int
    size: int  # ty: ignore[incompatible-attribute-override]  (nobody writes to either)
    crc: int

    @property
    def where(self) -> str:
        """The archive and the name in it, as one path."""
        return f"{self.archive}/{self.name}"

    @property
    def content(self) -> bytes:
        """What stands for the bytes: their number and checksum; for none, as for a file of none, their number alone."""
        return b"%d %08x" % (self.size, self.crc) if self.size else b"0"

    @property
    def whole(self) -> bool:
        return self.kind != INDEXED

    def read(self, limit: int) -> bytes:
        """Its first `limit` bytes at most; read whole, they are held against what the archive says of them."""
        wanted = min(limit, self.size)
        try:
            if self.kind == GZIPPED:
                data = inflated(self.archive).read(self.offset, wanted)
            else:
                # Opened for each reading: nothing is left open, and nothing is shared by processes and threads.
                with Path(self.archive).open("rb", buffering=0) as file:
                    file.seek(self.offset)
                    data = self._inflate(file, wanted) if self.kind == DEFLATED else file.read(wanted)
        except UserError as fault:
            raise Refusal(str(fault)) from fault
        except OSError as fault:
            raise Refusal(f"cannot read the archive: {fault.strerror or fault}") from fault
        except zlib.error as fault:
            raise Refusal("the archive is damaged here (its compressed data make no sense)") from fault
        if len(data) < wanted:
            raise Refusal(f"the archive is damaged here ({len(data):,} of {wanted:,} bytes)")
        if wanted == self.size and (zlib.crc32(data) if self.whole else ends(data)) != self.crc:
            raise Refusal("the archive is damaged here, or was changed meanwhile (a checksum is wrong)")
        return data

    def _inflate(self, file: IO[bytes], wanted: int) -> bytes:
        inflater, left, data = zlib.decompressobj(-zlib.MAX_WBITS), self.packed, bytearray()
        whole = wanted == self.size
        while left and not inflater.eof and (len(data) < wanted or whole):
            packed = file.read(min(left, 2**16))
            left -= len(packed)
            if not packed:
                break
            while packed and len(data) <= wanted:  # one byte more than stated is enough to know
                data += inflater.decompress(packed, wanted + whole - len(data))
                packed = inflater.unconsumed_tail if len(data) < wanted + whole else b""
            if len(data) > wanted:
                raise Refusal(f"it holds more than the {self.size:,} bytes that the archive states")
        return bytes(data)


def ends(data: bytes) -> int:
    """The CRC-32 of the first and the last `ENDS` bytes, or of all where there are no more."""
    return zlib.crc32(data[max(len(data) - ENDS, ENDS) :], zlib.crc32(data[:ENDS]))


class Listing:
    """Members of one archive as they are met, each held against the rules and the bounds; `add` raises UserError.

    Afterwards it has the images as columns, in the order of `names`, which are sorted by their bytes; `folders` are all
    down to `DEEP` levels, and `skipped` what is neither.
    """

    def __init__(self, path: Path, bounds: Bounds):
        self.path, self.where, self.bounds = path, printable(path), bounds
        self.folders: set[str] = set()
        self.skipped = Skipped()
        self._seen: set[str] = set()
        self._found: list[str] = []
        self._columns = [array("q") for _ in range(5)]  # kind, offset, packed, size, crc
        self._bytes = self.count = 0

    def refuse(self, reason: str, member: str | bytes | None = None) -> UserError:
        """The error that names the archive, the member and the reason."""
        name = os.fsdecode(member) if isinstance(member, bytes) else member
        return UserError(f"{self.where}: {reason}" if name is None else f"{self.where}: '{printable(name)}' {reason}")

    def expect(self, raw: str, size: int, packed: int, *, folder: bool = False) -> str:
        """Checks what an archive says of a member before it is read; returns its name in plain form."""
        self.tally(1)
        plain = self._plain(raw)
        if plain in self._seen and not folder:
            raise self.refuse("is in it twice", raw)
        self._seen.add(plain)
        self._bytes += size
        if size > max(FREE, self.bounds.ratio * packed):
            kept = f"{size:,} bytes packed into {packed:,}"
            raise self.refuse(f"is a bomb: {kept}, more than {self.bounds.ratio:g} to 1", raw)
        if self._bytes > self.bounds.bytes:
            much = f"up to '{printable(raw)}' its files have {self._bytes:,} bytes unpacked"
            raise self.refuse(
                f"{much}, over the limit of {self.bounds.bytes:,.0f}; unpack it into a folder, or raise "
                "the limit with SIGHTLINE_ARCHIVE_BYTES"
            )
        return plain

    def tally(self, count: int) -> None:
        """Counts members. Raises UserError for too many."""
        self.count += count
        if self.count > self.bounds.files:
            raise self.refuse(
                f"more than {self.bounds.files:,.0f} files; unpack it into a folder, or raise the limit "
                "with SIGHTLINE_ARCHIVE_FILES"
            )

    def wants(self, plain: str) -> bool:
        """Notes the folders of a file and whether it is an image, by its name; says the latter."""
        *folders, name = plain.split("/")
        if any(part.startswith(".") or part.lower() in CLUTTER for part in (*folders, name)):
            self.skipped.hidden += 1
            return False
        self.add_folder("/".join(folders))
        if name.lower().endswith(EXTENSIONS):
            return True
        self.skipped.others.append(name)
        return False

    def add_folder(self, plain: str) -> None:
        """Notes a folder and those that it is in."""
        parts = plain.split("/")[:DEEP] if plain else []
        if not any(part.startswith(".") or part.lower() in CLUTTER for part in parts):
            self.folders.update("/".join(parts[:i]) for i in range(1, len(parts) + 1))

    def add(self, plain: str, *, kind: int, offset: int, packed: int, size: int, crc: int) -> None:
        """Enters an image."""
        self._found.append(plain)
        for column, value in zip(self._columns, (kind, offset, packed, size, crc), strict=True):
            column.append(value)

    def columns(self) -> tuple[Names, np.ndarray]:
        """The names, sorted by their bytes, and the rows (kind, offset, packed, size, crc) of the images."""
        order = sorted(range(len(self._found)), key=lambda i: os.fsencode(self._found[i]))
        table = np.array([np.frombuffer(column, dtype=np.int64) for column in self._columns]).reshape(5, -1).T[order]
        return Names(self._found[i] for i in order), table

    def _plain(self, raw: str) -> str:
        """A relative name without empty parts and dots. Raises UserError for one that could lead elsewhere."""
        if "\\" in raw or "\0" in raw:
            raise self.refuse("has a backslash or a zero byte in its name, which systems read differently", raw)
        if raw.startswith("/") or re.match("[A-Za-z]:", raw):
            raise self.refuse("has an absolute name, which would lead out of the archive", raw)
        if len(raw) > 4096:
            raise self.refuse("has a name of more than 4,096 letters", raw)
        parts = [part for part in raw.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise self.refuse("has '..' in its name, which would lead out of the archive", raw)
        return "/".join(parts)
