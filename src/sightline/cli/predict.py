"""`sightline predict`: what is in images."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from sightline.cli.options import add_device, add_merge, add_texts, lines

SUMMARY = "Answer images: files, folders and globs, in order; one bad file costs one answer."
EXAMPLE = "sightline predict runs/photos holiday/*.jpg --top 3"

LOOK_AHEAD = 2**16
"""Paths that are drawn to see how long a job is; whether it is longer makes no difference."""


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("model", metavar="MODEL", help="model directory, checkpoint, or hf:org/name")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="image, folder of images, or glob")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="classes in an answer")
    parser.add_argument("--csv", metavar="FILE", help="write a table too")
    parser.add_argument("--out", default="predicted", metavar="DIR", help="folder for answers that are files: masks")
    parser.add_argument("--batch-size", type=int, metavar="N", help="most images at a time (default: measured, or 32)")
    words = "what computes: auto measures on long jobs, onnx and openvino make a program first; answers stay the same"
    parser.add_argument("--runtime", default="auto", choices=("auto", "torch", "onnx", "openvino"), help=words)
    words = "decode large JPEGs at a fraction of their size: faster, and pixels that differ a little"
    parser.add_argument("--draft", action="store_true", help=words)
    parser.add_argument("--architecture", metavar="NAME", help="what a bare checkpoint is, where it cannot tell")
    add_merge(parser)
    add_texts(parser)
    add_device(parser)


def run(request: argparse.Namespace) -> int:
    """Answers every image; 1 where any could not be read."""
    from sightline.inference.choose import choose
    from sightline.inference.files import expand, open_csv, saved, to_json, write_csv
    from sightline.model import load

    model = load(request.model, architecture=request.architecture, vocabulary=request.vocabulary)
    if request.merge:
        model = model.merged(request.merge)
    if request.draft:
        model = replace(model, preprocess=model.preprocess.replace(draft=True))
    predictor = model.predictor(
        labels=lines(request.labels, ","),
        prompts=lines(request.prompts, "|"),
        device=request.device,
        precision=request.precision,
        top=request.top,
    )
    paths = expand(request.paths)
    first = list(islice(paths, LOOK_AHEAD))
    chosen = choose(
        predictor,
        chain(first, paths),
        count=len(first),
        runtime=request.runtime,
        precision=request.precision,
        batch_size=request.batch_size,
    )
    if chosen.why and not request.quiet:
        print(f"sightline: {chosen.why}", file=sys.stderr)
    failed = 0
    with ExitStack() as files:
        answers = saved(chosen.predictor.predict(chosen.sources), request.out)
        if request.csv:
            answers = write_csv(answers, files.enter_context(open_csv(request.csv)))

        def counted() -> Iterator[Any]:
            nonlocal failed
            for answer in answers:
                failed += answer.error is not None
                yield answer

        if request.json:
            print(json.dumps(to_json(counted(), request.model, model.task)))
        else:
            for answer in counted():
                _show(answer)
    if failed and not request.quiet:
        print(f"sightline: {failed} of the images could not be answered", file=sys.stderr)
    return 1 if failed else 0


def _show(answer: Any) -> None:
    from sightline.errors import printable

    if answer.prediction is None:
        print(f"{printable(answer.path)}: {printable(answer.error)}", file=sys.stderr)
    else:
        print(f"{printable(answer.path)}: {printable(answer.prediction.line(), 4000)}", flush=True)
