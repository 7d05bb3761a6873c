"""Leaving cleanly when asked to."""

import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread

_WATCHED = (signal.SIGTERM, signal.SIGINT)
_DONE = 0

ECHO = 0.1
"""Seconds in which a second signal is the first one once more: some senders address a process and then its group."""


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """A signal asked the run to end; everything up to the last step is saved. `status` is the exit status."""

    def __init__(self, number: int, step: int | None = None):
        when = "" if step is None else f" after step {step}"
        super().__init__(f"stopped by {signal.Signals(number).name}{when}; everything so far is saved")
        self.status = 128 + number


@dataclass
class Request:
    """The signal that has asked the run to end, 0 for none."""

    number: int = 0


@contextmanager
def listening() -> Generator[Request]:
    """Turns SIGTERM and SIGINT into a request that the loop reads between steps; a second one ends the process.

    The first is noted by a handler, which Python runs when the operation at work is done. The second must not wait
    for that: a thread learns of it from the file descriptor that every signal is written to at once.
    """
    request = Request()

    def note(number: int, _frame: object) -> None:
        request.number = request.number or number

    try:
        before = {number: signal.signal(number, note) for number in _WATCHED}
    except ValueError:  # not the main thread: whoever runs it there has its own way to stop
        yield request
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    awoken = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    watcher = Thread(target=_leave_at_second, args=(heard,), name="signals", daemon=True)
    watcher.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(awoken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(told, bytes([_DONE]))  # closing it would not do: forked processes hold it too
        watcher.join()
        os.close(told)
        os.close(heard)


def _leave_at_second(heard: int) -> None:
    first = None
    while True:
        for number in os.read(heard, 64):
            if number == _DONE:
                return
            if number in _WATCHED:
                first = first or time.monotonic()
                if time.monotonic() - first > ECHO:
                    os._exit(128 + number)


@contextmanager
def breaking_off() -> Generator[None]:
    """Says of a signal outside the loop, where nothing is lost by stopping at once, what it says inside.

    There SIGTERM and SIGINT raise KeyboardInterrupt; what was not finished is made anew when the run goes on.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(stop.args[0] if stop.args else signal.SIGINT) from None
