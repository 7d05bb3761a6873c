"""Tensors out of PyTorch files: the pickle in them is read as data, and the numbers are mapped where they lie."""

import ctypes
import io
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sightline.checkpoints.archives import archive_of
from sightline.checkpoints.pickles import MAX_PICKLE, Aside, Described, Scripted, Stored, read_pickle
from sightline.errors import UserError, printable
from sightline.schema import require

_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "teacher", "student")
"""Where training scripts put the weights beside their own state; averaged weights first, as timm takes them."""

_PIECE = 2**20  # bytes that are read at once
_DEEPEST = 8  # containers in one another
_LONGEST = 4096  # characters of a tensor's name
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what a file of PyTorch before 1.6 begins with

Place = tuple[int, int]
"""Where numbers lie in a file: the first byte, and how many."""


def read_torch(path: Path, size: int) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """The state dict of a PyTorch file: tensors by name, the kind of file, and what was left aside.

    Raises UserError that names the file, and the class where a pickle asks for one that is not a tensor's.
    """
    where = printable(path)
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"
        value, places = _archive(path, size, where) if zipped else _legacy(path, size, where)
        described, notes = _state_dict(value, where)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _Numbers(file, mapped, places, where).tensors(described), "torch", notes


def filled(readinto: Callable[[memoryview], int], size: int, what: str) -> Tensor:
    """So many bytes in memory of their own, read piece by piece. Raises UserError where there are fewer."""
    data, at = torch.empty(size, dtype=torch.uint8), 0
    # Not through NumPy: what it has seen the memory of can no longer be given back before its time.
    view = memoryview((ctypes.c_ubyte * size).from_address(data.data_ptr())).cast("B") if size else memoryview(b"")
    while at < size:
        got = readinto(view[at : at + _PIECE])
        if not got:
            raise UserError(f"{what} is cut off")
        at += got
    return data


class _Numbers:
    """A mapped file and the places of the storages in it; tensors that share one there share it here.

    What does not lie where its numbers may lie in memory is read instead, as in every file of PyTorch before 1.6.
    """

    def __init__(self, file: io.BufferedReader, mapped: mmap.mmap, places: Mapping[str, Place], where: str):
        self.file, self.mapped, self.places, self.where = file, mapped, places, where
        self.read: dict[str, Tensor] = {}

    def tensors(self, described: Mapping[str, Described]) -> dict[str, Tensor]:
        return {
            name: self._tensor(tensor, f"{self.where}: tensor '{printable(name)}'")
            for name, tensor in described.items()
        }

    def _tensor(self, tensor: Described, what: str) -> Tensor:
        kind, size, stride = tensor.dtype, tensor.size, tensor.stride
        numbers = (tensor.offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
        plain = all(type(n) is int and 0 <= n < 2**62 for n in numbers) and len(size) == len(stride) <= 16
        stored = tensor.storage
        require(plain and isinstance(stored, Stored) and kind is not None, f"{what} is described in an unknown way")
        start, length = self.places.get(stored.key, (0, -1))
        held = length == stored.count * stored.dtype.itemsize and start + length <= len(self.mapped)
        require(held, f"{what} lies in a storage that the file does not hold")
        count = math.prod(size)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
        fits = max(last + 1, count) * kind.itemsize <= length and length % kind.itemsize == 0
        require(fits, f"{what} claims more values than the file holds")
        if stored.key not in self.read:
            self.read[stored.key] = self._storage(start, length, stored.dtype.itemsize, what)
        return self.read[stored.key].view(kind).as_strided(size, stride, tensor.offset)

    def _storage(self, start: int, length: int, unit: int, what: str) -> Tensor:
        if length and start % max(unit, 8) == 0:
            return torch.frombuffer(self.mapped, dtype=torch.uint8, count=length, offset=start)
        self.file.seek(start)
        return filled(self.file.readinto, length, what)


def _state_dict(found: Any, where: str) -> tuple[dict[str, Described], tuple[str, ...]]:
    notes: list[str] = []
    if isinstance(found, Scripted):
        found = _attributes(found, where)
        notes.append("weights taken out of a TorchScript program, which is not run")
    for _ in range(_DEEPEST):
        if not isinstance(found, dict) or any(isinstance(value, Described) for value in found.values()):
            break
        inner = next((key for key in _CONTAINERS if isinstance(found.get(key), dict) and found[key]), None)
        if inner is None:
            break
        others = ", ".join(f"'{printable(key)}'" for key in list(found)[:13] if key != inner)
        notes.append(f"weights read from '{inner}'" + (f"; left aside: {others}" if others else ""))
        found = found[inner]
    pairs = found.items() if isinstance(found, dict) else ()
    tensors = {key: value for key, value in pairs if isinstance(value, Described)}
    if not tensors or not all(isinstance(key, str) for key in found):
        raise UserError(f"{where} holds no state dict (tensors by name)")
    for key, value in found.items():
        odd = isinstance(value, Aside) and value.what.startswith("torch._utils._rebuild_")
        require(not odd, f"{where}: tensor '{printable(key)}' is sparse, quantised or without numbers")
    rest = [f"'{printable(key)}'" for key in found if key not in tensors]
    if rest:
        notes.append(f"not tensors, left aside: {', '.join(rest[:12])}")
    return tensors, tuple(notes)


def _attributes(program: Scripted, where: str) -> dict[str, Any]:
    """The tensors of a TorchScript program by the names that they have in its state dict."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Scripted]] = [("", program)]
    seen = {id(program)}
    while waiting:
        prefix, here = waiting.pop()
        for name, value in here.items():
            require(isinstance(name, str) and len(prefix) < _LONGEST, f"{where} is damaged: an object without a name")
            if isinstance(value, Scripted):
                require(id(value) not in seen, f"{where} is damaged: an object stands in it twice")
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value))
            elif isinstance(value, Described):
                found[prefix + name] = value
    return found


def _archive(path: Path, size: int, where: str) -> tuple[Any, dict[str, Place]]:
    """The pickle of a zip archive as data, and where its storages lie.

    Refuses an archive that is compressed, repeats a name, claims more than it holds, or fails its checksums.
    """
    with archive_of(path) as archive, path.open("rb") as file:
        members = archive.infolist()
        packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
        plain = all("/code/" in member.filename for member in packed)  # the text of a program, which nobody reads
        require(plain, f"{where} is compressed, which PyTorch files never are")
        text = sum(member.file_size for member in packed)
        claimed = sum(member.file_size for member in members) - text
        fits = claimed <= size and text <= MAX_PICKLE
        require(fits, f"{where}: its members claim more bytes than the file holds")
        pickles = [member for member in members if member.filename.endswith("data.pkl")]
        alone = len(pickles) == 1 and pickles[0].file_size <= MAX_PICKLE
        require(alone, f"{where} is a zip archive, but not one of PyTorch's")
        value, _ = read_pickle(io.BytesIO(archive.read(pickles[0])), where)
        root = pickles[0].filename.removesuffix("data.pkl")
        orders = [archive.read(member) for member in members if member.filename == f"{root}byteorder"]
        require(orders in ([], [b"little"]), f"{where} was written by a machine of the other byte order")
        broken = archive.testzip()
        require(broken is None, f"{where} is damaged: '{printable(broken)}' fails its checksum")
        places = {}
        for member in members:
            key = member.filename.removeprefix(f"{root}data/")
            if key.isdecimal() and key != member.filename:
                file.seek(member.header_offset + 26)  # of the local header: the lengths of two texts behind it
                texts = struct.unpack("<HH", file.read(4))
                places[key] = (member.header_offset + 30 + sum(texts), member.file_size)
        return value, places


def _legacy(path: Path, size: int, where: str) -> tuple[Any, dict[str, Place]]:
    """The same of a file of PyTorch before 1.6: five pickles, then each storage with its count before it."""
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(MAX_PICKLE))
        magic, _ = read_pickle(stream, where)
        require(type(magic) is int and magic == _MAGIC, f"{where} is not a PyTorch file")
        protocol, _ = read_pickle(stream, where)
        system, _ = read_pickle(stream, where)
        little = isinstance(system, dict) and system.get("little_endian") is True
        require(protocol == _PROTOCOL and little, f"{where} is of a PyTorch that is not read, or of another machine")
        value, storages = read_pickle(stream, where)
        keys, _ = read_pickle(stream, where)
        known = isinstance(keys, list) and all(isinstance(key, str) for key in keys) and set(keys) == set(storages)
        require(known and len(set(keys)) == len(keys), f"{where} is damaged: its list of storages does not fit")
        places, at = {}, stream.tell()
        for key in keys:
            file.seek(at)
            length = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
            require(length <= size - at - 8, f"{where} is cut off, or claims more values than it holds")
            places[key] = (at + 8, length)
            at += 8 + length
        require(at == size, f"{where} has {size - at} bytes behind its last tensor")
        return value, places
