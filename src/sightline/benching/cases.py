"""What is measured: a network alone, an update of its weights, and what larger images cost.

A case is a row of `CASES`: from a `Plan` and the machine to `Table`s.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.benching.ceilings import Machine, settled
from sightline.benching.peers import PEERS
from sightline.benching.rounds import Contender, Ratio, Timed, growth, take_turns
from sightline.device import out_of_memory
from sightline.images.preprocess import Preprocess
from sightline.inference.predictor import Predictor, Ready
from sightline.model import Model
from sightline.network import Architecture, Network, count_macs, count_parameters, create_model, describe
from sightline.objectives.supervised import Supervised
from sightline.training.distributed import World
from sightline.training.settings import Settings
from sightline.training.update import Updater
from sightline.types import Batch

OURS = "sightline"
CLASSES = 1000
STEPWISE = 2
"""A step back from scores is about as much work as two forward."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured. `sides` are pixels along the side of the squares of the cost curve."""

    model: str
    device: torch.device
    peers: Sequence[str] = ()
    precisions: Sequence[str] = ("fp32",)
    batch_sizes: Sequence[int] = (1, 8)
    sides: Sequence[int] = (224, 320, 448, 640, 896, 1024)
    rounds: int = 5
    compiled: bool = False


class Row(NamedTuple):
    """One contender: seconds for each image, images a second, the share of the peak, and the time over Sightline's."""

    name: str
    seconds: float
    images_per_second: float
    share_of_peak: float
    ratio: Ratio
    parameters: int


class Point(NamedTuple):
    """One size of the cost curve; `megabytes` are those above the network's own, None where it cannot be told."""

    side: int
    tokens: int
    seconds: float
    megabytes: float | None


@dataclass(frozen=True)
class Table:
    """The figures of one case; `points` and `exponents` (of time and memory over the side) are a cost curve's."""

    case: str
    title: str
    batch: int
    precision: str
    rows: Sequence[Row] = ()
    points: Sequence[Point] = ()
    exponents: dict[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


def forward(plan: Plan, machine: Machine) -> Iterator[Table]:
    """Prepared pixels to logits, as `predict` computes long jobs, beside the same network of others."""
    architecture = describe(plan.model, CLASSES)
    flops = 2 * count_macs(architecture)
    model = _model(create_model(plan.model, CLASSES))
    for precision in plan.precisions:
        others, notes = _others(plan, architecture, DTYPES[precision])
        predictor = model.predictor(
            device=str(plan.device), precision=precision, batch_size=max(plan.batch_sizes), pack=True
        )
        images = _noise(predictor, max(plan.batch_sizes))
        for batch in plan.batch_sizes:
            own = images[:batch]
            given = torch.stack([image.pixels for image in own]).to(plan.device, DTYPES[precision])
            contenders = [Contender(OURS, partial(predictor.compute, own, features=False))]
            contenders += [Contender(name, _passing(other, given)) for name, other in others.items()]
            timed = take_turns(contenders, plan.rounds)
            sizes = [count_parameters(model.network), *map(count_parameters, others.values())]
            title = f"forward, {plan.model}, batches of {batch}, {precision}"
            rows = _rows(timed, sizes, batch, flops, machine.products[precision])
            yield Table("forward", title, batch, precision, rows, notes=notes)
        del others
        gc.collect()


def training(plan: Plan, machine: Machine) -> Iterator[Table]:
    """One update of the weights: forward, backward, a clipped gradient, AdamW; beside a plain loop around others."""
    architecture, batch = describe(plan.model, CLASSES), max(plan.batch_sizes)
    flops = (1 + STEPWISE) * 2 * count_macs(architecture)
    for precision in plan.precisions:
        network = create_model(plan.model, CLASSES).to(plan.device)
        settings = Settings(batch_size=batch, optimizer="adamw", lr=1e-4, micro_batch=batch)
        updater = Updater(Supervised(network).train(), settings, World(0, 1, plan.device), DTYPES[precision])
        index = torch.arange(batch)
        pixels = torch.randn(batch, 3, *architecture.backbone.image_size)
        given = Batch(pixels, index % CLASSES, index, index)
        others, notes = _others(plan, architecture, torch.float32)
        contenders = [Contender(OURS, _waiting(partial(updater, given, 0, 1e-4), plan))]
        contenders += [
            Contender(name, _waiting(_Loop(other, given, plan.device, DTYPES[precision]), plan))
            for name, other in others.items()
        ]
        timed = take_turns(contenders, plan.rounds)
        sizes = [count_parameters(network), *map(count_parameters, others.values())]
        title = f"training, {plan.model}, batches of {batch}, {precision}"
        rows = _rows(timed, sizes, batch, flops, machine.products[precision])
        yield Table("training", title, batch, precision, rows, notes=notes)
        del network, updater, others, contenders
        gc.collect()


def resolution(plan: Plan, machine: Machine) -> Iterator[Table]:
    """Time and memory of one image, from small to large, in the first of the precisions."""
    precision = plan.precisions[0]
    points: list[Point] = []
    notes: list[str] = []
    for side in (*plan.sides[:1], *plan.sides):  # what all have in common is made for the first, which does not count
        network = create_model(plan.model, CLASSES, image_size=side).to(plan.device).eval()
        predictor = _model(network).predictor(device=str(plan.device), precision=precision)
        work = partial(predictor.compute, _noise(predictor, 1), features=False)
        memory = _Memory(plan.device)
        try:
            timed = take_turns([Contender(OURS, work)], plan.rounds)
        except (RuntimeError, MemoryError) as fault:
            if not out_of_memory(fault):
                raise
            notes.append(f"memory does not suffice for {side}×{side}")
            break
        rows, columns = network.backbone.grid_of((side, side))
        points.append(Point(side, rows * columns, timed[0].median, memory.most()))
        del network, predictor
        gc.collect()
    points = points[1:]
    exponents = {}
    if len(points) > 1:
        sides = [point.side for point in points]
        exponents["seconds"] = growth(sides, [point.seconds for point in points])
        megabytes = [point.megabytes or 0.0 for point in points]
        if min(megabytes) > 0:
            exponents["megabytes"] = growth(sides, megabytes)
    yield Table(
        "resolution", f"resolution, {plan.model}, one image, {precision}", 1, precision, (), points, exponents, notes
    )


CASES = {"forward": forward, "training": training, "resolution": resolution}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Loop:
    """What people write: autocast where asked for, cross-entropy, backward, clip, fused AdamW."""

    def __init__(self, network: nn.Module, batch: Batch, device: torch.device, precision: torch.dtype):
        self.network, self.device, self.precision = network.train(), device, precision
        self.pixels, self.targets = batch.pixels.to(device), batch.targets.to(device)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            loss = F.cross_entropy(self.network(self.pixels), self.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # which a loop prints


class _Memory:
    """Megabytes above those at the beginning."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / 1e6
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it has to be asked for again
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            except OSError:
                self.before = None
            else:
                self.before = _resident("VmRSS")

    def most(self) -> float | None:
        if self.before is None:
            return None
        now = torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else _resident("VmHWM")
        return None if now is None else now - self.before


def _resident(key: str) -> float | None:
    try:
        rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
        return int(rows[key].split()[0]) / 1e3
    except (OSError, KeyError):
        return None


def _model(network: Network) -> Model:
    size = network.backbone.config.image_size
    return Model(network.eval(), Preprocess(size=size), [str(i) for i in range(CLASSES)])


def _noise(predictor: Predictor, count: int) -> list[Ready]:
    """Images without meaning, as the network reads them."""
    pictures = np.random.default_rng(0).integers(0, 256, (count, *predictor.preprocess.size, 3), dtype=np.uint8)
    prepared = [predictor.prepare(picture) for picture in pictures]
    return [one for one in prepared if isinstance(one, Ready)]


def _others(plan: Plan, architecture: Architecture, dtype: torch.dtype) -> tuple[dict[str, nn.Module], list[str]]:
    """The network of each peer that has it, and a remark for each that has not."""
    found: dict[str, nn.Module] = {}
    notes = []
    for name in plan.peers:
        peer = PEERS[name]
        network = peer.network(architecture, CLASSES)
        if network is None:
            notes.append(f"{name} {peer.version} has no {architecture.name}")
            continue
        found[name] = network.to(plan.device, dtype).eval()
        if plan.compiled:
            twin = peer.network(architecture, CLASSES)
            assert twin is not None
            twin.compile()
            found[f"{name}, compiled"] = twin.to(plan.device, dtype).eval()
    return found, notes


def _passing(network: nn.Module, pixels: Tensor) -> Callable[[], None]:
    def work() -> None:
        with torch.inference_mode():
            network(pixels).float().cpu()

    return work


def _waiting(work: Callable[[], object], plan: Plan) -> Callable[[], None]:
    def done() -> None:
        work()
        settled(plan.device)

    return done


def _rows(timed: Sequence[Timed], sizes: Sequence[int], batch: int, flops: float, peak: float) -> list[Row]:
    ours = timed[0]
    return [
        Row(
            one.name,
            one.median / batch,
            batch / one.median,
            flops * batch / one.median / (peak * 1e9),
            one.over(ours),
            size,
        )
        for one, size in zip(timed, sizes, strict=True)
    ]
