"""Command-line options made from the fields of settings dataclasses, so that both say the same."""

import argparse
import json
import re
import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from sightline.errors import UserError, printable


def add_fields(parser: Any, kind: type, *, leave_out: tuple[str, ...] = ()) -> None:
    """An option for each field of a dataclass that has help; left out on the command line, it stays None."""
    hints = get_type_hints(kind)
    for field in fields(cast(Any, kind)):
        if "help" in field.metadata and field.name not in leave_out:
            flag = f"--{field.name.replace('_', '-')}"
            words = f"{field.metadata['help']}"
            parser.add_argument(flag, default=None, help=words, dest=field.name, **_kind(hints[field.name]))


def given(request: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields of a dataclass that the command line named."""
    named = {field.name: getattr(request, field.name, None) for field in fields(cast(Any, kind))}
    return {name: value for name, value in named.items() if value is not None}


def _kind(hint: Any) -> Mapping[str, Any]:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is tuple:
        count = len(get_args(hint))
        return {"type": get_args(hint)[0], "nargs": count}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}


def setting(text: str) -> Any:
    """A setting's value as people write it: `3`, `1e-6`, `true`, `null`, `1,2,6` or `8x4` for several, else text."""
    for form in (text, f"[{text}]" if "," in text else re.sub(r"^(\d+)[x×](\d+)$", r"[\1, \2]", text)):
        try:
            return json.loads(form)
        except ValueError:
            continue
    return text


def add_device(parser: Any) -> None:
    """Where to compute, and in which arithmetic."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    choices = ("auto", "fp32", "bf16", "fp16")
    parser.add_argument("--precision", default="auto", choices=choices, help="arithmetic of the forward pass")


def add_texts(parser: Any, *, labels: bool = True) -> None:
    """What a network of images and texts is to be asked."""
    group = parser.add_argument_group("for models that read texts (CLIP)")
    if labels:
        group.add_argument("--labels", metavar="A,B,…|FILE", help="texts to choose from, or a file with one a line")
    group.add_argument("--prompts", metavar="T|T|…|FILE", help="sentences with {} for the label, or a file of them")
    group.add_argument("--vocabulary", metavar="PATH", help="file or folder of its words, where none lies beside it")


def lines(text: str | None, between: str) -> list[str] | None:
    """Texts as people write them: in a file, one a line, or here with a sign between them; None where none is given.

    Raises UserError for a file that cannot be read, and where nothing is in it.
    """
    if text is None:
        return None
    path = Path(text)
    try:
        whole = path.read_bytes() if len(text) < 1024 and path.is_file() else None
        found = text.split(between) if whole is None else whole.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        reason = "it is not UTF-8" if isinstance(fault, UnicodeDecodeError) else fault.strerror
        raise UserError(f"cannot read {printable(text)}: {reason}") from fault
    found = [line.strip() for line in found if line.strip()]
    if not found:
        raise UserError(f"there is no text in '{printable(text)}'")
    return found


def image_size(text: str) -> tuple[int, int]:
    """`224` or `160x96` (height × width) as (height, width)."""
    parts = text.lower().replace("×", "x").split("x")
    try:
        height, width = (int(parts[0]), int(parts[-1]))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size like 224 or 160x96 (height × width)") from None
    if len(parts) > 2 or min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size like 224 or 160x96 (height × width)")
    return height, width
