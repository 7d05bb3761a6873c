"""Settings as frozen dataclasses, read from JSON and from keyword arguments by a closed, typed schema.

Nothing unknown is ignored and nothing is guessed: a key that no field has, or a value of another type, is the user's
fault and is named. Ranges are checked by each class in `__post_init__`.
"""

import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from sightline.errors import UserError, printable, suggest

T = TypeVar("T")


def from_json(kind: type[T], data: Any, where: str) -> T:
    """An instance of the dataclass `kind` from a JSON object; `where` names the source in messages.

    Raises UserError for anything but an object, for unknown or missing keys, for values of a wrong type, and for
    whatever the class itself refuses.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected an object with named settings, found {type(data).__name__}")
    known = {f.name: f for f in fields(cast(Any, kind)) if f.init}
    hints = get_type_hints(kind)
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown setting '{printable(key)}'.{suggest(str(key), known)}")
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{where}: setting '{name}' is missing")
    return kind(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in data.items()})


def to_json(value: Any) -> Any:
    """The JSON form of a dataclass or plain value: tuples become lists, nested dataclasses objects."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` asks for: lists become tuples, whole numbers floats; anything else is refused."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and (hint is None or hint is type(None))):
        return value
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _value(option, value, where)
            except UserError:
                continue
    elif origin is Literal:
        if value in args:
            return value
        raise UserError(f"{where}: '{printable(value)}' is not one of {', '.join(map(str, args))}")
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {_value(args[0], k, where): _value(args[1], v, f"{where}.{printable(k)}") for k, v in value.items()}
    elif is_dataclass(hint):
        return value if isinstance(value, hint) else from_json(hint, value, where)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not isinstance(value, int) or abs(value) <= sys.float_info.max:  # JSON has no limit on its numbers
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where}: expected {_plain(hint)}, found {printable(repr(value), 60)}")


def _plain(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds: for the ranges of settings."""
    if not condition:
        raise UserError(message)
