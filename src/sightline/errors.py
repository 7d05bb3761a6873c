"""Faults of the user's input, told apart from faults of this program.

A `UserError` is raised where a request, a file or a setting is at fault; the command line prints its message without a
traceback and leaves with status 2. A `WorkError` means that the work was tried and failed (status 1). Anything else
that escapes is a defect of Sightline: its name is printed, and with `--debug` its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The request or the input is at fault: the message says what, where, and how to mend it."""

    status = 2


class WorkError(RuntimeError):
    """The work was tried and failed: the message says what was kept and how to go on."""

    status = 1


def printable(text: object, limit: int = 200) -> str:
    """A name from outside, safe to print: control characters escaped, surrogates replaced, at most `limit` long."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text))
    return escaped if len(escaped) <= limit else f"{escaped[: limit - 1]}…"


def suggest(word: str, known: Iterable[str]) -> str:
    """A ' Did you mean …?' for an unknown name, or an empty string where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""
