"""SHA-256 of a weights file, whole and tensor by tensor: kept in the sealed configuration, compared before use."""

import hashlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sightline.errors import UserError, printable


def hashes_of(path: Path) -> dict[str, Any]:
    """What `require_hashes` compares: size and SHA-256 of a safetensors file, and of each tensor in it.

    A tensor's entry has its dtype, shape, SHA-256, and the bytes of the file (from, to) that it stands in.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            place = [start + offset for offset in entry["data_offsets"]]
            shape = {"dtype": entry["dtype"], "shape": entry["shape"]}
            tensors[name] = {**shape, "bytes": place, "sha256": _digest(data, place)}
        return {"bytes": len(data), "sha256": _digest(data, (0, len(data))), "tensors": tensors}


def require_hashes(path: Path, written: Any) -> None:
    """Raises UserError unless a file is, bit for bit, the one that `hashes_of` saw; names the tensors that differ."""
    where = printable(path)
    if not isinstance(written, Mapping):
        raise UserError(f"{where}: config.json does not say what its SHA-256 is")
    try:
        with path.open("rb") as file:
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
            if digest == written.get("sha256"):
                return
            names = _differing(path, written) if size == written.get("bytes") else None
    except OSError as fault:
        raise UserError(f"cannot read {where}: {fault.strerror}") from fault
    if names is None:
        raise UserError(f"{where} is damaged: it has {size} bytes, and {written.get('bytes')} were written")
    what = f"tensor {', '.join(names[:5])}" if names else "its header"
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise UserError(f"{where} is damaged: its SHA-256 is not the one in config.json; what differs is {what}{rest}")


def _differing(path: Path, written: Mapping[str, Any]) -> list[str]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        entries = written.get("tensors")
        found = entries.items() if isinstance(entries, Mapping) else ()
        return [f"'{printable(name)}'" for name, entry in found if _digest(data, entry["bytes"]) != entry["sha256"]]


def _digest(data: mmap.mmap, place: Any) -> str:
    with memoryview(data) as whole, whole[place[0] : place[1]] as part:
        return hashlib.sha256(part).hexdigest()
