"""Contenders in processes: each package has one of its own, as its users have; what one keeps serves no other."""

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any, NamedTuple, Self

from sightline.benching.rounds import Contender, Timed, take_turns
from sightline.benching.tables import OURS
from sightline.errors import UserError, WorkError, printable
from sightline.processes import leave_ctrl_c, signals_wait


class Side(NamedTuple):
    """A contender: whose it is, and what makes it, in the process of that package.

    What is made has `parameters`, their number, is called to work, and is closed in the end where it has `close`.
    """

    name: str
    package: str
    make: Callable[[], Any]


class Processes:
    """A process for each package, started when it is first asked; all end with the `with` block."""

    def __init__(self) -> None:
        self.started: dict[str, _Apart] = {}
        self.held = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: Any) -> None:
        self.held.__exit__(*about)

    def ask(self, side: Side, use: Callable[..., Any], *given: Any) -> Any:
        """`use(made, *given)` as computed there; `made` is made once. Raises WorkError where the process has died."""
        if side.package not in self.started:
            self.started[side.package] = self.held.enter_context(_Apart())
        return self.started[side.package](side, use, *given)

    def present(self, sides: Sequence[Side]) -> tuple[list[tuple[Side, int]], list[str]]:
        """Those that could be made, with the numbers of their parameters; and why each other package is left out.

        Raises UserError where that is Sightline.
        """
        found, notes = list[tuple[Side, int]](), list[str]()
        for side in sides:
            try:
                found.append((side, self.ask(side, attrgetter("parameters"))))
            except UserError as fault:
                if side.package == OURS:
                    raise
                notes.append(f"{side.package} is left out: {printable(fault, 300)}")
        return found, list(dict.fromkeys(notes))

    def in_turns(self, sides: Sequence[Side], rounds: int, use: Callable[..., float], *given: Any) -> list[Timed]:
        """The seconds that `use` tells of each, taken in turns."""
        contenders = [Contender(side.name, partial(self.ask, side, use, *given)) for side in sides]
        return take_turns(contenders, rounds, _told)


class _Apart:
    """One such process, and the line to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=_answer, args=(theirs,))
        with theirs, signals_wait():
            self.process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *fault: object) -> None:
        self.line.close()  # which ends it, unless it is at work
        if kind is not None:
            self.process.terminate()
        self.process.join()

    def __call__(self, side: Side, use: Callable[..., Any], *given: Any) -> Any:
        try:
            self.line.send((side, use, given))
            found = self.line.recv()
        except (EOFError, OSError) as fault:
            raise WorkError(f"{side.name} ended before it had answered; what it said stands above") from fault
        if isinstance(found, Exception):
            raise found
        return found


def _answer(line: Connection) -> None:
    """The life of such a process: makes each contender once, and uses it until nobody asks."""
    leave_ctrl_c()
    made: dict[str, Any] = {}
    with ExitStack() as last:
        while True:
            try:
                side, use, given = line.recv()
            except EOFError:
                return
            try:
                if side.name not in made:
                    made[side.name] = side.make()
                    if (close := getattr(made[side.name], "close", None)) is not None:
                        last.callback(close)
                line.send(use(made[side.name], *given))
            except (UserError, WorkError) as fault:
                line.send(fault)


def _told(work: Callable[[], Any]) -> float:
    return work()
