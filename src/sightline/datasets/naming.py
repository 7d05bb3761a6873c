"""Names of classes and files: their order for people, and which of them a file system could confuse."""

import re
import unicodedata
from collections.abc import Iterable

from sightline.errors import UserError, printable

_NUMBER = re.compile("([0-9]+)")


def natural(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """A sort key that reads numbers as numbers and passes over case: '2' before '10', 'a' before 'B'.

    Two different names never share a key, so that the order depends on nothing but the names.
    """
    parts: list[str | tuple[int, str]] = list(_NUMBER.split(unicodedata.normalize("NFC", name).casefold()))
    for i in range(1, len(parts), 2):  # text and numbers take turns, so that like is compared with like
        digits = str(parts[i]).lstrip("0")
        parts[i] = (len(digits), digits)  # orders as the number itself does, without a limit on its length
    return parts, name


def class_names(found: Iterable[str], where: str) -> dict[str, str]:
    """Each class name as found, in natural order, with the name that the class gets (Unicode's composed form, NFC).

    Raises UserError for names that differ only in case or in the coding of accents, and for those that are not text.
    """
    names: dict[str, str] = {}
    folded: dict[str, str] = {}
    for name in sorted(set(found), key=natural):
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise UserError(f"{where}: the class name '{printable(name)}' is not valid UTF-8; rename it")
        names[name] = unicodedata.normalize("NFC", name)
        other = folded.setdefault(unicodedata.normalize("NFC", names[name].casefold()), name)
        if other != name:
            alike = "upper and lower case" if names[name] != names[other] else "the coding of accents"
            pair = f"'{printable(ascii(other)[1:-1])}' and '{printable(ascii(name)[1:-1])}'"
            raise UserError(f"{where}: the classes {pair} differ only in {alike}; merge or rename them")
    return names


def some(names: Iterable[str], most: int = 5) -> str:
    """A few names for a message, and how many more there are."""
    listed = [f"'{printable(name)}'" for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
