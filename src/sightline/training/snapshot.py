"""All tensors that a run's future follows from, by name, and back into their places."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sightline.errors import UserError, printable
from sightline.objectives.objective import Objective
from sightline.training.average import Average
from sightline.training.settings import Settings
from sightline.training.update import Updater

MOMENTS = {
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer", "step", "exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}
"""What an optimiser may remember of each parameter."""


def snapshot(objective: Objective, average: Average | None, updater: Updater) -> dict[str, Tensor]:
    """Weights, their average, the optimiser's moments and the loss scale."""
    tensors = _weights(objective, average)
    for index, values in updater.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items() if value is not None}
    scale = updater.scaler.state_dict()
    return tensors | {f"scaler.{name}": torch.tensor(value) for name, value in scale.items()}


def expected_size(objective: Objective, average: Average | None, settings: Settings) -> int:
    """Bytes of a snapshot, before the optimiser has made its moments."""
    kept = sum(tensor.nbytes for tensor in _weights(objective, average).values())
    taught = sum(parameter.nbytes for parameter in objective.parameters() if parameter.requires_grad)
    return kept + taught * sum(name != "step" for name in MOMENTS[settings.optimizer])


def restore(
    tensors: Mapping[str, Tensor],
    objective: Objective,
    average: Average | None,
    updater: Updater,
    where: str = "the checkpoint",
) -> None:
    """Puts back what `snapshot` took; the parts must be built from the same settings.

    Raises UserError that begins with `where` for tensors of other names, shapes or types.
    """
    _require_fitting(tensors, objective, average, updater, where)
    for name, here in _weights(objective, average).items():
        here.copy_(tensors[name])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, *rest = name.split(".")
        if part == "optimizer":
            moments.setdefault(int(rest[0]), {})[rest[1]] = tensor.clone()  # what is read may lie in a mapped file
    groups = updater.optimizer.state_dict()["param_groups"]
    updater.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if scale := updater.scaler.state_dict():
        updater.scaler.load_state_dict({name: tensors[f"scaler.{name}"].item() for name in scale})


def _weights(objective: Objective, average: Average | None) -> dict[str, Tensor]:
    tensors = {f"objective.{name}": value for name, value in objective.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.network.state_dict().items()}
    return tensors


def _require_fitting(
    tensors: Mapping[str, Tensor], objective: Objective, average: Average | None, updater: Updater, where: str
) -> None:
    must = {name: (value.shape, value.dtype) for name, value in _weights(objective, average).items()}
    for name, value in updater.scaler.state_dict().items():
        must[f"scaler.{name}"] = (torch.Size(), torch.tensor(value).dtype)
    may = dict(must)
    parameters = [parameter for group in updater.optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for name in MOMENTS[updater.settings.optimizer]:
            shape = torch.Size() if name == "step" else parameter.shape
            may[f"optimizer.{index}.{name}"] = (shape, torch.float32 if name == "step" else parameter.dtype)
    for name in [*tensors, *must]:
        found = (tensors[name].shape, tensors[name].dtype) if name in tensors else None
        if found is None or found != may.get(name):
            raise UserError(f"{where}: '{printable(name)}' is not what the record of this run (run.json) speaks of")
