"""Lists a tar archive, plain or gzipped, header by header; a header that is damaged ends it with an error."""

import os
import zlib
from typing import IO

from sightline.datasets.gzipped import Inflated
from sightline.datasets.member import ENDS, GZIPPED, INDEXED, STORED, Listing
from sightline.errors import UserError

BLOCK = 512

HEADER = 2**20
"""Most bytes of an extended header: a long name, and attributes that nobody here reads."""

_KINDS = {
    **dict.fromkeys((b"1", b"2"), "a link"),
    **dict.fromkeys((b"3", b"4"), "a device"),
    **{b"6": "a pipe", b"S": "a file with holes", b"M": "the rest of a file in another archive"},
}


class Plain:
    """A tar archive that is not compressed."""

    def __init__(self, file: IO[bytes]):
        self.file = file

    @property
    def packed(self) -> int:
        """Bytes of the file that have been used up."""
        return self.file.tell()

    def take(self, count: int) -> bytes:
        """The next bytes; fewer at the end."""
        return self.file.read(count)

    def move(self, place: int) -> None:
        """Goes on from this place of the file."""
        self.file.seek(place)


def list_tar(source: Plain | Inflated, size: int, listing: Listing) -> None:
    """Enters every member of an archive of `size` bytes as it lies on disk. Raises UserError as `list_zip` does."""
    reader = _Reader(source, size, listing, STORED if isinstance(source, Plain) else GZIPPED)
    while reader.next():
        pass


def index_tar(source: Plain, size: int, listing: Listing) -> tuple[list[UserError], bool]:
    """Enters the members of a plain archive by their headers and `ENDS`: what lies between is not read.

    A member that may not be one is left out, and the next one follows. Returns what `list_tar` would have raised, and
    whether the archive could be listed to its end.
    """
    reader, faults = _Reader(source, size, listing, INDEXED), []
    while True:
        try:
            if not reader.next():
                return faults, True
        except UserError as fault:
            faults.append(fault)
            if not reader.goes_on():
                return faults, False


class _Reader:
    def __init__(self, source: Plain | Inflated, size: int, listing: Listing, kind: int):
        self.source, self.size, self.listing, self.kind = source, size, listing, kind
        self.place = 0
        self.following: int | None = None  # where the next header is, whatever is wrong with this member
        self.told: dict[bytes, bytes] = {}  # what an extended header says of the next member
        self.last: str | None = None

    def next(self) -> bool:
        """Reads one header and what belongs to it; False at the end mark."""
        self.following = None
        block = self._take(BLOCK)
        if not block.strip(b"\0"):
            self._end()
            return False
        self._verify(block)
        kind, size = block[156:157], self._number(block[124:136])
        if kind in (b"x", b"L", b"K", b"g"):
            self._extend(kind, size)
            return True
        told, self.told = self.told, {}
        name = os.fsdecode(told.get(b"path") or self._name(block))
        if any(key.startswith(b"GNU.sparse") for key in told):
            kind = b"S"
        if b"size" in told:
            size = self._decimal(told[b"size"])
        if kind not in (b"S", b"M"):  # of these it is not known how much follows; links and devices have no content
            self.following = self.place + (0 if kind in _KINDS else -(-size // BLOCK) * BLOCK)
        if kind in _KINDS:
            raise self.listing.refuse(f"is {_KINDS[kind]}, not a file", name)
        if kind not in (b"0", b"\0", b"5", b"7"):
            raise self.listing.refuse("is neither a file nor a folder", name)
        self._file(name, size, folder=kind == b"5" or name.endswith("/"))
        return True

    def goes_on(self) -> bool:
        """Moves on to the header behind a member with a fault; False where nobody knows where it is."""
        if self.following is None or not isinstance(self.source, Plain) or self.following > self.size:
            return False
        if self.listing.count > self.listing.bounds.files:
            return False  # that fault would come again with each
        self.source.move(self.following)
        self.place, self.told = self.following, {}
        return True

    def _file(self, name: str, size: int, *, folder: bool) -> None:
        self.last = name
        if self.kind != GZIPPED and self.place + size > self.size:
            self.following = None
            raise self.listing.refuse("is cut off: the archive ends before it does", name)
        packed = self.source.packed
        plain = self.listing.expect(name, size, max(size, 1), folder=folder)
        if folder:
            self.listing.add_folder(plain)
            self._pass(size)
        else:
            wanted, offset = self.listing.wants(plain), self.place
            crc = self._ends(size) if isinstance(self.source, Plain) and self.kind == INDEXED else self._pass(size)
            if wanted:
                kept = self.source.packed - packed
                self.listing.add(plain, kind=self.kind, offset=offset, packed=kept, size=size, crc=crc)
        self._take(-size % BLOCK)

    def _pass(self, size: int) -> int:
        """Reads so many bytes, a part at a time, and returns their checksum."""
        crc = 0
        while size:
            part = self._take(min(size, 2**18))
            crc, size = zlib.crc32(part, crc), size - len(part)
        return crc

    def _ends(self, size: int) -> int:
        """Passes over so many bytes, and returns the checksum of the first and the last of them, as `member.ends`."""
        assert isinstance(self.source, Plain)
        crc = zlib.crc32(self._take(min(size, ENDS)))
        if size > 2 * ENDS:
            self.place += size - 2 * ENDS
            self.source.move(self.place)
        return zlib.crc32(self._take(min(max(size - ENDS, 0), ENDS)), crc)

    def _take(self, count: int) -> bytes:
        data = self.source.take(count)
        self.place += len(data)
        if len(data) < count:
            if self.last is None:
                raise self.listing.refuse("it is cut off")
            raise self.listing.refuse("is the last there is: the archive is cut off", self.last)
        return data

    def _end(self) -> None:
        """After an end mark there is filling and nothing else."""
        left = self.source.take(HEADER + 1)
        if left.strip(b"\0") or len(left) > HEADER:
            raise self.listing.refuse("something stands behind its end mark; were several archives joined?")

    def _verify(self, block: bytes) -> None:
        total = sum(block) - sum(block[148:156]) + 8 * 32
        stated = block[148:156].strip(b"\0 ")
        if not stated.isdigit() or b"8" in stated or b"9" in stated or int(stated, 8) != total:
            if self.last is None:
                raise self.listing.refuse("it is neither a ZIP nor a tar archive, or damaged at its beginning")
            raise self.listing.refuse("is followed by damage: a checksum is wrong", self.last)

    def _number(self, field: bytes) -> int:
        """An octal number, or a binary one behind a set bit."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b"\0 ")
        if digits and (not digits.isdigit() or b"8" in digits or b"9" in digits):
            raise self.listing.refuse("it is damaged: a number in it is none")
        return int(digits or b"0", 8)

    def _decimal(self, field: bytes) -> int:
        if not field.isdigit() or len(field) > 18:
            raise self.listing.refuse("it is damaged: a number in it is none")
        return int(field)

    def _name(self, block: bytes) -> bytes:
        name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
        return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name

    def _extend(self, kind: bytes, size: int) -> None:
        """A header about the next member: POSIX records, or a name that was too long for GNU's."""
        self.listing.tally(0)
        if size > HEADER:
            raise self.listing.refuse(f"it is damaged: a header of {size:,} bytes")
        data = self._take(size)
        self._take(-size % BLOCK)
        if kind == b"L":
            self.told[b"path"] = data.rstrip(b"\0")
        elif kind in (b"x", b"g"):
            told = self._records(data)
            if kind == b"x":
                self.told |= told
            elif told.keys() & {b"path", b"size"}:
                raise self.listing.refuse("it is damaged: all its files are said to have the same name or size")

    def _records(self, data: bytes) -> dict[bytes, bytes]:
        told, place = {}, 0
        while place < len(data):
            space = data.find(b" ", place, place + 10)
            length = self._decimal(data[place:space]) if space > place else 0
            record = data[space + 1 : place + length]
            key, equals, value = record.partition(b"=")
            if length <= space - place or not equals or not value.endswith(b"\n"):
                raise self.listing.refuse("it is damaged: a header makes no sense")
            told[key] = value[:-1]
            place += length
        return told
