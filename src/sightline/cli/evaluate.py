"""`sightline evaluate`: how good a model is."""

import argparse
import json
import sys
from typing import Any

from sightline.cli.options import add_device, add_texts, lines

SUMMARY = "Measure a model on labelled images: accuracy, AP of boxes, IoU of masks, by its task; and each class."
EXAMPLE = "sightline evaluate runs/photos photos"


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("model", metavar="MODEL", help="model directory, checkpoint, or hf:org/name")
    parser.add_argument("data", metavar="DATA", help="what `sightline train` takes for the model's task")
    parser.add_argument("--protocol", default="accuracy", choices=("accuracy",), help="what to measure")
    parser.add_argument("--seed", type=int, help="seed of the held-out part (default: that of the model's training)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read images")
    parser.add_argument("--architecture", metavar="NAME", help="what a bare checkpoint is, where it cannot tell")
    add_texts(parser, labels=False)
    add_device(parser)


def run(request: argparse.Namespace) -> int:
    """Evaluates, and prints the figures."""
    from sightline.errors import printable
    from sightline.recipes.evaluate import evaluate

    result = evaluate(
        request.model,
        request.data,
        seed=request.seed,
        batch_size=request.batch_size,
        workers=request.workers,
        device=request.device,
        precision=request.precision,
        architecture=request.architecture,
        vocabulary=request.vocabulary,
        prompts=lines(request.prompts, "|"),
    )
    for name, reason in result.refused:
        print(f"refused {printable(name)}: {printable(reason)}", file=sys.stderr)
    for note in () if request.quiet else result.notes:
        print(printable(note, 4000), file=sys.stderr)
    if request.json:
        print(json.dumps(result.to_json()))
        return 0
    print(f"{result.headline}  of {result.counts['evaluated']:,}")
    if result.refused:
        print(f"{len(result.refused)} images could not be read and count as wrong")
    for line in result.lines:
        print(line)
    return 0
