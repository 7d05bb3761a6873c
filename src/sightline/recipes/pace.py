"""What a network costs on this machine, by a short measurement: seconds of an update, memory of an image."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sightline.device import out_of_memory
from sightline.network import Network
from sightline.objectives.objective import Objective
from sightline.objectives.supervised import Supervised
from sightline.training.distributed import World
from sightline.training.settings import Settings
from sightline.training.update import Updater
from sightline.types import Batch

LONG = 0.5
"""Seconds of a step that need no repetition to be measured."""

SHARE = 0.5
"""Part of the free memory that what is kept for the backward pass may take."""


Targets = Callable[[int, tuple[int, int]], Any]
"""Targets for a number of images of a (height, width)."""


def class_indices(images: int, size: tuple[int, int]) -> Tensor:
    """The first class for every image."""
    return torch.zeros(images, dtype=torch.int64)


@dataclass(frozen=True)
class Pace:
    """`seconds` of an update of the weights, on the machine as busy as it was, and `memory` of one image in bytes."""

    seconds: float
    memory: int


def measure(
    network: Network,
    settings: Settings,
    device: torch.device,
    precision: torch.dtype,
    *,
    teach: Callable[[Network], Objective] = Supervised,
    targets: Targets = class_indices,
) -> Pace:
    """Teaches a copy of the network on noise for a second or so; a large batch is measured by a part of it.

    `teach` makes the objective, and `targets` those of a number of images of a size.
    """
    shape = network.architecture.backbone
    with torch.random.fork_rng(devices=[]):
        copy = network.architecture.build()
        objective = teach(copy.to(device)).train()
        memory = _memory(objective, _noise(2, shape.in_chans, shape.image_size, targets))
        updater = Updater(objective, settings, World(0, 1, device), precision)
        pace, images = 0.0, min(4, settings.batch_size)
        for _ in range(4):
            batch = _noise(images, shape.in_chans, shape.image_size, targets)
            began = time.perf_counter()
            try:
                updater(batch, 0, settings.lr)
            except (RuntimeError, MemoryError) as fault:
                if not (pace and out_of_memory(fault)):
                    raise
                break  # the part measured before has to do
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - began
            pace = seconds * settings.batch_size / images
            if seconds > LONG:
                break
            images = settings.batch_size if pace < LONG else images
    return Pace(pace, memory)


def micro_batch(settings: Settings, memory: int, device: torch.device) -> int | None:
    """As many images at a time as memory bears, in pairs; None where all of a batch fit."""
    fitting = int(SHARE * available_memory(device)) // max(memory, 1) // 2 * 2
    return None if settings.batch_size <= fitting else max(fitting, 2)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had, of the device or of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _noise(images: int, channels: int, size: tuple[int, int], targets: Targets) -> Batch:
    index = torch.arange(images)
    return Batch(torch.randn(images, channels, *size), targets(images, size), index, index)


def _memory(objective: Objective, batch: Batch) -> int:
    """Bytes that the forward pass keeps for the backward pass, for each image."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    device = next(objective.parameters()).device
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(batch.to(device)).loss
    del loss
    return sum(kept.values()) // len(batch.index)
