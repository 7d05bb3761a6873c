"""`sightline explain`: where a model looked."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sightline.cli.options import add_device, add_texts, lines

SUMMARY = "Show where a model looks: rollout, heads, distances, class activation, filters; pictures, arrays, a page."
EXAMPLE = "sightline explain runs/photos cat.jpg --out cat-explained"


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("model", metavar="MODEL", help="model directory, checkpoint, or hf:org/name")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image, folder of images, or glob")
    parser.add_argument("--out", default="explained", metavar="DIR", help="folder to write into")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="attention layers whose heads are shown, from 1"
    )
    parser.add_argument("--architecture", metavar="NAME", help="what a bare checkpoint is, where it cannot tell")
    add_texts(parser)
    add_device(parser)


def run(request: argparse.Namespace) -> int:
    """Explains every image; 1 where any could not be read."""
    from sightline.errors import UserError, printable
    from sightline.explanation.explain import no_layer
    from sightline.explanation.files import explain_image, folder_names
    from sightline.explanation.maps import attention_layers
    from sightline.inference.files import expand, stored
    from sightline.inference.predictor import Answer
    from sightline.model import load

    model = load(request.model, architecture=request.architecture, vocabulary=request.vocabulary)
    labels, prompts = lines(request.labels, ","), lines(request.prompts, "|")
    network, names = model.asked(labels, prompts)
    depth = attention_layers(model.network.backbone)
    for layer in request.layers or ():
        if not 1 <= layer <= depth:
            raise UserError(no_layer(layer, depth, 1))
    layers = None if request.layers is None else [layer - 1 for layer in request.layers]
    predictor = model.predictor(labels=labels, prompts=prompts, device=request.device, precision=request.precision)
    sources = list(expand(request.images))
    folders = folder_names(s.path if isinstance(s, Answer) else s for s in sources)
    results: list[dict[str, Any]] = []
    for source, name in zip(sources, folders, strict=True):
        (answer,) = predictor.predict([source])
        if answer.prediction is None:
            results.append({"path": answer.path, "error": answer.error})
            print(f"{printable(answer.path)}: {printable(answer.error)}", file=sys.stderr)
            continue
        folder = Path(request.out) / name
        reply = stored(answer.prediction, folder, "mask")
        _, page = explain_image(
            network,
            model.preprocess,
            str(source),
            folder,
            name=Path(str(source)).name,
            prediction=reply,
            layers=layers,
            labels=names,
        )
        arrays = folder / "explanation.npz"
        results.append({"path": answer.path, "page": str(page), "arrays": str(arrays), **reply.to_json()})
        if not request.json:
            print(f"{printable(answer.path)}: {page}", flush=True)
    if request.json:
        print(json.dumps({"model": request.model, "task": model.task, "results": results}))
    return 1 if any("error" in result for result in results) else 0
