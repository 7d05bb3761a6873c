"""All tensors that a run's future follows from, by name, and back into their places."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sightline.objectives.objective import Objective
from sightline.training.average import Average
from sightline.training.update import Updater


def snapshot(objective: Objective, average: Average | None, updater: Updater) -> dict[str, Tensor]:
    """Weights, their average, the optimiser's moments and the loss scale."""
    tensors = {f"objective.{name}": value for name, value in objective.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.network.state_dict().items()}
    for index, values in updater.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items() if value is not None}
    scale = updater.scaler.state_dict()
    return tensors | {f"scaler.{name}": torch.tensor(value) for name, value in scale.items()}


def restore(tensors: Mapping[str, Tensor], objective: Objective, average: Average | None, updater: Updater) -> None:
    """Puts back what `snapshot` took; the parts must be built from the same settings."""
    parts: dict[str, dict[str, Tensor]] = {"objective": {}, "average": {}, "optimizer": {}, "scaler": {}}
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    objective.load_state_dict(parts["objective"])
    if average is not None:
        average.network.load_state_dict(parts["average"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = tensor
    groups = updater.optimizer.state_dict()["param_groups"]
    updater.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if parts["scaler"]:
        updater.scaler.load_state_dict({name: value.item() for name, value in parts["scaler"].items()})
