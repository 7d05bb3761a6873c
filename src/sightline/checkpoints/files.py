"""Safe reading: what a file says of itself is checked against its size before anything is believed or allocated."""

import ast
import math
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sightline.checkpoints.archives import archive_of
from sightline.checkpoints.sealed import SEAL, parse_json
from sightline.checkpoints.torch_files import filled, read_torch
from sightline.errors import UserError, printable, suggest

SAFETENSORS, NPZ, TORCH = (".safetensors",), (".npz",), (".pth", ".pt", ".bin", ".tar", ".ckpt")
SUFFIXES = (*SAFETENSORS, *NPZ, *TORCH)

MAX_CONFIG = 2 * 2**20
"""Bytes of a configuration: twenty thousand classes named twice need 1.5 MiB. Parsing takes up to twenty times that."""

_MAX_HEADER = 2**20  # bytes of names and shapes: some ten thousand tensors, each of which costs memory and time
_FREE_INFLATION, _MAX_INFLATION = 64 * 2**20, 20  # a compressed .npz may grow to this many bytes, or this many times


@dataclass(frozen=True)
class Contents:
    """The tensors of one or several files by their names on disk, and remarks on how they were read."""

    where: str
    tensors: Mapping[str, Tensor]
    kind: str
    notes: tuple[str, ...] = ()

    @property
    def mapped(self) -> bool:
        """Whether tensors may lie in pages of the files themselves, which can be had again at any time."""
        return self.kind != "npz"


def read_tensors(path: Path) -> Contents:
    """All tensors of a `.safetensors`, `.npz` or PyTorch file; the suffix decides, never the contents.

    Safetensors are mapped, not copied. No pickle is ever trusted. Raises UserError that names the file and the reason.
    """
    size = _size(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{printable(path)}: weights come in files that end in {', '.join(SUFFIXES)}")
    if size == 0:
        raise UserError(f"{printable(path)} is empty")
    try:
        if suffix in SAFETENSORS:
            return Contents(printable(path), _read_safetensors(path, size), "safetensors")
        if suffix in NPZ:
            return Contents(printable(path), _read_npz(path, size), "npz")
        return Contents(printable(path), *read_torch(path, size))
    except OSError as fault:
        raise UserError(f"cannot read {printable(path)}: {fault.strerror or fault}") from fault


def read_json(path: Path, limit: int = 64 * 2**20) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; one that `sealed` made only where it is whole.

    Raises UserError for anything else.
    """
    where = printable(path)
    if _size(path) > limit:
        raise UserError(f"{where} is larger than it can be ({limit >> 20} MiB)")
    try:
        return parse_json(path.read_bytes(), where)
    except OSError as fault:
        raise UserError(f"cannot read {where}: {fault.strerror}") from fault


def read_sealed(path: Path) -> dict[str, Any]:
    """The JSON object in a file that `sealed` made. Raises UserError for any other, and for a damaged one."""
    found = read_json(path)
    if SEAL not in found:
        raise UserError(f"{printable(path)} carries no seal: it is damaged, or was not written by this version")
    return found


def shards(index: Path) -> dict[str, set[str]]:
    """The files that an index (`model.safetensors.index.json`) names, and the tensors it says are in each.

    Raises UserError where a name is not the plain name of a weights file, and so might leave the folder.
    """
    places = read_json(index, MAX_CONFIG).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{printable(index)}: expected an object 'weight_map' of tensor names to file names")
    found: dict[str, set[str]] = {}
    for tensor, name in places.items():
        plain = isinstance(name, str) and not set(name) & set("/\\\0:")
        if not plain or not name.lower().endswith(SUFFIXES):
            raise UserError(
                f"{printable(index)}: '{printable(name)}' is not the plain name of a weights file in this folder"
            )
        found.setdefault(name, set()).add(tensor)
    return found


def read_sharded(index: Path) -> Contents:
    """The tensors of all files that an index names. Raises UserError where the index and the files disagree."""
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    kind = ""
    for name, expected in sorted(shards(index).items()):
        shard = read_tensors(index.parent / name)
        strays = shard.tensors.keys() ^ expected
        if strays:
            shown = ", ".join(f"'{printable(tensor)}'" for tensor in sorted(strays)[:5])
            raise UserError(f"{printable(index)} and {printable(name)} disagree about {shown}")
        tensors.update(shard.tensors)
        notes += shard.notes
        kind = shard.kind
    return Contents(printable(index), tensors, kind, tuple(notes))


def safetensors_of(tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """What writes these tensors to a path as safetensors."""
    return lambda path: save_file(dict(tensors), path, {"format": "pt"})


def bare_file(tensors: Mapping[str, Tensor], out: Path) -> dict[Path, bytes | Callable[[Path], None]]:
    """What writes these tensors alone, in the format that the suffix names; empty where `out` is to be a folder.

    Raises UserError for a suffix that is not one of a file that PyTorch's users exchange.
    """
    if out.suffix == ".safetensors":
        return {out: safetensors_of(tensors)}
    if out.suffix in (".pth", ".pt", ".bin"):
        return {out: lambda path: torch.save(dict(tensors), path)}
    if out.suffix:
        raise UserError(f"{printable(out)}: such weights are a folder, or a file in .safetensors or .pth")
    return {}


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as fault:
        near = suggest(path.name, _neighbours(path.parent))
        raise UserError(f"cannot read {printable(path)}: {fault.strerror or fault}.{near}") from fault
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{printable(path)} is not a regular file")
    return status.st_size


def _neighbours(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise UserError(f"{printable(path)} is cut off or not a safetensors file: its header does not fit into it")
    if length > _MAX_HEADER:
        raise UserError(f"{printable(path)}: a header of {length >> 10} KiB is larger than any model needs")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, RuntimeError, KeyError, AttributeError, OverflowError) as fault:
        raise UserError(f"{printable(path)} is damaged or not a safetensors file: {printable(fault)}") from fault


def _read_npz(path: Path, size: int) -> dict[str, Tensor]:
    where = printable(path)
    with archive_of(path) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if total > max(_FREE_INFLATION, _MAX_INFLATION * size):
            raise UserError(f"{where} claims to hold {total >> 20} MiB in {size >> 10} KiB")
        tensors = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                tensors[name] = _read_array(file, member.file_size, f"{where}: '{printable(name)}'")
        return tensors


def _array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type from the header of a `.npy` member. Raises ValueError and its like for anything unusual."""
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise ValueError("it does not begin as an array")
    length = int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little")
    if length > 2**16:
        raise ValueError(f"its header claims {length} bytes")
    header = ast.literal_eval(file.read(length).decode("utf-8" if magic[6] == 3 else "latin1").strip())
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header is not that of an array")
    shape, kind = header["shape"], header["descr"]
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 8:
        raise ValueError("its shape is not a few whole numbers")
    if not isinstance(kind, str) or not isinstance(header["fortran_order"], bool):
        raise ValueError("its type is not a plain one")
    return shape, header["fortran_order"], np.dtype(kind)


def _read_array(file: Any, size: int, where: str) -> Tensor:
    """One `.npy` member, whose header has to account for every byte before memory is taken."""
    try:
        shape, columns_first, kind = _array_header(file)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as fault:
        raise UserError(f"{where} is not a readable array: {printable(fault)}") from fault
    if kind.hasobject:
        raise UserError(
            f"{where} holds Python objects instead of numbers; loading them could run code, so it is refused"
        )
    if math.prod(shape) * kind.itemsize != size - file.tell():
        raise UserError(f"{where} claims {math.prod(shape)} values, which is not what the file holds")
    data = filled(file.readinto, math.prod(shape) * kind.itemsize, where)
    if not kind.isnative:
        data = data.view(-1, kind.itemsize).flip(1).flatten()
    flat = data.view(_number(kind, where))
    return flat.view(shape[::-1]).permute(*reversed(range(len(shape)))) if columns_first else flat.view(shape)


def _number(kind: np.dtype, where: str) -> torch.dtype:
    """The type of tensors that a type of arrays becomes. Raises UserError where there is none."""
    if kind.kind == "V" and kind.itemsize == 2:  # numpy has no bfloat16 and writes its two bytes as void
        return torch.bfloat16
    if kind.kind in "fiub":
        with suppress(TypeError):
            return torch.from_numpy(np.empty(0, kind.newbyteorder("="))).dtype
    raise UserError(f"{where} holds {printable(kind)}, not numbers that a network has")
