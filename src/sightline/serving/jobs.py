"""What is asked of a model, and what comes of it."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_NUMBERS = itertools.count(1)


class Reply(NamedTuple):
    """An answer ready to be sent: an HTTP status and a body."""

    status: int
    body: bytes


@dataclass(eq=False)
class Job:
    """One request to one model. `header` says what is asked, `parts` are the encoded images."""

    header: dict[str, Any]
    parts: Sequence[bytes]
    future: asyncio.Future[Reply]
    id: int = field(default_factory=lambda: next(_NUMBERS))
    sent: float = 0.0

    @property
    def kind(self) -> str:
        """What is asked: `predict` or `explain`."""
        return self.header["kind"]

    @property
    def images(self) -> int:
        """The number of its images."""
        return len(self.parts)
