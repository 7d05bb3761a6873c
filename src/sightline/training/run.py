"""A run on disk: its folder, its record, and the lock that keeps others out."""

import fcntl
import os
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sightline.checkpoints.atomic import PARTIAL, write_atomic
from sightline.checkpoints.files import read_sealed
from sightline.checkpoints.sealed import SEAL, sealed
from sightline.errors import UserError, printable
from sightline.schema import require


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run. `run.json` says what the run is from its first moment on."""

    path: Path

    @property
    def record_file(self) -> Path:
        """The run record."""
        return self.path / "run.json"

    def read(self) -> dict[str, Any]:
        """The record of a run begun earlier. Raises UserError where there is none."""
        if not self.record_file.is_file():
            raise UserError(f"{printable(self.path)} holds no run to resume: there is no run.json")
        record = read_sealed(self.record_file)
        record.pop(SEAL, None)  # it is made anew with every writing
        data = record.get("data")
        sound = isinstance(data, dict) and isinstance(data.get("source"), str) and "fingerprint" in data
        sound = sound and type(record.get("seed")) is int and isinstance(record.get("recipe"), dict)
        require(sound, f"{printable(self.record_file)} is not the record of a run")
        return record

    def write(self, record: dict[str, Any]) -> None:
        """Replaces the record."""
        write_atomic(self.record_file, sealed(record, indent=1))

    def require_fresh(self) -> None:
        """Raises UserError where the folder holds more than hidden files: a new run could overwrite it.

        A first checkpoint without a record is what a run leaves that was ended before it began; it may go.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{printable(self.path)} is a file; choose another folder with --out")
        if self.path.is_dir() and not all(item.name.startswith(".") or _unbegun(item) for item in self.path.iterdir()):
            raise UserError(
                f"{printable(self.path)} is not empty; choose another folder with --out, or go on with --resume"
            )


def _unbegun(path: Path) -> bool:
    if path.name != "checkpoints" or path.is_symlink() or not path.is_dir():
        return False
    return all(item.name.startswith((PARTIAL, f"step-{0:09d}.")) for item in path.iterdir())


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Holds a folder for one run. Raises UserError where another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as fault:
        raise UserError(f"cannot write into {printable(folder)}: {fault.strerror}; choose another --out") from fault
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            where = printable(folder)
            raise UserError(f"another run is at work in {where}; wait for it, or choose another --out") from fault
        _HELD.add(handle)
        yield
    finally:
        _HELD.discard(handle)
        os.close(handle)


_HELD: set[int] = set()


def _let_go() -> None:
    """A forked process must not hold the folder of a run that was killed."""
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_go)


def environment(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """What a run depends on besides its settings: versions, processor, arithmetic."""
    packages = ("sightline", "torch", "torchvision", "numpy", "pillow")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
