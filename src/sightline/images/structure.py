"""What an encoded image says of itself, looked at before Pillow does: whether it is whole, and reading it has an end.

Some headers make a reader work for minutes or take gigabytes before it knows the size of the image, and some formats
let it pass over missing or damaged parts. All of this is linear in the bytes at most, and quick.
"""

import re
import struct
import zlib
from io import BytesIO

from sightline.images.limits import Limits, Refusal

PIECES = 100_000
"""Most times that a reader may ask for bytes, besides once in 2 KiB; each costs up to three microseconds."""

CHUNKS = 65_536
"""Most chunks of a PNG: with the usual 8 KiB in each, half a gigabyte."""

SCAN_PIXELS = 3_000_000_000
"""Most pixels that the scans of a progressive JPEG may visit: half a second. Usual are ten scans."""

TEXT_VALUES = 1_000_000
"""Most values of a PPM that writes its pixels as text, which is read one by one."""

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # not one of those within the pixels


class Counted(BytesIO):
    """Bytes in memory that are not handed out without end, piece by piece; `read` raises Refusal."""

    asked = 0

    def __init__(self, data: bytes):
        super().__init__(data)
        self.most = PIECES + len(data) // 2048

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, as any file gives them."""
        self.asked += 1
        if self.asked > self.most:
            raise Refusal(f"it is in more than {self.most:,} pieces, which no honest image is; save it anew")
        return super().read(size)


def check_structure(data: bytes) -> None:
    """Raise Refusal where an image is cut, a checksum of its pixels is wrong, or reading it would be too much work."""
    if data.startswith(_PNG):
        _check_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _require(8 + int.from_bytes(data[4:8], "little"), data)
    elif data.startswith(_JPEG):
        _check_jpeg(data)
    elif data[:2] in (b"P1", b"P2", b"P3"):
        _check_text(data)


def _require(whole: int, data: bytes) -> None:
    if whole > len(data):
        raise Refusal(f"image file is truncated ({len(data) / 1024:.3g} of {whole / 1024:.3g} KiB)")


def _check_png(data: bytes) -> None:
    """Pillow passes over the checksums of the pixels and does not ask for the end mark."""
    whole, view = 8, memoryview(data)
    for _ in range(CHUNKS):
        if whole + 8 > len(data):
            _require(whole + 12, data)
        length, kind = struct.unpack_from(">I4s", data, whole)
        if not kind.isalpha():
            raise Refusal("the file is damaged (what should be a PNG chunk is none)")
        end = whole + 8 + length
        _require(end + 4, data)
        stated = int.from_bytes(data[end : end + 4], "big")
        if kind == b"IDAT" and zlib.crc32(view[whole + 4 : end]) != stated:
            raise Refusal("the file is damaged (a checksum of its pixels is wrong)")
        whole = end + 4
        if kind == b"IEND":
            return
    raise Refusal(f"it is in more than {CHUNKS:,} chunks, which no honest image is; save it anew")


def check_webp(data: bytes, limits: Limits) -> None:
    """Raise Refusal where a WebP is too large: Pillow takes the memory for all pixels before it tells their number."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L" and len(data) >= 25:
        packed = int.from_bytes(data[21:25], "little")
        width, height = 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    elif kind == b"VP8 " and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    else:
        return  # Pillow will find the damage
    limits.check(height, width)


def _check_jpeg(data: bytes) -> None:
    """Every scan of a progressive JPEG visits all pixels, and may take a dozen bytes."""
    place, pixels, scans = 2, 0, 0
    for _ in range(PIECES):
        found = _MARKER.search(data, place)
        if found is None or found[0] == b"\xff\xd9":
            return
        place, kind = found.end(), data[found.start() + 1]
        if len(data) < place + 2:
            return
        if kind in (0xC0, 0xC1):
            return  # all pixels in few scans: the work is in proportion to the bytes
        if 0xC2 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC) and len(data) >= place + 7:
            height, width = struct.unpack_from(">HH", data, place + 3)
            pixels = max(pixels, height * width)
        scans += kind == 0xDA
        if scans * max(pixels, 2**18) > SCAN_PIXELS:
            raise Refusal(f"its pixels are in more than {scans - 1:,} scans, which no honest image is; save it anew")
        place += int.from_bytes(data[place : place + 2], "big")


def _check_text(data: bytes) -> None:
    numbers = re.findall(rb"[0-9]+", re.sub(rb"#[^\r\n]*", b"", data[2:4096]))[:2]
    values = (3 if data[:2] == b"P3" else 1) * int(numbers[0]) * int(numbers[1]) if len(numbers) == 2 else 0
    if values > TEXT_VALUES:
        raise Refusal(f"its {values:,} values are written as text, {TEXT_VALUES:,} at most are read; save it as binary")
