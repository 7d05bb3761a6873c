"""Contenders take turns, so that whatever else the machine does disturbs them alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

REST = 0.02
"""Seconds before each turn: threads of other runtimes spin for a while, on the cores of who comes next."""


class Contender(NamedTuple):
    """Something that does the same piece of work whenever it is called, and waits until it is done."""

    name: str
    work: Callable[[], object]


class Ratio(NamedTuple):
    """How many times as long one takes as another in the same round: median of all rounds, the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Ratio":
        """Of the ratios of the rounds."""
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


class Timed(NamedTuple):
    """The seconds of one contender, round by round."""

    name: str
    seconds: Sequence[float]

    @property
    def median(self) -> float:
        """The median of all rounds."""
        return statistics.median(self.seconds)

    def over(self, other: "Timed") -> Ratio:
        """How many times as long it takes as another one that took turns with it."""
        return Ratio.of([mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)])


def by_clock(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a piece of work that waits until it is done."""
    began = clock()
    work()
    return clock() - began


def take_turns(
    contenders: Sequence[Contender], rounds: int, timer: Callable[[Callable[[], object]], float] = by_clock
) -> list[Timed]:
    """The seconds of every contender, each called once in every round, after a call that does not count.

    Another one begins each round, so that none always follows the same one. `timer` does a piece of work and tells its
    seconds.
    """
    for contender in contenders:
        contender.work()
    seconds: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds):
        for place in range(len(contenders)):
            who = (number + place) % len(contenders)
            time.sleep(REST)
            seconds[who].append(timer(contenders[who].work))
    return [Timed(contender.name, own) for contender, own in zip(contenders, seconds, strict=True)]


def growth(across: Sequence[float], up: Sequence[float]) -> float:
    """The exponent k of up = c · across^k that fits best where both are logarithms; at least two points."""
    import numpy as np

    return float(np.polyfit(np.log(across), np.log(up), 1)[0])


def as_json(value: Any) -> Any:
    """Named tuples as objects, all the way down."""
    if hasattr(value, "_asdict"):
        return {name: as_json(part) for name, part in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    return value
