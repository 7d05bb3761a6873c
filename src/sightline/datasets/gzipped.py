"""Random access into a gzip file, in memory and in bounds: it is inflated from the nearest of many marks."""

import os
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

from sightline.errors import UserError, printable

SPAN = 2**22
"""Bytes from mark to mark: each takes about 40 KiB of memory, and reading an image inflates half a span in vain."""

STEP, FED = 2**18, 2**16

_GZIP = 16 + zlib.MAX_WBITS


class _Mark(NamedTuple):
    out: int  # how many bytes were inflated before
    packed: int  # from how many bytes of the file
    inflater: Any  # its state


class Inflated:
    """The content of a gzip file: first `take` it from the beginning to the end, then `read` any part of it.

    Raises UserError for a file that is damaged or cut, and for a span of more than `ratio` times its packed size.
    """

    def __init__(self, path: Path, ratio: float):
        self.path, self.ratio, self.out = path, ratio, 0
        self._file = path.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size
        self._marks = [_Mark(0, 0, zlib.decompressobj(_GZIP))]
        self._inflater, self._fed, self._rest = zlib.decompressobj(_GZIP), b"", b""

    @property
    def packed(self) -> int:
        """Bytes of the file that have been used up."""
        return self._file.tell() - len(self._fed)

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or what is left."""
        while len(self._rest) < count and (piece := self._pump()):
            self._rest += piece
        taken, self._rest = self._rest[:count], self._rest[count:]
        self.out += len(taken)
        return taken

    def close(self) -> None:
        """Closes the file; `read` opens it anew."""
        self._file.close()
        self._fed = self._rest = b""

    def read(self, offset: int, count: int) -> bytes:
        """These bytes, or as many of them as there are. Raises UserError for a damaged file, OSError for none."""
        mark = self._marks[bisect_right(self._marks, offset, key=lambda mark: mark.out) - 1]
        inflater, skip, fed = mark.inflater.copy(), offset - mark.out, b""
        found = bytearray()
        with self.path.open("rb") as file:
            file.seek(mark.packed)
            while len(found) < count:
                fed = fed or file.read(FED)
                if not fed:
                    break
                try:
                    piece = inflater.decompress(fed, STEP)
                except zlib.error:
                    raise self._damaged() from None
                fed = inflater.unconsumed_tail
                if inflater.eof:
                    fed, inflater = inflater.unused_data, zlib.decompressobj(_GZIP)
                found += piece[skip:]
                skip = max(skip - len(piece), 0)
        return bytes(found[:count])

    def _pump(self) -> bytes:
        """The next piece; empty at the end."""
        while True:
            self._fed = self._fed or self._file.read(FED)
            if not self._fed:
                if self._inflater is not None:
                    raise UserError(f"{printable(self.path)}: it is cut off: its compressed data go on")
                return b""
            if self._inflater is None:  # behind a stream comes another, or filling
                if not self._fed.strip(b"\0"):
                    self._fed = b""
                    continue
                self._inflater = zlib.decompressobj(_GZIP)
            done = self.out + len(self._rest)
            if done - self._marks[-1].out >= SPAN:
                self._mark(done, self._inflater)
            try:
                piece = self._inflater.decompress(self._fed, STEP)
            except zlib.error:
                raise self._damaged() from None
            self._fed = self._inflater.unconsumed_tail
            if self._inflater.eof:
                self._fed, self._inflater = self._inflater.unused_data, None
            if piece:
                return piece

    def _mark(self, done: int, inflater: Any) -> None:
        last, packed = self._marks[-1], self.packed
        if done - last.out > self.ratio * (packed - last.packed):
            kept = f"{done - last.out:,} bytes packed into {packed - last.packed:,}"
            raise UserError(f"{printable(self.path)}: it is a bomb: {kept}, more than {self.ratio:g} to 1")
        self._marks.append(_Mark(done, packed, inflater.copy()))

    def _damaged(self) -> UserError:
        return UserError(f"{printable(self.path)}: it is damaged: its compressed data make no sense")


_OPENED: dict[str, Inflated] = {}


def remember(content: Inflated) -> None:
    """Keeps what has been taken to its end, for this process and those that are forked from it."""
    content.close()
    _OPENED[str(content.path)] = content


def inflated(path: str) -> Inflated:
    """The content of a gzip file that has been listed, here or in the process that told of it. Raises UserError."""
    if path not in _OPENED:
        content = Inflated(Path(path), float("inf"))
        while content.take(SPAN):
            pass
        remember(content)
    return _OPENED[path]
