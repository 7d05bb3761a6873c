"""Updates of the weights, beside the loops that others have: a classifier's, and those of a masked autoencoder."""

import gc
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sightline.benching.ceilings import Machine, settled, timer_of
from sightline.benching.contenders import PRECISIONS, shared
from sightline.benching.memory import most_of
from sightline.benching.peers import PEERS, masked_autoencoder
from sightline.benching.rounds import Contender, take_turns
from sightline.benching.tables import CLASSES, OURS, Plan, Row, Table, rows_of
from sightline.benching.trainer import Steps
from sightline.errors import UserError
from sightline.network import count_macs, count_parameters
from sightline.objectives.mae import MAE
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
    architecture, batch = plan.architecture(), max(plan.batch_sizes)
    flops = (1 + STEPWISE) * 2 * count_macs(architecture)
    for precision in shared(plan):
        dtype = PRECISIONS[precision].dtype
        given = _batch(batch, architecture.backbone.image_size).to(plan.device)
        sides: list[tuple[Contender, int]] = []
        notes: list[str] = []
        for name, compiled in ((OURS, False), *([(f"{OURS}, compiled", True)] if plan.compiled else [])):
            network = architecture.build()
            work = _ours(Supervised(network), plan, batch, dtype, given, compiled=compiled)
            sides.append((Contender(name, work), count_parameters(network)))
        for name in plan.peers:
            peer = PEERS[name]
            if (network := peer.network(architecture, CLASSES)) is None:
                notes.append(f"{name} {peer.version} has no {architecture.name} like this")
                continue
            loss = partial(_cross_entropy, given=given, device=plan.device)
            sides.append((Contender(name, _Loop(network, loss, plan.device, dtype)), count_parameters(network)))
            if plan.compiled:
                twin: Any = peer.network(architecture, CLASSES)
                twin.compile(dynamic=False)
                loop = _Loop(twin, loss, plan.device, dtype)
                sides.append((Contender(f"{name}, compiled", loop), count_parameters(twin)))
            if name == "transformers":
                if importlib.util.find_spec("accelerate") is None:
                    notes.append("transformers' Trainer is left out: it needs accelerate, which is not installed")
                else:
                    answering: Any = peer.network(architecture, CLASSES)
                    steps = Steps(answering.network, given, plan.device, dtype, RATE)
                    sides.append((Contender("transformers' Trainer", steps), count_parameters(answering)))
        rows = _timed(sides, plan, batch, flops, machine.products[precision])
        title = f"training, {plan.model}{_size(plan)}, batches of {batch}, {precision}"
        yield Table("training", title, batch, precision, rows, notes=[*notes, MEMORY])
        del sides, network, work
        gc.collect()


def mae(plan: Plan, machine: Machine) -> Iterator[Table]:
    """One update of a masked autoencoder with the decoder of the paper, beside transformers' in a plain loop."""
    architecture, batch = plan.architecture(), max(plan.batch_sizes)
    for precision in shared(plan):
        dtype, title = PRECISIONS[precision].dtype, f"mae, {plan.model}{_size(plan)}, batches of {batch}, {precision}"
        given = _batch(batch, architecture.backbone.image_size).to(plan.device)
        try:
            objective = MAE(architecture.build())
        except UserError as fault:
            yield Table("mae", title, batch, precision, notes=[f"left out: {fault}"])
            return
        sides = [(Contender(OURS, _ours(objective, plan, batch, dtype, given)), count_parameters(objective))]
        notes = []
        if "transformers" in plan.peers:
            if (twin := masked_autoencoder(architecture, objective.config)) is None:
                notes.append(f"transformers {PEERS['transformers'].version} has no masked autoencoder like this")
            else:
                loop = _Loop(twin, partial(_own_loss, given=given, device=plan.device), plan.device, dtype)
                sides.append((Contender("transformers", loop), count_parameters(twin)))
        rows = _timed(sides, plan, batch, None, 0.0)
        yield Table("mae", title, batch, precision, rows, notes=[*notes, MEMORY])
        del sides, objective
        gc.collect()


MEMORY = "MB: the most that a step holds beyond weights and moments"


def _size(plan: Plan) -> str:
    parts = [f"{plan.image_size} pixels"] if plan.image_size else []
    parts += [f"patches of {plan.patch_size}"] if plan.patch_size else []
    return f" ({', '.join(parts)})" if parts else ""


def _batch(count: int, size: tuple[int, int]) -> Batch:
    index = torch.arange(count)
    return Batch(torch.randn(count, 3, *size), index % CLASSES, index, index)


def _ours(
    objective: Objective, plan: Plan, batch: int, dtype: torch.dtype, given: Batch, *, compiled: bool = False
) -> Callable[[], None]:
    settings = Settings(batch_size=batch, optimizer="adamw", lr=RATE, micro_batch=batch, compile=compiled)
    updater = Updater(objective.to(plan.device).train(), settings, World(0, 1, plan.device), dtype)

    def step() -> None:
        updater(given, 0, RATE)
        settled(plan.device)

    return step


def _timed(
    sides: Sequence[tuple[Contender, int]], plan: Plan, batch: int, flops: float | None, peak: float
) -> list[Row]:
    contenders = [contender for contender, _ in sides]
    timed = take_turns(contenders, plan.rounds, timer_of(plan.device))
    megabytes = [most_of(contender.work, plan.device) for contender in contenders]
    for contender in contenders:
        if isinstance(contender.work, Steps):
            contender.work.close()
    return rows_of(timed, [size for _, size in sides], batch, flops=flops, peak=peak, megabytes=megabytes)


def _cross_entropy(network: nn.Module, *, given: Batch, device: torch.device) -> torch.Tensor:
    return F.cross_entropy(network(given.pixels.to(device)), given.targets.to(device))


def _own_loss(network: nn.Module, *, given: Batch, device: torch.device) -> torch.Tensor:
    return network(given.pixels.to(device)).loss


class _Loop:
    """What people write: autocast where asked for, the loss, backward, clip, fused AdamW."""

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[nn.Module], torch.Tensor],
        device: torch.device,
        precision: torch.dtype,
    ):
        self.network, self.loss, self.device, self.precision = network.to(device).train(), loss, device, precision
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05, fused=True)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            loss = self.loss(self.network)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # which a loop prints
        settled(self.device)
