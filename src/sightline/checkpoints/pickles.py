"""Tensors out of PyTorch files, through the restricted reader alone and after a look at what the pickle asks for."""

import argparse
import lzma
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sightline.errors import UserError, printable

_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "teacher", "student")
"""Where training scripts put the weights beside their own state; averaged weights first, as timm takes them."""

_MAX_PICKLE = 64 * 2**20  # bytes of names and shapes
_HARMLESS = {
    "argparse Namespace",
    "collections OrderedDict",
    "collections defaultdict",
    "collections Counter",
    "torch Size",
    "torch device",
    "_codecs encode",
    "builtins set",
    "__builtin__ set",
    "torch.serialization _get_layout",
}

DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
    OverflowError,
)
"""What Python's reader of archives raises where bytes are not as they should be; a UserError is a ValueError too."""


def read_torch(path: Path, size: int) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """The state dict of a PyTorch file: tensors by name, the kind of file, and what was left aside.

    Raises UserError that names the file, and the class where a pickle asks for one that is not a tensor's.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _inspect_archive(path)
    else:
        _inspect_legacy(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as fault:
        # The restricted reader meets damage with errors of every kind; whichever it is, the file is at fault. Its own
        # words are not passed on: they suggest switching the restriction off.
        raise UserError(
            f"{printable(path)} is damaged, or holds something other than tensors ({type(fault).__name__}); "
            "ask for its weights as .safetensors"
        ) from fault
    tensors, notes = _state_dict(found, path)
    _refuse_false_claims(tensors, path, size)
    return tensors, "torch", notes


def _state_dict(found: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes: list[str] = []
    while isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        inner = next((key for key in _CONTAINERS if isinstance(found.get(key), Mapping) and found[key]), None)
        if inner is None:
            break
        others = ", ".join(f"'{printable(key)}'" for key in found if key != inner)
        notes.append(f"weights read from '{inner}'" + (f"; left aside: {others}" if others else ""))
        found = found[inner]
    pairs = found.items() if isinstance(found, Mapping) else ()
    tensors = {key: value for key, value in pairs if isinstance(value, Tensor)}
    if not tensors or not all(isinstance(key, str) for key in found):
        raise UserError(f"{printable(path)} holds no state dict (tensors by name)")
    rest = [f"'{printable(key)}'" for key in found if key not in tensors]
    if rest:
        notes.append(f"not tensors, left aside: {', '.join(rest[:12])}")
    return tensors, tuple(notes)


def _refuse_false_claims(tensors: Mapping[str, Tensor], path: Path, size: int) -> None:
    """Refuses tensors of a kind without plain numbers, and those that claim more numbers than are there."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{printable(path)}: tensor '{printable(name)}' is sparse, quantised or without numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{printable(path)}: tensor '{printable(name)}' claims more values than the file holds")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(storages.values()) > size:
        raise UserError(f"{printable(path)}: its tensors claim more bytes than the file holds")


def _inspect_archive(path: Path) -> None:
    """Refuses an archive that is compressed, repeats a name, fails its checksums, or asks for more than tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise UserError(f"{printable(path)} is compressed, which PyTorch files never are")
            if len({member.filename for member in members}) != len(members):
                raise UserError(f"{printable(path)}: a name appears twice in the archive")
            pickles = [member for member in members if member.filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
                raise UserError(f"{printable(path)} is a zip archive, but not one of PyTorch's")
            with archive.open(pickles[0]) as file:
                _refuse_code(file, path)
            broken = archive.testzip()
            if broken is not None:
                raise UserError(f"{printable(path)} is damaged: '{printable(broken)}' fails its checksum")
    except UserError:
        raise
    except DAMAGED as fault:
        raise UserError(f"{printable(path)} is damaged: {printable(fault)}") from fault


def _inspect_legacy(path: Path) -> None:
    """The same look at the pickles that a file of PyTorch before 1.6 begins with."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if mapped[:1] != b"\x80":
            raise UserError(f"{printable(path)} is not a PyTorch file")
        for _ in range(5):  # magic number, version, system, the object, and the keys of its storages
            _refuse_code(mapped, path)
            if mapped[mapped.tell() : mapped.tell() + 1] != b"\x80":
                return


def _refuse_code(stream: Any, path: Path) -> None:
    """Lists what a pickle names, without running it, and refuses what no tensor needs."""
    names: set[str] = set()
    strings: list[str] = []
    damage = None
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument))
            elif opcode.name == "STACK_GLOBAL":
                names.add(" ".join(strings[-2:]))
            elif isinstance(argument, str):
                strings = [*strings[-1:], argument]
    except (ValueError, OverflowError) as fault:
        damage = fault
    strange = sorted(name for name in names if name not in _HARMLESS and not _is_tensor_part(name))
    if strange:
        shown = ", ".join(f"'{printable(name.replace(' ', '.'))}'" for name in strange[:5])
        raise UserError(
            f"{printable(path)} asks for {shown}: loading it could run code, so it is refused. "
            "Ask its author for .safetensors, or save its state dict alone"
        )
    if damage is not None:
        raise UserError(f"{printable(path)} is damaged or not a PyTorch file: {printable(damage)}") from damage


def _is_tensor_part(name: str) -> bool:
    """Whether a name is a storage, a number type, or one of the functions that put a tensor together."""
    module, _, kind = name.partition(" ")
    if module in ("torch._utils", "torch.nn.parameter"):
        return kind.startswith("_rebuild_") or kind == "Parameter"
    return module in ("torch", "torch.storage") and (
        kind.endswith("Storage") or isinstance(getattr(torch, kind, None), torch.dtype)
    )
