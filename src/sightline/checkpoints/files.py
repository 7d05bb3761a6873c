"""Safe reading: what a file says of itself is checked against its size before anything is believed or allocated."""

import ast
import json
import math
import stat
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sightline.checkpoints.pickles import DAMAGED, read_torch
from sightline.errors import UserError, printable, suggest

SAFETENSORS, NPZ, TORCH = (".safetensors",), (".npz",), (".pth", ".pt", ".bin", ".tar", ".ckpt")
SUFFIXES = (*SAFETENSORS, *NPZ, *TORCH)

_MAX_HEADER = 16 * 2**20  # bytes of names and shapes; the largest published models need a few
_MAX_JSON = 16 * 2**20
_FREE_INFLATION, _MAX_INFLATION = 64 * 2**20, 20  # a compressed .npz may grow to this many bytes, or this many times


@dataclass(frozen=True)
class Contents:
    """The tensors of one or several files by their names on disk, and remarks on how they were read."""

    where: str
    tensors: Mapping[str, Tensor]
    kind: str
    notes: tuple[str, ...] = ()


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
    if _size(path) > _MAX_JSON:
        raise UserError(f"{printable(path)} is larger than any configuration ({_MAX_JSON >> 20} MiB)")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{printable(path)} is not readable JSON: {printable(fault)}") from fault
    except OSError as fault:
        raise UserError(f"cannot read {printable(path)}: {fault.strerror}") from fault
    if not isinstance(found, dict):
        raise UserError(f"{printable(path)}: expected a JSON object, found {type(found).__name__}")
    return found


def shards(index: Path) -> dict[str, set[str]]:
    """The files that an index (`model.safetensors.index.json`) names, and the tensors it says are in each.

    Raises UserError where a name is not the plain name of a weights file, and so might leave the folder.
    """
    places = read_json(index).get("weight_map")
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


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return found


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise UserError(f"{printable(path)} is cut off or not a safetensors file: its header does not fit into it")
    if length > _MAX_HEADER:
        raise UserError(f"{printable(path)}: a header of {length >> 20} MiB is larger than any model needs")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, RuntimeError, KeyError, AttributeError, OverflowError) as fault:
        raise UserError(f"{printable(path)} is damaged or not a safetensors file: {printable(fault)}") from fault


def _read_npz(path: Path, size: int) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > max(_FREE_INFLATION, _MAX_INFLATION * size):
                raise UserError(f"{printable(path)} claims to hold {total >> 20} MiB in {size >> 10} KiB")
            if len({member.filename for member in members}) != len(members):
                raise UserError(f"{printable(path)}: a name appears twice")
            tensors = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    tensors[name] = _read_array(file, member.file_size, f"{printable(path)}: '{printable(name)}'")
            return tensors
    except UserError:
        raise
    except DAMAGED as fault:
        raise UserError(f"{printable(path)} is damaged or not an .npz file: {printable(fault)}") from fault


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
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape) or len(shape) > 8:
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
    values = np.frombuffer(bytearray(file.read()), dtype=kind)
    values = values.reshape(shape, order="F" if columns_first else "C")
    if kind.kind == "V" and kind.itemsize == 2:  # numpy has no bfloat16 and writes its two bytes as void
        return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(torch.bfloat16)
    if kind.kind not in "fiub":
        raise UserError(f"{where} holds {printable(kind)}, not numbers")
    return torch.from_numpy(np.ascontiguousarray(values.astype(kind.newbyteorder("="), copy=False)))
