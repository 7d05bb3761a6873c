"""One update of the weights from one global batch."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from sightline.device import free_memory, out_of_memory
from sightline.errors import WorkError
from sightline.layers.dense import fast_products
from sightline.layers.encoder import rows_of
from sightline.objectives.objective import Objective
from sightline.training import optimizer as optimizers
from sightline.training.distributed import World
from sightline.training.schedule import decay
from sightline.training.settings import Settings
from sightline.types import Batch


@dataclass(frozen=True)
class Update:
    """What an update did: the loss and further figures of this process's part, and the norm of the gradient."""

    loss: float
    figures: dict[str, float]
    norm: float

    @property
    def finite(self) -> bool:
        """Whether the gradient was finite and the weights moved."""
        return math.isfinite(self.norm)


class Updater:
    """Forward, backward, clip and step, over micro-batches and processes, in the chosen arithmetic.

    Randomness inside the network follows from (seed, step) alone, and stochastic depth from the place of each sample
    in the global batch: neither the number of processes nor that of micro-batches changes it. Where memory does not
    suffice, `micro_batch` is halved and the update made with smaller parts of the same batch.
    """

    def __init__(self, objective: Objective, settings: Settings, world: World, precision: torch.dtype):
        self.settings, self.world, self.precision = settings, world, precision
        self.objective, self.micro_batch = objective, settings.micro_batch
        self.optimizer = optimizers.build(objective, objective.network, settings)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == torch.float16)
        if settings.compile:
            objective.network.compile()
        self.model = world.wrap(objective)

    def __call__(self, batch: Batch, step: int, lr: float, progress: float = 0.0) -> Update:
        """Moves the weights once by the gradient of the global batch, of which `batch` is this process's part.

        Every sample weighs the same, however many of them each process has. `progress` is the share of the run that is
        done. The weights stay where the gradient is not finite.
        """
        optimizers.set_rate(self.optimizer, lr, decay(self.settings, progress))
        loss, figures = self._gradient(batch, step, progress)
        self.scaler.unscale_(self.optimizer)
        self.objective.after_backward()
        norm = self._clip()
        if math.isfinite(norm) or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips by itself where a scaled gradient overflowed
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(loss, figures, norm)

    def _clip(self) -> float:
        """Shortens the gradient to the length that is allowed, as a whole or tensor by tensor; its norm before."""
        taught, limit = list(self.objective.parameters()), self.settings.clip_grad or math.inf
        norm = float(nn.utils.clip_grad_norm_(taught, math.inf if self.settings.clip_each else limit))
        if self.settings.clip_each and math.isfinite(norm):
            for parameter in taught:
                nn.utils.clip_grad_norm_(parameter, limit)
        return norm

    def _gradient(self, batch: Batch, step: int, progress: float) -> tuple[float, dict[str, float]]:
        """The gradient of the whole batch, in parts as large as memory allows; its loss and figures."""
        while True:
            size = min(self.micro_batch or len(batch.index), len(batch.index))
            size += size % 2  # pairs of neighbours are mixed with each other and stay together
            self.objective.before_update(progress)
            try:
                return self._summed(batch, step, size)
            except (RuntimeError, MemoryError) as fault:
                if not out_of_memory(fault):
                    raise
            self._shrink(size)  # only here has the failed pass let go of its memory

    def _shrink(self, size: int) -> None:
        """Goes on to parts half as large. Raises WorkError where there are none, or other processes to agree with."""
        self.optimizer.zero_grad(set_to_none=True)
        free_memory(self.world.device)
        half = size // 2 + size // 2 % 2
        if size == 2:
            raise WorkError(
                "memory does not suffice for two images at a time. Take smaller images (--image-size), a smaller model "
                "(--model), or --checkpointing, in a new run."
            )
        if self.world.size > 1:  # the others wait for a gradient that does not come
            raise WorkError(
                f"memory does not suffice for {size} images at a time in each process: go on with --resume "
                f"--micro-batch {half}"
            )
        self.micro_batch = half

    def _summed(self, batch: Batch, step: int, size: int) -> tuple[float, dict[str, float]]:
        """Adds up the gradient of the batch in parts of `size` images."""
        mine = len(batch.index)
        start, whole = mine * self.world.rank, mine * self.world.size
        weight = mine * self.world.size / self.world.sum(mine)  # gradients are averaged over processes
        loss, figures = torch.zeros((), device=self.world.device), {}
        for begin in range(0, mine, size):
            part = batch.part(begin, begin + size).to(self.world.device)
            share = len(part.index) / mine
            torch.manual_seed((self.settings.seed << 32) + step)
            alone, fast = self._alone(begin + size < mine), fast_products(not self.settings.compile)
            with rows_of(start + begin, whole, len(part.index)), alone, fast:
                with self._autocast():
                    result = self.model(part)
                self.scaler.scale(result.loss * share * weight).backward()
            loss += result.loss.detach() * share
            for name, value in result.metrics.items():
                figures[name] = figures.get(name, 0.0) + float(value) * share
        return float(loss), figures

    def _autocast(self) -> torch.autocast:
        enabled = self.precision != torch.float32
        return torch.autocast(self.world.device.type, dtype=self.precision if enabled else None, enabled=enabled)

    def _alone(self, more: bool) -> AbstractContextManager:
        """Keeps gradients in this process while more micro-batches follow: they travel once, with the last."""
        if more and isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()
