"""How long an update of a network takes on this machine, by a short measurement."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sightline.device import out_of_memory
from sightline.network import Network, recompute
from sightline.objectives.objective import Objective
from sightline.objectives.supervised import Supervised
from sightline.training.distributed import World
from sightline.training.settings import Settings
from sightline.training.update import Updater
from sightline.types import Batch

LONG = 0.5
"""Seconds of a step that need no repetition to be measured."""


Targets = Callable[[int, tuple[int, int]], Any]
"""Targets for a number of images of a (height, width)."""


def class_indices(images: int, size: tuple[int, int]) -> Tensor:
    """The first class for every image."""
    return torch.zeros(images, dtype=torch.int64)


def measure(
    network: Network,
    settings: Settings,
    device: torch.device,
    precision: torch.dtype,
    *,
    teach: Callable[[Network], Objective] = Supervised,
    targets: Targets = class_indices,
) -> float:
    """Seconds of an update of the weights, on the machine as busy as it is.

    A copy of the network is taught on noise for a second or so; a large batch is measured by a part of it.
    `teach` makes the objective, and `targets` those of a number of images of a size.
    """
    shape = network.architecture.backbone
    with torch.random.fork_rng(devices=[]):
        copy = network.architecture.build()
        objective = teach(copy.to(device)).train()
        recompute(copy, settings.checkpointing)
        updater = Updater(objective, settings, World(0, 1, device), precision)
        pace, images = 0.0, min(4, settings.batch_size, max(settings.micro_batch or 4, 2))
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
    return pace


def noise_of(network: Network, targets: Targets = class_indices) -> Callable[[int], Batch]:
    """What makes batches of one image of noise for a network, as often as it is told, without memory for each."""
    shape = network.architecture.backbone

    def drawn(images: int) -> Batch:
        one = _noise(1, shape.in_chans, shape.image_size, targets)
        index = torch.arange(images)
        return Batch(one.pixels.expand(images, -1, -1, -1), targets(images, shape.image_size), index, index)

    return drawn


def _noise(images: int, channels: int, size: tuple[int, int], targets: Targets) -> Batch:
    index = torch.arange(images)
    return Batch(torch.randn(images, channels, *size), targets(images, size), index, index)
