"""Lists a ZIP archive by its central directory, and believes nothing of it that the rest of the file denies."""

import struct
from typing import IO

import numpy as np

from sightline.datasets.member import DEFLATED, STORED, Listing

_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_ALL16, _ALL32 = 0xFFFF, 0xFFFFFFFF  # "see the 64-bit field"

DIRECTORY = 2**27
"""Most bytes of a central directory: 200,000 names of 600 bytes."""

_KINDS = {0o12: "a link", 0o1: "a pipe", 0o2: "a device", 0o6: "a device", 0o14: "a socket"}


def list_zip(file: IO[bytes], size: int, listing: Listing) -> None:
    """Enters every member. Raises UserError for an archive that is damaged, cut, encrypted, or against the rules."""
    count, start, end = _directory(file, size, listing)
    if end - start > DIRECTORY:
        raise listing.refuse(f"its list of files is larger than {DIRECTORY >> 20} MiB")
    if count > listing.bounds.files:
        listing.tally(count)
    file.seek(start)
    data = file.read(end - start)
    spans: list[tuple[int, int]] = []
    raws: list[bytes] = []
    for place in _entries(data, count, listing):
        entry = _CENTRAL.unpack_from(data, place)
        lengths = entry[10:13]
        raw = data[place + 46 : place + 46 + lengths[0]]
        extra = data[place + 46 + lengths[0] : place + 46 + lengths[0] + lengths[1]]
        spans.append(_enter(file, entry, raw, extra, listing))
        raws.append(raw)
    _check_apart(spans, raws, start, listing)


def _entries(data: bytes, count: int, listing: Listing) -> list[int]:
    """Where the entries of the list begin: as many as are stated, one behind the other."""
    places, place = [], 0
    while place < len(data):
        if data[place : place + 4] != b"PK\1\2" or place + _CENTRAL.size > len(data) or len(places) == count:
            raise listing.refuse(f"it is damaged: its list of {count:,} files makes no sense")
        places.append(place)
        place += 46 + sum(struct.unpack_from("<3H", data, place + 28))
    if place > len(data) or len(places) != count:
        raise listing.refuse(f"it is damaged: its list of {count:,} files is cut off")
    return places


def _directory(file: IO[bytes], size: int, listing: Listing) -> tuple[int, int, int]:
    """How many members there are, and where the list of them begins and ends."""
    file.seek(max(size - 22 - _ALL16, 0))
    tail = file.read()
    base, place = size - len(tail), len(tail)
    while (place := tail.rfind(b"PK\5\6", 0, place)) >= 0:
        if place + 22 > len(tail):
            continue
        _, disk, first, here, count, length, start, comment = _END.unpack_from(tail, place)
        if place + 22 + comment != len(tail):
            continue
        end = base + place
        if _ALL16 in (disk, first, here, count) or _ALL32 in (length, start):
            if place < 20 or tail[place - 20 : place - 16] != b"PK\6\7":
                continue
            file.seek(_LOCATOR.unpack_from(tail, place - 20)[2])
            record = file.read(_END64.size)
            if len(record) < _END64.size or record[:4] != b"PK\6\6":
                continue
            end = _LOCATOR.unpack_from(tail, place - 20)[2]
            _, _, _, _, disk, first, here, count, length, start = _END64.unpack(record)
        if disk or first or here != count:
            raise listing.refuse("it is one of several parts; join them first")
        if start + length != end:
            raise listing.refuse("it is damaged: its list of files is not where it should be")
        return count, start, end
    raise listing.refuse("it is cut off or no ZIP archive: there is no list of files at its end")


def _enter(file: IO[bytes], entry: tuple, raw: bytes, extra: bytes, listing: Listing) -> tuple[int, int]:
    """Enters one member; returns where it begins and ends in the file."""
    flags, method, crc, packed, size = entry[3], entry[4], *entry[7:10]
    attributes, offset = entry[15], entry[16]
    name = _name(raw)
    packed, size, offset = _wide(extra, packed, size, offset)
    mode = attributes >> 28
    if mode in _KINDS:
        raise listing.refuse(f"is {_KINDS[mode]}, not a file", name)
    if flags & 0x2041:
        raise listing.refuse("is encrypted", name)
    folder = name.endswith("/") or mode == 0o4
    if folder and size:
        raise listing.refuse("is a folder and has content", name)
    if method not in (0, 8):
        raise listing.refuse(f"is packed by method {method}; only 'stored' and 'deflate' are read. Pack it anew", name)
    if method == 0 and packed != size:
        raise listing.refuse("is damaged: it is not packed, and has two sizes", name)
    plain = listing.expect(name, size, packed, folder=folder)
    file.seek(offset)
    head = file.read(_LOCAL.size + len(raw))
    if len(head) < _LOCAL.size + len(raw) or head[:4] != b"PK\3\4":
        raise listing.refuse("is damaged or cut off: it is not where the list of files says", name)
    local = _LOCAL.unpack_from(head)
    if (local[2] & 0x2041, local[3], local[9], head[30:]) != (0, method, len(raw), raw):
        raise listing.refuse("is damaged: its two headers do not say the same", name)
    begin = offset + _LOCAL.size + len(raw) + local[10]
    if folder:
        listing.add_folder(plain)
    elif listing.wants(plain):
        kind = DEFLATED if method else STORED
        listing.add(plain, kind=kind, offset=begin, packed=packed, size=size, crc=crc)
    return offset, begin + packed


def _name(raw: bytes) -> str:
    try:
        return raw.decode()  # whatever the flags say: some archivers forget to set them
    except UnicodeDecodeError:
        return raw.decode("cp437")


def _wide(extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int, int]:
    """Sizes and place with their 64-bit values, where these are told."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{min(length, len(extra) - place - 4) // 8}Q", extra, place + 4))
            size = next(values, size) if size == _ALL32 else size
            packed = next(values, packed) if packed == _ALL32 else packed
            offset = next(values, offset) if offset == _ALL32 else offset
        place += 4 + length
    return packed, size, min(offset, 2**62)


def _check_apart(spans: list[tuple[int, int]], raws: list[bytes], limit: int, listing: Listing) -> None:
    """Raises UserError where members share bytes: a small file could stand for any number of large ones."""
    if not spans:
        return
    begins, ends = np.array(spans, dtype=np.int64).T
    order = np.argsort(begins, kind="stable")
    after = np.append(begins[order][1:], limit)
    if (over := np.flatnonzero(ends[order] > after)).size:
        raise listing.refuse("is damaged: it reaches into what follows it", _name(raws[order[over[0]]]))
