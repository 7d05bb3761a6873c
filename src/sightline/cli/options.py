"""Command-line options made from the fields of settings dataclasses, so that both say the same."""

import argparse
import json
import os
import re
import types
from collections.abc import Container, Mapping
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


def add_merge(parser: Any) -> None:
    """Less work: token merging."""
    words = "patches merged in each layer of a Vision Transformer: faster, a little less exact (default: 0, none)"
    parser.add_argument("--merge", type=int, default=0, metavar="R", help=words)


def add_device(parser: Any, *more: str) -> None:
    """Where to compute, and in which arithmetic; `more` are precisions that the verb has besides."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    choices = ("auto", "fp32", "bf16", "fp16", *more)
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


_NETWORK = ("tokenizer", "patch_size", "embed_dim", "depth", "num_heads", "drop_path_rate")
_TOLD = {"num_classes", "image_size", "in_chans"}
"""What the images say, or another option."""
_AUGMENT = ("horizontal_flip", "vertical_flip", "degrees", "crop", "randaugment", "erasing")


def add_network(parser: Any) -> None:
    """Settings of the network; those that are no option of their own are taken by `take_network`."""
    network = parser.add_argument_group(
        "network, in place of the recipe's choice",
        "every setting of the model's family is an option; several numbers are written 1,2,6",
    )
    for name in ("patch-size", "embed-dim", "depth", "num-heads"):
        network.add_argument(f"--{name}", type=setting, metavar="N")
    network.add_argument("--tokenizer", metavar="NAME", help="patch, convolution, …: how pixels become tokens")
    network.add_argument("--drop-path-rate", type=float, metavar="X", help="stochastic depth")


def add_augmentation(parser: Any) -> None:
    """How training images vary."""
    augment = parser.add_argument_group("variation of the training images")
    augment.add_argument("--horizontal-flip", "--hflip", type=float, metavar="P", help="probability of mirroring")
    augment.add_argument("--vertical-flip", "--vflip", type=float, metavar="P", help="probability of turning over")
    augment.add_argument("--degrees", type=float, metavar="X", help="largest rotation")
    augment.add_argument("--crop", choices=("resized", "padded", "none"), help="how training crops are taken")
    augment.add_argument("--randaugment", type=int, metavar="N", help="RandAugment operations")
    augment.add_argument("--erasing", "--reprob", type=float, metavar="P", help="probability of random erasing")


def take_network(request: argparse.Namespace, word: str) -> bool:
    """Takes `--NAME=VALUE` where a network or its head has a setting of this name; says whether it did."""
    from sightline.backbones.backbone import FAMILIAR
    from sightline.registry import table

    parts = [*table("backbones", "FAMILIES").values(), *table("heads", "HEADS").values()]
    known = {*FAMILIAR, *(field for part in parts for field in part.Config.__dataclass_fields__)} - _TOLD
    return take(request, "network", known, word)


def take(request: argparse.Namespace, group: str, known: Container[str], word: str) -> bool:
    """Takes `--NAME=VALUE` of a name that is known into the settings `group` of a request; says whether it did."""
    name, _, value = word.removeprefix("--").replace("-", "_").partition("=")
    if not word.startswith("--") or name not in known:
        return False
    value = setting(word.partition("=")[2]) if value else True
    setattr(request, group, {**getattr(request, group, {}), name: value})
    return True


def network_of(request: argparse.Namespace) -> dict[str, Any]:
    """The settings of the network that were told."""
    return {**_named(request, _NETWORK), **getattr(request, "network", {})}


def augmentation_of(request: argparse.Namespace) -> dict[str, Any]:
    """How the training images are to vary, where that was told."""
    return _named(request, _AUGMENT)


def _named(request: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(request, name)) is not None}


def run_of(request: argparse.Namespace, kind: type) -> dict[str, Any]:
    """What a run is told whatever it learns: names of its parts, settings of the dataclass `kind`, and what varies."""
    parts = ("model", "out", "image_size", "recipe", "resume", "device", "quiet")
    settings = given(request, kind)
    if request.precision == "auto":
        settings.pop("precision")
    told = {name: getattr(request, name) for name in parts}
    return {**told, "network": network_of(request), "augment": augmentation_of(request), **settings}


def speaks() -> bool:
    """Whether this is the process that speaks, where torchrun starts several."""
    return os.environ.get("RANK", "0") == "0"
