"""`sightline train`: from a folder of images to a model directory."""

import argparse
import json
import shlex
import sys
from typing import Any

from sightline.cli.options import (
    add_augmentation,
    add_device,
    add_fields,
    add_network,
    image_size,
    run_of,
    speaks,
    take_network,
)
from sightline.training.settings import Settings

SUMMARY = "Train or fine-tune a model on a folder of images; what is not said is chosen, and the choice explained."
EXAMPLE = "sightline train photos --minutes 10 --out runs/photos"

_OWN = ("seed", "epochs", "minutes", "precision")


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="what the task learns from: class folders or CSV, COCO JSON, masks, captions, shards; or builtin:digits",
    )
    parser.add_argument(
        "--task",
        default="classify",
        metavar="NAME",
        help="classify, detect (boxes), segment (masks) or clip (captions)",
    )
    parser.add_argument("--model", help="architecture, as `sightline models` lists them")
    parser.add_argument(
        "--weights", metavar="SOURCE", help="weights to start from: a file, a folder, builtin:tiny, hf:…; or none"
    )
    parser.add_argument(
        "--recipe",
        help="fine-tune, fine-tune-small (the default of small networks with weights) or fine-tune-as-published",
    )
    parser.add_argument("--out", metavar="DIR", help="model directory to make (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out where it stopped")
    parser.add_argument("--epochs", type=float, metavar="X", help="passes over the training images")
    parser.add_argument("--minutes", type=float, metavar="X", help="train for so long instead")
    parser.add_argument("--seed", type=int, default=0, help="every random choice follows from it")
    parser.add_argument("--image-size", type=image_size, metavar="N|HxW", help="pixels that the network reads")
    modes = ("squash", "crop", "pad", "native")
    parser.add_argument("--resize", choices=modes, help="how images of other shapes get there; native keeps aspect")
    add_device(parser)
    add_network(parser)
    add_fields(parser.add_argument_group("teaching, in place of the recipe's choice"), Settings, leave_out=_OWN)
    add_augmentation(parser)


def further(request: argparse.Namespace, word: str) -> bool:
    """Takes `--NAME=VALUE` where a network or its head has a setting of this name; says whether it did."""
    return take_network(request, word)


def run(request: argparse.Namespace) -> int:
    """Trains, and prints the result."""
    from sightline.recipes.train import train
    from sightline.training.signals import Interrupted

    own: dict[str, Any] = {"task": request.task, "weights": request.weights, "resize": request.resize}
    try:
        trained = train(request.data, **own, **run_of(request, Settings))
    except Interrupted as stop:
        if speaks():
            words = ["sightline", "train", request.data, *(["--out", request.out] if request.out else []), "--resume"]
            print(f"sightline: {stop}. Go on with: {shlex.join(words)}", file=sys.stderr)
        return stop.status
    if speaks():
        report(trained, request.json)
    return 0


def report(trained: Any, as_json: bool) -> None:
    """The result of a run, for a person or a program."""
    if as_json:
        print(json.dumps(trained.to_json()))
        return
    counts = trained.counts
    print(f"{trained.headline}  of {counts['evaluated']:,} held-out images")
    if counts["refused"]:
        print(f"{counts['refused']:,} held-out images could not be read and count as wrong")
    print(f"model  {trained.directory}\nreport {trained.report}")
