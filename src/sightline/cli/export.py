"""`sightline export`: a model for another runtime."""

import argparse
import json
from typing import Any

from sightline.cli.options import add_texts, lines

SUMMARY = "Write a model for ONNX Runtime, OpenVINO or torch, if its answers stay those of predict."
EXAMPLE = "sightline export runs/photos --format onnx --out photos.onnx"


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("model", metavar="MODEL", help="model directory, checkpoint, or hf:org/name")
    parser.add_argument("--format", default="onnx", choices=("onnx", "openvino", "torch"), help="what reads it")
    parser.add_argument("--out", required=True, metavar="PATH", help="file to write, or folder; labels.json beside it")
    words = "a decoded picture, uint8 of any size, or batches of prepared pixels"
    parser.add_argument("--input", default="image", choices=("image", "pixels"), help=words)
    words = "images or folders that have to be answered alike too"
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help=words)
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="most that a logit may differ")
    parser.add_argument("--architecture", metavar="NAME", help="what a bare checkpoint is, where it cannot tell")
    add_texts(parser)


def run(request: argparse.Namespace) -> None:
    """Exports, and prints the agreement."""
    from sightline.errors import UserError, printable
    from sightline.inference.export import export
    from sightline.inference.files import expand
    from sightline.model import load

    if not 0 <= request.tolerance <= 1:
        raise UserError(f"the tolerance has to lie between 0 and 1, and is {request.tolerance}")
    pictures = []
    for path in expand(request.images):
        if not isinstance(path, str):
            raise UserError(f"{printable(path.path)}: {path.error}")
        pictures.append(path)
    model = load(request.model, architecture=request.architecture, vocabulary=request.vocabulary)
    predictor = model.predictor(
        labels=lines(request.labels, ","), prompts=lines(request.prompts, "|"), device="cpu", precision="fp32"
    )
    done = export(
        predictor,
        request.out,
        format=request.format,
        input=request.input,
        pictures=pictures,
        tolerance=request.tolerance,
    )
    if request.json:
        document = {
            "model": request.model,
            "task": model.task,
            "format": request.format,
            "input": done.input,
            "outputs": list(done.outputs),
            "files": [str(path) for path in done.files],
            "labels": str(done.labels),
            "bytes": done.size,
            "agreement": done.agreement.to_json(),
        }
        print(json.dumps(document))
    else:
        print(f"{printable(done.files[0])} ({done.size / 2**20:.1f} MiB) and {printable(done.labels)}")
        print(done.agreement.describe())
