"""`sightline predict`: what is in images."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
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
    add_device(parser, "int8")
    group = parser.add_argument_group("for --precision int8, in which some answers change")
    words = "images to calibrate on, a folder or a dataset; with labels accuracy is measured (default: the job's first)"
    group.add_argument("--calibrate", metavar="DATA", help=words)
    words = "least share of images with the same first class as in fp32 (default: 0.99)"
    group.add_argument("--agreement", type=float, metavar="SHARE", help=words)


def run(request: argparse.Namespace) -> int:
    """Answers every image; 1 where any could not be read."""
    from sightline.errors import UserError
    from sightline.inference.choose import choose
    from sightline.inference.files import expand, open_csv, saved, to_json, write_csv
    from sightline.model import load

    eight = request.precision == "int8"
    for name in ("calibrate", "agreement"):
        if getattr(request, name) is not None and not eight:
            raise UserError(f"--{name} is for --precision int8, and the precision is {request.precision}")
    model = load(request.model, architecture=request.architecture, vocabulary=request.vocabulary)
    if request.merge:
        model = model.merged(request.merge)
    if request.draft:
        model = replace(model, preprocess=model.preprocess.replace(draft=True))
    predictor = model.predictor(
        labels=lines(request.labels, ","),
        prompts=lines(request.prompts, "|"),
        device=request.device,
        precision="fp32" if eight else request.precision,
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
        **(_eight_bits(request, predictor) if eight else {}),
    )
    if chosen.why and not request.quiet:
        print(f"sightline: {chosen.why}", file=sys.stderr)
    if chosen.measured is not None and not chosen.kept:
        _note_in_card(request, chosen.measured)
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
            document = to_json(counted(), request.model, model.task)
            if chosen.measured is not None:
                document["int8"] = chosen.measured.to_json()
            print(json.dumps(document))
        else:
            for answer in counted():
                _show(answer)
    if failed and not request.quiet:
        print(f"sightline: {failed} of the images could not be answered", file=sys.stderr)
    return 1 if failed else 0


def _eight_bits(request: argparse.Namespace, predictor: Any) -> dict[str, Any]:
    """What `choose` has to know for 8 bits."""
    from sightline.errors import printable
    from sightline.inference.eight_bits import read
    from sightline.recipes.calibration import calibration_images

    told = {} if request.agreement is None else {"agreement": request.agreement}
    if request.calibrate is None:
        return told
    named = calibration_images(request.model, request.calibrate, predictor.labels)
    for note in () if request.quiet else named.notes:
        print(f"sightline: {printable(note, 4000)}", file=sys.stderr)
    return {**told, "calibrate": read(predictor, named.sources, named.targets, named.names)}


def _note_in_card(request: argparse.Namespace, measured: Any) -> None:
    """Writes what was measured into the model's card, if it has one of ours; a folder that is closed is no failure."""
    from sightline.errors import UserError, WorkError, printable
    from sightline.reports.card import add_section

    of = f"`{printable(request.calibrate)}`".replace("`", "'") if request.calibrate else "the first images of a job"
    try:
        add_section(Path(request.model), "In 8 bits", f"Calibrated on {of}: {measured.describe()}.")
    except (UserError, WorkError) as fault:
        if not request.quiet:
            print(f"sightline: the model card was not changed: {fault}", file=sys.stderr)


def _show(answer: Any) -> None:
    from sightline.errors import printable

    if answer.prediction is None:
        print(f"{printable(answer.path)}: {printable(answer.error)}", file=sys.stderr)
    else:
        print(f"{printable(answer.path)}: {printable(answer.prediction.line(), 4000)}", flush=True)
