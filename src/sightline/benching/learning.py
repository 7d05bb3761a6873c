"""Updates of the weights, beside the loops that others have: a classifier's, and those of a masked autoencoder."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sightline.benching.apart import Processes, Side
from sightline.benching.ceilings import Machine, settled
from sightline.benching.contenders import PRECISIONS, seconds_of, shared
from sightline.benching.memory import most_of
from sightline.benching.peers import masked_autoencoder, network_of
from sightline.benching.tables import CLASSES, OURS, Plan, Table, rows_of
from sightline.benching.trainer import Steps
from sightline.device import keep_for_next
from sightline.errors import UserError
from sightline.network import count_macs, count_parameters
from sightline.objectives.mae import MAE, MAEConfig
from sightline.objectives.objective import Objective
from sightline.objectives.supervised import Supervised
from sightline.training.distributed import World
from sightline.training.settings import Settings
from sightline.training.update import Updater
from sightline.types import Batch

STEPWISE = 2
"""A step back from scores is about as much work as two forward."""

RATE = 1e-4


def training(plan: Plan, machine: Machine) -> Iterator[Table]:
    """One update of the weights: forward, backward, a clipped gradient, AdamW; beside a plain loop around others."""
    flops = (1 + STEPWISE) * 2 * count_macs(plan.architecture())
    ways = {"": False, **({", compiled": True} if plan.compiled else {})}
    for precision in shared(plan):
        dtype, notes = PRECISIONS[precision].dtype, list[str]()
        sides = [
            Side(OURS + said, OURS, partial(_classifying, plan, dtype, compiled=way)) for said, way in ways.items()
        ]
        for name in plan.peers:
            sides += [Side(name + said, name, partial(_looping, name, plan, dtype, way)) for said, way in ways.items()]
        if "transformers" in plan.peers:
            if importlib.util.find_spec("accelerate") is None:
                notes.append("transformers' Trainer is left out: it needs accelerate, which is not installed")
            else:
                sides.append(Side("transformers' Trainer", "transformers", partial(_trained, plan, dtype)))
        yield _table("training", plan, precision, sides, notes, flops, machine.products[precision])


def mae(plan: Plan, machine: Machine) -> Iterator[Table]:
    """One update of a masked autoencoder with the decoder of the paper, beside transformers' in a plain loop."""
    for precision in shared(plan):
        dtype = PRECISIONS[precision].dtype
        sides = [Side(OURS, OURS, partial(_hiding, plan, dtype))]
        if "transformers" in plan.peers:
            sides.append(Side("transformers", "transformers", partial(_theirs_hiding, plan, dtype)))
        yield _table("mae", plan, precision, sides, [], None, 0.0)


MEMORY = "MB: the most that a step holds beyond weights and moments"


def _table(
    case: str,
    plan: Plan,
    precision: str,
    sides: Sequence[Side],
    notes: Sequence[str],
    flops: float | None,
    peak: float,
) -> Table:
    batch = max(plan.batch_sizes)
    parts = [f"{plan.image_size} pixels"] if plan.image_size else []
    parts += [f"patches of {plan.patch_size}"] if plan.patch_size else []
    size = f" ({', '.join(parts)})" if parts else ""
    title = f"{case}, {plan.model}{size}, batches of {batch}, {precision}"
    with Processes() as processes:
        try:
            found, absent = processes.present(sides)
        except UserError as fault:
            return Table(case, title, batch, precision, notes=[f"left out: {fault}"])
        timed = processes.in_turns([side for side, _ in found], plan.rounds, seconds_of, plan.device)
        megabytes = [processes.ask(side, most_of, plan.device) for side, _ in found]
    rows = rows_of(timed, [size for _, size in found], batch, flops=flops, peak=peak, megabytes=megabytes)
    return Table(case, title, batch, precision, rows, notes=[*absent, *notes, MEMORY])


def _batch(plan: Plan) -> Batch:
    index = torch.arange(max(plan.batch_sizes))
    pixels = torch.randn(len(index), 3, *plan.architecture().backbone.image_size)
    return Batch(pixels, index % CLASSES, index, index).to(plan.device)


class _Updates:
    """What `train` does with a batch."""

    def __init__(self, objective: Objective, plan: Plan, dtype: torch.dtype, *, compiled: bool = False):
        keep_for_next()
        self.parameters, self.given, self.device = count_parameters(objective), _batch(plan), plan.device
        batch = len(self.given.index)
        settings = Settings(batch_size=batch, optimizer="adamw", lr=RATE, micro_batch=batch, compile=compiled)
        self.updater = Updater(objective.to(plan.device).train(), settings, World(0, 1, plan.device), dtype)

    def __call__(self) -> None:
        self.updater(self.given, 0, RATE)
        settled(self.device)


def _classifying(plan: Plan, dtype: torch.dtype, *, compiled: bool) -> _Updates:
    return _Updates(Supervised(plan.architecture().build()), plan, dtype, compiled=compiled)


def _hiding(plan: Plan, dtype: torch.dtype) -> _Updates:
    return _Updates(MAE(plan.architecture().build()), plan, dtype)


class _Loop:
    """What people write: autocast where asked for, the loss, backward, clip, fused AdamW."""

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[nn.Module, Batch], torch.Tensor],
        plan: Plan,
        precision: torch.dtype,
    ):
        self.network, self.loss, self.device, self.precision = network.to(plan.device), loss, plan.device, precision
        self.network.train()
        self.parameters, self.given = count_parameters(network), _batch(plan)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05, fused=True)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            loss = self.loss(self.network, self.given)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # which a loop prints
        settled(self.device)


def _looping(name: str, plan: Plan, dtype: torch.dtype, compiled: bool) -> _Loop:
    network = network_of(name, plan.architecture(), CLASSES)
    if compiled:
        network.compile(dynamic=False)
    return _Loop(network, lambda network, given: F.cross_entropy(network(given.pixels), given.targets), plan, dtype)


def _theirs_hiding(plan: Plan, dtype: torch.dtype) -> _Loop:
    network = masked_autoencoder(plan.architecture(), MAEConfig())
    return _Loop(network, lambda network, given: network(given.pixels).loss, plan, dtype)


def _trained(plan: Plan, dtype: torch.dtype) -> Steps:
    answering: Any = network_of("transformers", plan.architecture(), CLASSES)
    return Steps(answering.network, _batch(plan), plan.device, dtype, RATE)
