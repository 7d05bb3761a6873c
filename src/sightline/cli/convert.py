"""`sightline convert`: the same weights in another library's layout."""

import argparse
import json
from typing import Any

SUMMARY = "Carry weights to another library's layout, every tensor accounted for."
EXAMPLE = "sightline convert runs/photos --to timm --out photos-timm"


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("source", metavar="SOURCE", help="model directory, checkpoint, or hf:org/name")
    parser.add_argument("--to", required=True, metavar="LAYOUT", help="sightline, timm, transformers or google")
    parser.add_argument("--out", required=True, metavar="PATH", help="folder or file to write")
    parser.add_argument("--architecture", metavar="NAME", help="what a bare checkpoint is, where it cannot tell")


def run(request: argparse.Namespace) -> None:
    """Converts, and prints the coverage."""
    from sightline.checkpoints.convert import convert

    report = convert(request.source, request.to, request.out, architecture=request.architecture)
    print(json.dumps(report.to_json()) if request.json else report.describe())
