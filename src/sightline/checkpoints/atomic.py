"""Files that are either as they were or complete, whenever the power fails."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from sightline.errors import WorkError, printable

PARTIAL = ".partial-"
"""What the names of folders begin with in which a file is being written."""


def write_atomic(path: Path, content: bytes | Callable[[Path], None], size: int | None = None) -> None:
    """Writes a file in a folder of its own beside its place, which it takes once it is safely on disk.

    `content` is the bytes, or a function that writes them to the path it is given, about `size` of them. Raises
    WorkError where the disk refuses; the file is then as it was before.
    """
    room = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    fresh = room / path.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room.mkdir()
        if isinstance(content, bytes):
            size = len(content)
            fresh.write_bytes(content)
        else:
            content(fresh)
            fresh.chmod(room.stat().st_mode & 0o666)  # a library may have chosen another than this user's default
        _sync(fresh)
        fresh.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as fault:
        reason = refusal(fault, path.parent, size)
        raise WorkError(f"cannot write {printable(path)}: {reason}; what was there before is unchanged") from fault
    finally:
        shutil.rmtree(room, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what processes that were killed had not finished writing. Nobody else may be writing there."""
    for left in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """What may still be written into a folder that exists."""
    return shutil.disk_usage(folder).free


def refusal(fault: Exception, folder: Path, size: int | None = None) -> str:
    """Why the disk refused, and of a full one how many bytes are needed and free."""
    number = fault.errno if isinstance(fault, OSError) else None
    if number is None and (told := re.search(r"os error (\d+)", str(fault))):  # as safetensors speaks of it
        number = int(told[1])
    reason = os.strerror(number) if number else str(fault)
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return reason
    needed = "" if size is None else f"{size:,} bytes are needed and "
    return f"{reason} ({needed}{free_bytes(folder):,} are free)"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
