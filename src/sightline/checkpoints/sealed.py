"""JSON that notices its own damage: it begins with the SHA-256 of every byte that follows.

The hash is over bytes, not over what they mean, so that no change at all passes: not even one that JSON calls equal.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sightline.errors import UserError, printable

SEAL = "seal"
"""The name of the first entry."""

_HEAD = f'{{"{SEAL}": "'.encode()
_DIGITS = 64


def sealed(document: Mapping[str, Any], indent: int | None = None) -> bytes:
    """The document as UTF-8 JSON under a first entry `seal`; `read_json` reads it and refuses it where a bit differs.

    The document is not empty and has no entry of that name. Numbers may be infinite, text may hold lone surrogates.
    """
    assert document, "an empty document has no first entry to stand before"
    assert SEAL not in document
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    rest = b'",' + text[1:].encode("utf-8", "backslashreplace")  # which is how JSON writes a surrogate
    return _HEAD + hashlib.sha256(rest).hexdigest().encode() + rest


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; one with an entry `seal` only where the seal is whole.

    Raises UserError that begins with `where` for what is no object, repeats a name, or is damaged.
    """
    begins = data.startswith(_HEAD)
    if begins and hashlib.sha256(data[len(_HEAD) + _DIGITS :]).hexdigest().encode() != data[len(_HEAD) :][:_DIGITS]:
        raise UserError(f"{where} is damaged, or was changed by hand: it does not fit the SHA-256 that it begins with")
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{where} is not readable JSON: {printable(fault)}") from fault
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(found).__name__}")
    if SEAL in found and not begins:
        raise UserError(f"{where} is damaged, or was changed by hand: its seal does not stand first")
    return found


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return found
