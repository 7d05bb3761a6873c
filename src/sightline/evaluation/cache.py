"""Results that are dear to compute and small to keep, in the user's cache: the same question is answered once."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import WorkError
from sightline.images.limits import from_environment

Kept = tuple[dict[str, Tensor], str]
"""Tensors by name, and a text beside them."""


def folder(kind: str = "features") -> Path:
    """Where results of a kind are kept: `sightline/features` in XDG_CACHE_HOME, or else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "sightline" / kind


@dataclass(frozen=True)
class Cache:
    """Tensors under keys, in at most `limit` bytes (SIGHTLINE_CACHE_BYTES, else 2 GiB); the longest unused go first.

    It is a help and no part of any result: what cannot be read, is damaged or does not fit counts as not there, and
    what cannot be written is not kept.
    """

    folder: Path = field(default_factory=folder)
    limit: float = field(default_factory=from_environment("SIGHTLINE_CACHE_BYTES", 2**31))

    def get(self, key: str) -> Kept | None:
        """What is kept under a key, and unharmed."""
        path = self._path(key)
        try:
            if not path.is_file():  # opening a pipe would wait for whoever writes
                return None
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            if told.get("key") != key or told.get("digest") != _digest(tensors, told.get("text", "")):
                return None
            os.utime(path)
        except (OSError, SafetensorError):
            return None
        return tensors, told["text"]

    def put(self, key: str, tensors: Mapping[str, Tensor], text: str = "") -> bool:
        """Keeps tensors and a text under a key, and says whether it could."""
        told = {"key": key, "text": text, "digest": _digest(tensors, text)}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, told)
        if len(content) > self.limit:
            return False
        try:
            write_atomic(self._path(key), content)
            self._forget()
        except (OSError, WorkError):
            return False
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _forget(self) -> None:
        """Removes the longest unused beyond the limit."""
        files = [(path, path.stat()) for path in self.folder.glob("*.safetensors")]
        left = self.limit
        for path, facts in sorted(files, key=lambda file: -file[1].st_mtime_ns):
            left -= facts.st_size
            if left < 0:
                path.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(json.dumps(text).encode())
    for name in sorted(tensors):
        digest.update(f"\0{name}\0{tensors[name].dtype}\0{tuple(tensors[name].shape)}\0".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
