"""The full state of a run on disk: written so that a crash at any moment leaves a good one behind."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sightline.checkpoints.atomic import free_bytes, sweep, write_atomic
from sightline.checkpoints.files import read_sealed, read_tensors, safetensors_of
from sightline.checkpoints.sealed import sealed
from sightline.errors import UserError, printable
from sightline.schema import from_json
from sightline.training.schedule import Plan

KEPT = 3
"""Checkpoints that stay on disk, so that a damaged one can be passed over."""


@dataclass
class State:
    """Where a run stands, besides its tensors.

    `seconds` counts the time at work, `evaluations` those made along the schedule, `stale` those since the best, and
    `infinite` the updates left out in a row. `due` says that an evaluation is due after this step and not yet made.
    `refused` holds every image that could not be read, by name, with the reason. `micro_batch` is there once memory
    did not suffice for more. `journal` is the length of `metrics.jsonl` in bytes. `waited` and `worked` are the seconds
    in which steps waited for their images, and computed, once each process had settled in.
    """

    plan: Plan
    step: int = 0
    seconds: float = 0.0
    best: float = float("-inf")
    stale: int = 0
    evaluations: int = 0
    infinite: int = 0
    due: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    micro_batch: int | None = None
    journal: int = 0
    waited: float = 0.0
    worked: float = 0.0

    @property
    def waiting(self) -> float:
        """The share of the steps' time that went into waiting for images."""
        return self.waited / max(self.waited + self.worked, 1e-9)


class Store:
    """A folder of checkpoints, each a file of tensors and the manifest that commits it.

    The tensors are written and synced first; the sealed manifest with their SHA-256 comes last. A checkpoint without a
    manifest, or whose tensors do not fit it, does not count.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def save(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Adds a checkpoint and drops the oldest beyond `KEPT`. Raises WorkError where the disk refuses."""
        self.write(state.step, asdict(state), tensors)

    def write(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """What `save` does, of a state that is plain data already."""
        path = self.directory / f"step-{step:09d}.safetensors"
        digest = ""

        def write(file: Path) -> None:
            nonlocal digest
            safetensors_of(tensors)(file)
            with file.open("rb") as written:
                digest = hashlib.file_digest(written, "sha256").hexdigest()

        write_atomic(path, write, size_of(tensors))
        write_atomic(path.with_suffix(".json"), sealed({"sha256": digest, "state": state}))
        with suppress(OSError):  # what cannot be dropped now goes with the next save
            for old in self._manifests()[KEPT:]:
                old.unlink()  # the commit mark goes first
                old.with_suffix(".safetensors").unlink(missing_ok=True)

    def newest(self) -> tuple[State, Mapping[str, Tensor], list[str]] | None:
        """The newest good checkpoint, and what was passed over on the way to it; None where there is no checkpoint.

        Raises UserError where there are checkpoints and none of them is good.
        """
        passed: list[str] = []
        for path in self._manifests():
            try:
                return *_read(path), passed
            except (OSError, UserError) as fault:
                passed.append(f"{printable(path.stem)} is damaged ({fault})")
        if passed:
            where = printable(self.directory)
            raise UserError(f"{where}: no good checkpoint is left: {'; '.join(passed)}. Start anew elsewhere.")
        return None

    def require_room(self, size: int) -> None:
        """Raises UserError unless so many checkpoints of `size` bytes fit on the disk as will lie there at once."""
        self.directory.mkdir(parents=True, exist_ok=True)
        needed, free = max(KEPT + 1 - len(self._manifests()), 1) * size, free_bytes(self.directory)
        if free < needed:
            raise UserError(
                f"the checkpoints of this run need {needed:,} bytes in {printable(self.directory)}, and {free:,} are "
                "free. Free some space and go on with --resume, or choose another place with --out."
            )

    def tidy(self, step: int) -> None:
        """Removes what a process that was killed left unfinished, and checkpoints after `step`, where it goes on."""
        if not self.directory.is_dir():
            return
        sweep(self.directory)
        for manifest in self._manifests():
            if manifest.stem > f"step-{step:09d}":
                manifest.unlink()
        for tensors in self.directory.glob("step-*.safetensors"):
            if not tensors.with_suffix(".json").exists():
                tensors.unlink()

    def _manifests(self) -> list[Path]:
        return sorted(self.directory.glob("step-*.json"), reverse=True)


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _read(manifest: Path) -> tuple[State, Mapping[str, Tensor]]:
    """One checkpoint. Raises UserError for a damaged one."""
    path, written = manifest.with_suffix(".safetensors"), read_sealed(manifest)
    contents = read_tensors(path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != written.get("sha256"):
            raise UserError("its tensors do not fit the recorded hash")
    return from_json(State, written.get("state"), printable(manifest)), contents.tensors
