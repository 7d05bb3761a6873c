"""Leaving cleanly when asked to."""

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """A signal asked the run to end; everything up to the last step is saved. `status` is the exit status."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; everything so far is saved")
        self.status = 128 + number


@dataclass
class Request:
    """The signal that has asked the run to end, 0 for none."""

    number: int = 0


@contextmanager
def listening() -> Generator[Request]:
    """Turns SIGTERM and SIGINT into a request that the loop reads between steps; a second one ends the process."""
    request = Request()

    def note(number: int, _frame: object) -> None:
        if request.number:
            os._exit(128 + number)
        request.number = number

    watched = (signal.SIGTERM, signal.SIGINT)
    try:
        before = {number: signal.signal(number, note) for number in watched}
    except ValueError:  # not the main thread: whoever runs it there has its own way to stop
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
