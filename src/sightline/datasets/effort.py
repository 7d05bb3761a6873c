"""What reading images costs, and what it waits for: the cause where a network has to wait for its images."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Effort:
    """Seconds of the threads that read `batches`: in all, `busy` on a core, and `queued` for a core that others held.

    The rest went into waiting for a disk or a network. `queued` is 0 where the system does not tell.
    """

    batches: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    queued: float = 0.0

    def add(self, other: "Effort") -> None:
        """Takes in what others did."""
        self.batches += other.batches
        self.seconds += other.seconds
        self.busy += other.busy
        self.queued += other.queued

    @property
    def idle(self) -> float:
        """Seconds in which a thread neither computed nor could have."""
        return max(self.seconds - self.busy - self.queued, 0.0)


def measured(make: Callable[[], Any]) -> tuple[Any, Effort]:
    """What `make` makes in this thread, and what that took."""
    began, busy, queued = time.perf_counter(), time.thread_time(), _queued()
    made = make()
    return made, Effort(1, time.perf_counter() - began, time.thread_time() - busy, _queued() - queued)


def _queued() -> float:
    """Seconds that this thread has been ready to go on and had no core; 0 where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    return 0.0
