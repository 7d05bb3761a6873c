"""One process or many: the same run either way."""

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sightline.errors import UserError


@dataclass(frozen=True)
class World:
    """A process among those that `torchrun` started; alone where it did not."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The module whose backward pass averages gradients over all processes."""
        if self.size == 1:
            return objective
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(objective, device_ids=ids)

    def sum(self, count: int) -> int:
        """The sum of a count over all processes, at every process."""
        if self.size == 1:
            return count
        total = torch.tensor(int(count), device=self.device)
        dist.all_reduce(total)
        return int(total)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order of ranks, at every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """The first process's value, at every process: for decisions that depend on a clock or a signal."""
        return self.gather(value)[0]


def join(device: torch.device) -> World:
    """Joins the processes that `torchrun` announced in the environment: NCCL on GPUs, Gloo elsewhere."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, device)
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU of its own: there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return World(rank, size, device)


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # else what still holds the group ends after the interpreter, where its threads abort the process
        dist.destroy_process_group()
