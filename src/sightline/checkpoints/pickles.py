"""Pickles read as data: a small machine that knows what a state dict is made of and can call nothing.

A pickle is a program for a stack machine. This one has the instructions that put plain values together; a name in the
program stays a name, is never imported, and what would be called becomes a note of it. So there is nothing to restrict:
no pickle can run code here, and none can allocate more than its own length accounts for.
"""

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sightline.errors import UserError, printable

MAX_PICKLE = 16 * 2**20
"""Bytes of names and shapes; a thousand tensors need less than one in a hundred of it."""

SCRIPT = "__torch__"
"""Where the classes of a TorchScript program stand; they are names here like any other, and are never imported."""

_MOST_STEPS = 2**19

_HARMLESS = {  # known not to be tensors, and left aside
    "argparse Namespace",
    "torch device",
    "_codecs encode",
    "builtins set",
    "__builtin__ set",
    "torch.serialization _get_layout",
    "numpy dtype",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
}
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {name: kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)}


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names; only its name."""

    module: str
    name: str


@dataclass(frozen=True)
class Aside:
    """What stands for a value that is no plain one."""

    what: str


class Scripted(dict[str, Any]):
    """The attributes of an object of a TorchScript program, of which nothing is ever run."""


@dataclass(frozen=True)
class Stored:
    """Numbers that lie elsewhere in the file under `key`: `count` of them, in units of `dtype`."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class Described:
    """A tensor as a pickle describes it; nothing in it is checked yet."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    storages: dict[str, "Stored"] = field(default_factory=dict)

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name is not text")
        self.names.add(f"{module} {name}")
        return Name(module, name)


def read_pickle(stream: io.BytesIO, where: str) -> tuple[Any, dict[str, Stored]]:
    """The value of the pickle that `stream` stands at, as plain data, `Described` tensors and `Aside`; its storages.

    Dictionaries of every kind become `dict`. Raises UserError for damage, and for a pickle that names what no state
    dict needs: loaded elsewhere, it could run code.
    """
    machine = _Machine()
    damage: Exception | None = None
    try:
        for steps, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if steps > _MOST_STEPS:
                raise ValueError("it is longer than that of any state dict")
            _STEPS.get(opcode.name, _unknown)(machine, argument)
        (value,) = machine.stack
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as fault:
        damage, value = fault, None
    strange = sorted(name for name in machine.names if not _is_known(*name.split(" ", 1)))
    if strange:
        shown = ", ".join(f"'{printable(name.replace(' ', '.'))}'" for name in strange[:5])
        raise UserError(
            f"{where} asks for {shown}: loading it could run code, so it is refused. "
            "Ask its author for .safetensors, or save its state dict alone"
        )
    if damage is not None:
        raise UserError(f"{where} is damaged or not a PyTorch file: {printable(damage)}") from damage
    return value, machine.storages


def _is_known(module: str, name: str) -> bool:
    """Whether a name is one of a container, a storage, a number type, or a function that puts a tensor together."""
    if f"{module} {name}" in _HARMLESS or (module, name) in _CALLS:
        return True
    if module == SCRIPT or module.startswith(f"{SCRIPT}."):
        return True
    if module == "torch._utils":
        return name.startswith("_rebuild_")
    return module in ("torch", "torch.storage") and (name in _STORAGES or name in _DTYPES)


def _unknown(machine: _Machine, argument: Any) -> None:
    raise ValueError("it has an instruction that no state dict needs")


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _value(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(make())


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def gather(machine: _Machine, argument: Any) -> None:
        if len(machine.stack) < count:
            raise ValueError("its stack is empty")
        items = tuple(machine.stack[len(machine.stack) - count :])
        del machine.stack[len(machine.stack) - count :]
        machine.stack.append(items)

    return gather


def _of_mark(make: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    def gather(machine: _Machine, argument: Any) -> None:
        made = make(machine.to_mark())
        machine.stack.append(made)

    return gather


def _mark(machine: _Machine, argument: Any) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument is None else int(argument)] = machine.stack[-1]


def _get(machine: _Machine, argument: Any) -> None:
    machine.stack.append(machine.memo[int(argument)])


def _pop(machine: _Machine, argument: Any) -> None:
    machine.stack.pop()


def _append(machine: _Machine, items: list[Any]) -> None:
    if isinstance(machine.stack[-1], list):
        machine.stack[-1].extend(items)
    elif not isinstance(machine.stack[-1], Aside):
        raise ValueError("it appends to what is no list")


def _set(machine: _Machine, items: list[Any]) -> None:
    if isinstance(machine.stack[-1], dict):
        machine.stack[-1].update(_pairs(items))
    elif not isinstance(machine.stack[-1], Aside):
        raise ValueError("it sets items of what is no dictionary")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    if len(items) % 2 or not all(isinstance(key, (str, int, float, bytes, type(None))) for key in keys):
        raise ValueError("a dictionary has keys that are neither text nor numbers")
    return dict(zip(keys, items[1::2], strict=True))


def _global(machine: _Machine, argument: Any) -> None:
    machine.stack.append(machine.name(*argument.split(" ", 1)))


def _stack_global(machine: _Machine, argument: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.name(module, name))


def _call(machine: _Machine, argument: Any) -> None:
    arguments, what = machine.stack.pop(), machine.stack.pop()
    if not isinstance(what, Name) or not isinstance(arguments, tuple):
        raise ValueError("it calls what is no name")
    if what.module == SCRIPT or what.module.startswith(f"{SCRIPT}."):
        machine.stack.append(Scripted())
        return
    make = _CALLS.get((what.module, what.name))
    machine.stack.append(Aside(f"{what.module}.{what.name}") if make is None else make(*arguments))


def _build(machine: _Machine, argument: Any) -> None:
    attributes = machine.stack.pop()  # which no weights stand in, unless they are those of a program's object
    if isinstance(machine.stack[-1], Scripted) and isinstance(attributes, dict):
        machine.stack[-1].update(attributes)
    if not isinstance(machine.stack[-1], (dict, Aside, Described)):
        raise ValueError("it gives attributes to a plain value")


def _instance(machine: _Machine, argument: Any) -> None:
    machine.to_mark()
    name = machine.name(*argument.split(" ", 1))
    machine.stack.append(Aside(f"{name.module}.{name.name}"))


def _persistent(machine: _Machine, argument: Any) -> None:
    kind, storage, key, _, count, *view = machine.stack.pop()
    known = isinstance(storage, Name) and storage.module in ("torch", "torch.storage") and storage.name in _STORAGES
    if kind != "storage" or not known or not isinstance(key, str) or type(count) is not int or any(view):
        raise ValueError("it refers to numbers in an unknown way")
    machine.stack.append(machine.storages.setdefault(key, Stored(key, _STORAGES[storage.name], count)))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Described:
    return Described(storage, offset, size, stride, getattr(storage, "dtype", None))


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    return Described(storage, offset, size, stride, _DTYPES.get(dtype.name) if isinstance(dtype, Name) else None)


def _ordered(pairs: Any = (), *rest: Any) -> dict[Any, Any]:
    return _pairs([part for key, value in pairs for part in (key, value)])


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *rest: tensor,
    ("torch", "Size"): lambda sides=(): tuple(sides),
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): lambda *rest: {},
    ("collections", "Counter"): lambda *rest: {},
}
"""What is recognised where a pickle calls it, and the plain value that stands for the result."""

_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, argument: None),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"), _push),
    **dict.fromkeys(("BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push),
    "NONE": _value(lambda: None),
    "NEWTRUE": _value(lambda: True),
    "NEWFALSE": _value(lambda: False),
    "EMPTY_TUPLE": _value(tuple),
    "EMPTY_LIST": _value(list),
    "EMPTY_DICT": _value(dict),
    "EMPTY_SET": _value(lambda: Aside("set")),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "MARK": _mark,
    "TUPLE": _of_mark(tuple),
    "LIST": _of_mark(list),
    "DICT": _of_mark(_pairs),
    "FROZENSET": _of_mark(lambda items: Aside("frozenset")),
    "OBJ": _of_mark(lambda items: Aside("object")),
    "INST": _instance,
    "APPEND": lambda machine, argument: _append(machine, [machine.stack.pop()]),
    "APPENDS": lambda machine, argument: _append(machine, machine.to_mark()),
    "ADDITEMS": lambda machine, argument: _append(machine, machine.to_mark()),
    "SETITEM": lambda machine, argument: _set(machine, [machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, argument: _set(machine, machine.to_mark()),
    "POP": _pop,
    "POP_MARK": lambda machine, argument: machine.to_mark().clear(),
    "DUP": lambda machine, argument: machine.stack.append(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
