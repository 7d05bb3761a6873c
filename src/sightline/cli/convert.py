"""`sightline convert`: the same weights in another library's layout."""

import argparse
import json
from typing import Any

from sightline.cli.options import image_size, setting

SUMMARY = "Carry weights to another library's layout, every tensor accounted for."
EXAMPLE = "sightline convert runs/photos --to timm --out photos-timm"


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("source", metavar="SOURCE", help="model directory, checkpoint, or hf:org/name")
    parser.add_argument(
        "--to",
        required=True,
        metavar="LAYOUT",
        help="sightline, timm, transformers, torchvision, google, big_vision, original, openai, open_clip",
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="folder or file to write")
    parser.add_argument("--architecture", metavar="NAME", help="what a bare checkpoint is, where it cannot tell")
    parser.add_argument("--image-size", type=image_size, metavar="N|HxW", help="resample the positions for this size")
    parser.add_argument("--num-classes", type=int, metavar="N", help="replace the classifier by zeros for N classes")
    parser.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="take a setting that the target can express, such as norm_eps=1e-6 or activation=gelu_tanh; repeatable",
    )


def run(request: argparse.Namespace) -> None:
    """Converts, and prints the coverage."""
    from sightline.checkpoints.convert import convert

    options = {name: getattr(request, name) for name in ("architecture", "image_size", "num_classes")}
    report = convert(request.source, request.to, request.out, **options, **dict(request.set))
    print(json.dumps(report.to_json()) if request.json else report.describe())


def _setting(text: str) -> tuple[str, Any]:
    """`norm_eps=1e-6` as a name and a value: a number, true, false or null where it reads as one, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form NAME=VALUE")
    return name, setting(value)
