"""What the proof with hostile inputs works on: the inputs, a place for its runs, and what was met."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confined import Said, run  # the program beside this one

from sightline.cli.main import main
from sightline.errors import printable

NEVER = ("Traceback", "This was not foreseen", "weights_only=False", "AttributeError", "KeyError")
"""What no message may say."""


@dataclass
class Bench:
    """The inputs, a place to work in, and what was met by family and entry point."""

    kit: Path
    place: Path
    items: list[dict[str, Any]]
    met: Counter[tuple[str, str]] = field(default_factory=Counter)
    total: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: dict[tuple[str, str], tuple[float, float]] = field(default_factory=lambda: defaultdict(lambda: (0.0, 0.0)))
    runs: int = 0

    def of(self, family: str) -> list[dict[str, Any]]:
        return [item for item in self.items if item["family"] == family]

    def go(self, work: Callable[[], object], *, measure: bool = False, fresh: bool = True) -> Said:
        self.runs += fresh
        return run(self.place / f"run{self.runs}", self.kit, work, measure=measure)

    def command(self, *words: object, measure: bool = False) -> Said:
        return self.go(lambda: main([str(word) for word in words]), measure=measure)

    def judge(self, item: dict[str, Any], entry: str, problems: list[str]) -> None:
        key = item["family"], entry
        self.total[key] += 1
        self.met[key] += not problems
        self.failures += [f"{item['path']} through {entry} ({item['expect']}): {problem}" for problem in problems]

    def cost(self, item: dict[str, Any], entry: str, seconds: float, megabytes: float) -> list[str]:
        """Complaints about what an item cost."""
        key = item["family"], entry
        worst = self.slowest[key]
        self.slowest[key] = max(worst[0], seconds), max(worst[1], megabytes)
        slow = [f"took {seconds:.2f} s of {item['max_s']}"] if seconds > item["max_s"] else []
        return slow + ([f"took {megabytes:.0f} MB of {item['max_mb']}"] if megabytes > item["max_mb"] else [])


def manners(said: Said) -> list[str]:
    """Complaints about what no run may do."""
    words = [f"says '{word}': {said.err.strip()[-200:]}" for word in NEVER if word in said.text]
    if said.status not in (0, 1, 2):
        words.append(f"ended with {said.status}: {said.err.strip()[-200:]}")
    return words + said.odd


def shown(name: str) -> str:
    return printable(name, 10_000)
