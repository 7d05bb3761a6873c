"""What the machine can do at best: the products of matrices and the copies that a network is made of."""

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from sightline.benching.rounds import by_clock
from sightline.device import described_processor
from sightline.inference.packed import PackedLinear, packs
from sightline.inference.quantised import Grid, QuantisedLinear

SHAPES = ((1576, 768, 3072), (1576, 3072, 768), (2048, 2048, 2048))
"""Rows, inner length and columns of the products: those of ViT-B/16's MLP for eight images, and a square."""

LARGE = ((64 * 197, 1024, 4096), (64 * 197, 4096, 1024), (8192, 8192, 8192))
"""The same for devices that small products do not fill: ViT-L/16's MLP for 64 images, and a square."""

COPIED = 2**26
"""Bytes of a copy: more than the caches hold."""

_TRIES, _PATIENCE = 7, 1.0


class Machine(NamedTuple):
    """Where it was measured.

    `products` are the most multiplications and additions a second in each precision, in 1e9; `copies` is 1e9 bytes a
    second, each counted once as read and once as written.
    """

    processor: str
    threads: int
    torch: str
    device: str
    products: dict[str, float]
    copies: float


def machine(device: torch.device, precisions: dict[str, torch.dtype]) -> Machine:
    """Measures the machine in a few seconds."""
    return Machine(
        torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        torch.get_num_threads(),
        torch.__version__,
        str(device),
        {
            name: max(_products(device, dtype, shape) for shape in (LARGE if device.type == "cuda" else SHAPES))
            for name, dtype in precisions.items()
        },
        _copies(device),
    )


def settled(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timer_of(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """What times a piece of work: the clock, or on CUDA devices the device itself, between two of its events."""

    def by_events(work: Callable[[], object]) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3

    return by_events if device.type == "cuda" else by_clock


def _products(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    rows, inner, columns = shape
    if dtype == torch.int8:
        eight = QuantisedLinear(PackedLinear(torch.nn.Linear(inner, columns), torch.bfloat16), Grid(0.0, 1.0))
        best = _best(partial(eight, torch.randint(256, (rows, inner), dtype=torch.uint8)), device)
    else:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(columns, inner, device=device).to(dtype)
        best = _best(lambda: torch.nn.functional.linear(a, b), device)
        if device.type == "cpu" and packs(dtype):  # the processor may read weights faster in an order of its own
            layer = torch.nn.Linear(inner, columns, bias=False)
            best = min(best, _best(partial(PackedLinear(layer, dtype), a), device))
    return 2 * rows * inner * columns / best / 1e9


def _copies(device: torch.device) -> float:
    here = torch.zeros(COPIED // 4, device=device)
    there = torch.empty_like(here)
    return 2 * COPIED / _best(lambda: there.copy_(here), device) / 1e9


@torch.no_grad()
def _best(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a few; the first does not count."""
    timer = timer_of(device)
    timer(work)
    found, began = [], time.perf_counter()
    while len(found) < _TRIES and (len(found) < 2 or time.perf_counter() - began < _PATIENCE):
        found.append(timer(work))
    return min(found)


def _processor() -> str:
    named = [line.partition(":")[2].strip() for line in described_processor() if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()}, {os.cpu_count()} cores"
