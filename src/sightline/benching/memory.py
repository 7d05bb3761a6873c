"""The most memory that a piece of work holds at a time."""

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


class Memory:
    """Megabytes above those that were held when this was made."""

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
        """The most so far; None where the system does not tell."""
        if self.before is None:
            return None
        now = torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else _resident("VmHWM")
        return None if now is None else now - self.before


def most_of(work: Callable[[], object], device: torch.device) -> float | None:
    """Megabytes that a piece of work holds at most, beyond what lay there before; it is done once."""
    gc.collect()
    memory = Memory(device)
    work()
    return memory.most()


def _resident(key: str) -> float | None:
    try:
        rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
        return int(rows[key].split()[0]) / 1e3
    except (OSError, KeyError):
        return None
