"""Files that are either as they were or complete, whenever the power fails."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from sightline.errors import WorkError, printable


def write_atomic(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Writes a file by way of a temporary neighbour that replaces it once it is safely on disk.

    `content` is the bytes, or a function that writes them to the path it is given. Raises WorkError where the disk
    refuses; the file is then as it was before.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as fault:
        reason = fault.strerror or str(fault)
        raise WorkError(f"cannot write {printable(path)}: {reason}; what was there before is unchanged") from fault
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
