"""The full state of a run on disk: written so that a crash at any moment leaves a good one behind."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import UserError
from sightline.training.schedule import Plan

KEPT = 3
"""Checkpoints that stay on disk, so that a damaged one can be passed over."""


@dataclass
class State:
    """Where a run stands, besides its tensors.

    `seconds` counts the time at work, `evaluations` those made along the schedule, `stale` those since the best, and
    `infinite` the updates left out in a row.
    """

    plan: Plan
    step: int = 0
    seconds: float = 0.0
    best: float = float("-inf")
    stale: int = 0
    evaluations: int = 0
    infinite: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "State":
        """Reads what `dataclasses.asdict` wrote."""
        fields = dict(data)
        fields["plan"] = Plan(**fields["plan"])
        fields["refused"] = [tuple(item) for item in fields["refused"]]
        return cls(**fields)


class Store:
    """A folder of checkpoints, each a file of tensors and the manifest that commits it.

    The tensors are written and synced first; the manifest with their SHA-256 comes last. A checkpoint without a
    manifest, or whose tensors do not fit it, does not count.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def save(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Adds a checkpoint and drops the oldest beyond `KEPT`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        data = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
        path = self.directory / f"step-{state.step:09d}.safetensors"
        manifest = {"sha256": hashlib.sha256(data).hexdigest(), "state": asdict(state)}
        write_atomic(path, data)
        write_atomic(path.with_suffix(".json"), json.dumps(manifest).encode())
        for old in self._manifests()[KEPT:]:
            old.unlink()  # the commit mark goes first
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def newest(self) -> tuple[State, dict[str, Tensor], list[str]] | None:
        """The newest good checkpoint, and what was passed over on the way to it; None where there is no checkpoint.

        Raises UserError where there are checkpoints and none of them is good.
        """
        passed: list[str] = []
        for path in self._manifests():
            try:
                manifest = json.loads(path.read_bytes())
                data = path.with_suffix(".safetensors").read_bytes()
                if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
                    raise ValueError("its tensors do not fit the recorded hash")
                return State.from_json(manifest["state"]), load(data), passed
            except (OSError, ValueError, KeyError, TypeError) as fault:
                passed.append(f"{path.stem} is damaged ({fault})")
        if passed:
            raise UserError(f"{self.directory}: no good checkpoint is left: {'; '.join(passed)}. Start anew elsewhere.")
        return None

    def _manifests(self) -> list[Path]:
        return sorted(self.directory.glob("step-*.json"), reverse=True)
