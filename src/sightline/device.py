"""Where a network computes, and with how many bits."""

import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sightline.errors import UserError, printable

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
INT8: Final = "int8"
"""What some verbs offer besides, for it needs images to be calibrated on."""


def devices() -> list[str]:
    """The names of the devices of this machine, the fastest kind first."""
    import torch

    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def pick_device(name: str = "auto") -> "torch.device":
    """The device called `name`: auto (the first of `devices()`), cpu, cuda, cuda:N or mps.

    Raises UserError for a device that this machine does not have.
    """
    import torch

    here = devices()
    chosen = {"auto": here[0], "cuda": "cuda:0"}.get(name, name)
    if chosen not in here:
        raise UserError(f"there is no device '{printable(name)}' here; there is {', '.join(here)} (or auto)")
    return torch.device(chosen)


def pick_precision(name: str, device: "torch.device") -> "torch.dtype":
    """The number type of matrix products on `device`: auto, fp32, bf16 or fp16.

    Auto is fp32, except on CUDA devices that compute in bf16 themselves: float32's range at twice the speed or more,
    with probabilities that differ in the third digit. Raises UserError for another name, for bf16 on a CUDA device
    without it, and for int8, which is calibrated first (`inference.choose`).
    """
    import torch

    if name == INT8:
        raise UserError(
            "8 bits are calibrated on your own images first: sightline predict --precision int8, or "
            'sightline.inference.choose.choose(predictor, images, precision="int8")'
        )
    if name not in PRECISIONS:
        raise UserError(f"there is no precision '{printable(name)}': choose {', '.join(PRECISIONS)}")
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and not native:
        raise UserError(f"device {device} does not compute in bf16: choose fp16 or fp32")
    if name == "auto":
        name = "bf16" if device.type == "cuda" and native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@contextmanager
def computing_with(threads: int | None) -> Generator[None]:
    """Lets what is computed inside take so many threads of the processor; None leaves their number as it is."""
    import torch

    before = torch.get_num_threads()
    if threads and threads != before:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def described_processor() -> list[str]:
    """What the system says of the processor: its name and what it can do, a line each."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})


def out_of_memory(fault: BaseException) -> bool:
    """Whether a failed computation may succeed with less at a time: PyTorch says so in several ways."""
    import torch

    words = ("out of memory", "not enough memory", "allocate memory", "bad_alloc", "could not create a primitive")
    told = isinstance(fault, RuntimeError) and any(word in str(fault).lower() for word in words)
    return told or isinstance(fault, (MemoryError, torch.OutOfMemoryError))


def give_back_at_once() -> None:
    """Lets the C library return every block of a megabyte or more when it is freed, for runs that are short of memory.

    glibc keeps what was freed for the next request, in pieces that often do not fit it: up to several times of what a
    step with recomputation holds. Elsewhere nothing happens.
    """
    _thresholds(2**20, 2**17)


def keep_for_next() -> None:
    """Lets the C library keep what is freed for the next tensor, for long computations on the processor.

    glibc gives back what lies free at the end of its heap, and blocks that are larger than any so far, so that a
    network asks for the same memory in every layer: 50,000 pages, which the system has to find and empty, in a pass of
    eight images through ViT-B/16, a sixth of the time. Elsewhere nothing happens. It holds for the whole process.
    """
    _thresholds(2**25, 2**31 - 1)


def _thresholds(apart: int, end: int) -> None:
    """Sets from which size on blocks are asked of the system alone, and how much may lie free at the end of the heap.

    Only glibc has these thresholds.
    """
    import ctypes
    from contextlib import suppress

    with suppress(OSError, AttributeError):
        for option, number in ((-3, apart), (-1, end)):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, of its malloc.h
            ctypes.CDLL(None).mallopt(option, number)


def free_memory(device: "torch.device") -> None:
    """Gives back what a failed computation held."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
