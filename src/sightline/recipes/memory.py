"""How much memory a training takes, foreseen without computing anything, and how it is kept within what there is."""

import copy
import math
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sightline.device import give_back_at_once, pick_precision
from sightline.network import count_parameters, recompute
from sightline.objectives.objective import Objective
from sightline.recipes.recipe import Recipe
from sightline.training.distributed import World
from sightline.training.optimizer import groups
from sightline.training.settings import Settings
from sightline.types import Batch

SHARE = 0.75
"""Part of the free memory that a run may take: other programs, worker processes and fragments need some too."""

GB = 1e9

QUICK = 5e11
"""Parameters times pixels of a network that is gone through in less time than shapes are."""

SMALL = 2**16
"""Elements of tensors that have numbers where others have shapes alone."""

Noise = Callable[[int], Batch]
"""A batch of so many images, as the network reads them."""


@dataclass(frozen=True)
class Need:
    """Bytes of a training with `images` at a time.

    `moments` are those that the optimiser keeps; `average` the second copy of the weights, where there is one; `saving`
    the copy of all this while a checkpoint is written; `step` the most that gradients, activations and what is computed
    with them hold together.
    """

    images: int
    checkpointing: bool
    weights: int
    moments: int
    average: int
    saving: int
    step: int

    @property
    def further(self) -> int:
        """What comes on top of the weights, which are there already."""
        return self.moments + self.average + self.saving + self.step

    def __str__(self) -> str:
        parts = {"weights": self.weights, "optimiser": self.moments, "average of weights": self.average}
        parts |= {"copy for saving": self.saving, "activations and gradients": self.step}
        told = ", ".join(f"{name} {size / GB:.2g}" for name, size in parts.items() if size)
        return f"{(self.weights + self.further) / GB:.2g} GB ({told})"


class Forecast:
    """The needs of one objective for any number of images, with and without recomputation.

    A step is gone through with tensors that have a shape and no numbers, which takes about a second whatever its size.
    Objectives that look at numbers to decide what to do are measured by a forward pass of two images instead. Nothing
    that is asked changes the objective.
    """

    def __init__(self, objective: Objective, settings: Settings, noise: Noise, precision: torch.dtype):
        self.objective, self.settings, self.noise, self.precision = objective, settings, noise, precision
        self.weights = sum(tensor.nbytes for tensor in objective.state_dict().values())
        self.gradients = sum(p.nbytes for p in objective.parameters() if p.requires_grad)
        self.moments = sum(
            sum(parameter.nbytes for parameter in group["params"])
            * (1 if group["matrices"] or settings.optimizer == "sgd" else 2)
            for group in groups(objective, objective.network, settings)
        )
        self.average = 0 if settings.ema is None else sum(t.nbytes for t in objective.network.state_dict().values())
        self.kept: dict[bool, int] = {}
        self.known: dict[tuple[int, bool], int] = {}

    @property
    def compares(self) -> bool:
        """Whether images that go at a time are compared with each other."""
        return self.objective.compares

    def need(self, images: int, checkpointing: bool) -> Need:
        """What a training with so many images at a time takes."""
        copies = self.weights + self.moments + self.average
        step = self.step(images, checkpointing)
        return Need(images, checkpointing, self.weights, self.moments, self.average, copies, step)

    def step(self, images: int, checkpointing: bool) -> int:
        """Bytes of gradients and activations at the most."""
        if checkpointing not in self.kept:
            with suppress(Exception):  # whatever cannot be done without numbers
                if (images, checkpointing) not in self.known:
                    self.known[images, checkpointing] = self._simulated(images, checkpointing)
                return self.known[images, checkpointing]
            self.kept[checkpointing] = self._measured(checkpointing)
        return self.gradients + images * self.kept[checkpointing]

    def surely(self, images: int, free: int) -> bool:
        """Whether a small network fits so easily into `free` bytes that nothing has to be foreseen."""
        rows, columns = self.objective.network.architecture.backbone.image_size
        if count_parameters(self.objective) * rows * columns > QUICK:
            return False
        kept = 2 * images * self._measured(self.settings.checkpointing)
        return 2 * (self.weights + self.moments + self.average) + self.gradients + kept <= free / 2

    def _simulated(self, images: int, checkpointing: bool) -> int:
        from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode  # long to import

        class Shapes(FakeTensorMode):
            """Tensors without numbers, but for small ones that depend on none of them: those may decide something."""

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                given = tree_leaves((args, kwargs or {}))
                tensors = [part for part in given if isinstance(part, Tensor)]
                small = math.prod(part for part in given if type(part) is int and part > 0) <= SMALL
                if not any(isinstance(part, FakeTensor) for part in tensors) and (tensors or small):
                    return func(*args, **(kwargs or {}))
                return super().__torch_dispatch__(func, types, args, kwargs)

        shapes = Shapes(allow_non_fake_inputs=True)
        with FakeCopyMode(shapes):
            objective = copy.deepcopy(self.objective).train()
        recompute(objective, checkpointing)
        device = next(objective.parameters()).device
        batch = self.noise(images)
        with shapes:
            views = tuple(map(shapes.from_tensor, batch.views))
            batch = batch._replace(pixels=shapes.from_tensor(batch.pixels), views=views)
            with _Holding(objective) as holding:
                enabled = self.precision != torch.float32
                with torch.autocast(device.type, self.precision if enabled else None, enabled=enabled):
                    loss = objective(batch).loss
                loss.backward()
        return holding.most

    def _measured(self, checkpointing: bool) -> int:
        """Bytes that a forward pass keeps for the backward pass, for each image."""
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        objective = copy.deepcopy(self.objective).train()
        recompute(objective, checkpointing)
        device = next(objective.parameters()).device
        with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = objective(self.noise(2).to(device)).loss
        del loss
        return sum(kept.values()) // 2


class _Holding(TorchDispatchMode):
    """Counts the bytes of all that lives at a time, but for the parameters: `most` is the largest sum."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.now = self.most = 0
        self.seen: dict[int, Any] = {}
        for tensor in (*objective.parameters(), *objective.buffers()):
            storage = tensor.untyped_storage()
            self.seen[id(storage)] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return made

    def _hold(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return

        def gone(_: Any) -> None:
            self.seen.pop(key, None)
            self.now -= size

        self.seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


@dataclass(frozen=True)
class MemoryPlan:
    """How a run stays within its memory: images at a time (None: all of a batch), recomputation, and why in words."""

    micro_batch: int | None
    checkpointing: bool
    words: str = ""


def plan_memory(forecast: Forecast, images: int, free: int) -> MemoryPlan:
    """The plan for batches of `images` where `free` bytes may be taken besides the weights.

    All images at a time where they fit; else as many pairs as fit; and where not even one pair does, the same with
    activations that are computed twice instead of kept. Where the objective compares images, all at a time come first
    with these, too. What the settings say of either stays.
    """
    settings = forecast.settings
    if settings.memory is None and forecast.surely(min(settings.micro_batch or images, images), free):
        return MemoryPlan(settings.micro_batch, settings.checkpointing)
    start = min(settings.micro_batch or images, images)
    whole = forecast.need(start, settings.checkpointing)
    told = f"memory: about {whole}, of {(free + whole.weights) / GB:.2g} GB that may be taken"
    if whole.further <= free:
        return MemoryPlan(settings.micro_batch, settings.checkpointing, told if settings.memory else "")
    ways = [(again, False) for again in ([True] if settings.checkpointing else [False, True])]
    if forecast.compares and not settings.checkpointing:
        ways.insert(0, (True, True))
    for again, whole_batch in ways:
        fitting = start if settings.micro_batch or whole_batch else _fitting(forecast, start, free, again)
        need = forecast.need(max(fitting, min(2, start)), again)
        if fitting and need.further <= free:
            break
    parts = settings.micro_batch or (None if need.images == images else need.images)
    words = f"memory: {start} images at a time would take {(whole.weights + whole.further) / GB:.2g} GB, and "
    words += f"{(free + whole.weights) / GB:.2g} may be taken; so "
    words += f"{need.images} go at a time" if need.images < start else "they stay together"
    if need.images < start and forecast.compares:
        words += " (compared with no others)"
    if again and not settings.checkpointing:
        words += " and activations are computed twice instead of kept, which takes about a third longer"
    words += f": about {need}"
    if need.further > free:
        words += ", which is still more: take smaller images (--image-size) or a smaller model (--model)"
    return MemoryPlan(parts, again, words)


def within_memory(recipe: Recipe, objective: Objective, noise: Noise, world: World) -> tuple[Recipe, str]:
    """The recipe with as many images at a time as memory bears, and what there is to say of it."""
    settings = recipe.settings
    forecast = Forecast(objective, settings, noise, pick_precision(settings.precision, world.device))
    free = may_be_taken(settings, world.device, world.size)
    if world.device.type == "cuda":  # where the weights are still to come
        free -= forecast.weights
    plan = world.agree(plan_memory(forecast, settings.batch_size // world.size, free))
    if plan.checkpointing or settings.memory:
        give_back_at_once()  # measurements that follow are the first to need it
    return recipe.told({"micro_batch": plan.micro_batch, "checkpointing": plan.checkpointing}, {}), plan.words


def _fitting(forecast: Forecast, most: int, free: int, checkpointing: bool) -> int:
    """How many images fit at a time, in pairs, of `most`; 0 where not even two do."""
    if most <= 2:
        return most if forecast.need(most, checkpointing).further <= free else 0
    two = forecast.need(2, checkpointing).further
    if two > free:
        return 0
    each = (forecast.need(most, checkpointing).further - two) / (most - 2)
    images = min(2 + int((free - two) // max(each, 1)) // 2 * 2, most // 2 * 2)
    while images > 2 and forecast.need(images, checkpointing).further > free:
        images -= 2
    return images


def may_be_taken(settings: Settings, device: torch.device, processes: int = 1) -> int:
    """Bytes that each of the processes of a run on this machine may still take."""
    sharing = processes if device.type != "cuda" else 1
    if settings.memory is not None:
        return max(int(settings.memory * GB / sharing) - held(device), 0)
    return int(SHARE * available_memory(device)) // sharing


def held(device: torch.device) -> int:
    """Bytes that this process holds already; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def available_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can still be had: of the device, or of this machine and the control group of this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(min([free, *_group_limits(root)]), 0)


def _group_limits(root: Path) -> list[int]:
    """Bytes left in each control group (version 2, or 1) around this process that has a limit."""
    try:
        rows = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for number, controllers, own in (row for row in rows if len(row) == 3):
        if number == "0":
            base, limit, usage, cached = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, cached = root / "sys/fs/cgroup/memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inside = base / own.lstrip("/")
        for group in (inside, *inside.parents):
            if group.is_relative_to(base):
                with suppress(OSError, ValueError):  # "max" is no number: no limit
                    most, now = (int((group / name).read_text()) for name in (limit, usage))
                    found.append(most - now + _cached(group, cached))
    return found


def _cached(group: Path, name: str) -> int:
    """Bytes of files that the system keeps at hand and gives back when asked."""
    with suppress(OSError, ValueError):
        rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(rows.get(name, 0))
    return 0
