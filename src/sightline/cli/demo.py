"""`sightline demo`: the main job, on digits that need no download."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

SUMMARY = "Train a Vision Transformer on real handwritten digits, weigh it, predict files, explain some; offline."
EXAMPLE = "sightline demo --out demo"


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("--out", default="demo", metavar="DIR", help="model directory to make; an older demo goes")
    parser.add_argument("--seed", type=int, default=0, help="every random choice follows from it")
    parser.add_argument("--epochs", type=float, metavar="X", help="passes over the training images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def run(request: argparse.Namespace) -> int:
    """Runs the whole path, and prints what came out."""
    from sightline.recipes.demo import demo
    from sightline.training.signals import Interrupted

    try:
        result = demo(Path(request.out), request.seed, request.epochs, request.device, quiet=request.quiet)
    except Interrupted as stop:
        again = shlex.join(["sightline", "train", "builtin:digits", "--out", request.out, "--resume"])
        print(f"sightline: {stop}. Go on with: {again}", file=sys.stderr)
        return stop.status
    if request.json:
        print(json.dumps(result.to_json()))
        return 0
    trained = result.trained
    print(f"top-1 {trained.metrics['top1']:.2%} of {trained.counts['evaluated']} held-out digits")
    for answer in result.answers:
        best = answer.prediction
        print(f"{answer.path}: {best.line()}" if best else f"{answer.path}: {answer.error}")
    print(f"model   {trained.directory}\nreport  {trained.report}")
    for page in result.pages:
        print(f"explain {page}")
    print(f"next    sightline predict {trained.directory} {trained.directory}/images", file=sys.stderr)
    return 0
