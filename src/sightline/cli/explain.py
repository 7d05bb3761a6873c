"""`sightline explain`: where a model looked."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sightline.cli.options import add_device, add_texts, lines

SUMMARY = (
    "Show where a model looks, in images or by itself: maps, heads, distances, features; pictures, arrays, a page."
)
EXAMPLE = "sightline explain runs/photos cat.jpg --out cat-explained"

METHODS = ("rollout", "raw", "attention", "relevance", "activation")


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("model", metavar="MODEL", help="model directory, checkpoint, or hf:org/name")
    words = "image, folder of images, or glob; without any, positions and filters are shown, which need none"
    parser.add_argument("images", metavar="IMAGE", nargs="*", help=words)
    parser.add_argument("--out", default="explained", metavar="DIR", help="folder to write into")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="attention layers whose heads are shown, from 1"
    )
    words = "whose attention: class, distillation, register-N, patches (their mean), or a patch as ROW,COLUMN from 1"
    parser.add_argument("--query", metavar="TOKEN", help=f"{words}; what the head reads unless said")
    words = "maps that are drawn over the images, the first also beside them (default: all that the model has)"
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=words)
    words = "how the rollout joins the heads of a layer"
    parser.add_argument("--fusion", choices=("mean", "max", "min"), default="mean", help=words)
    words = "weight of the skip connections in the rollout, from 0 to below 1"
    parser.add_argument("--residual", type=float, default=0.5, metavar="X", help=words)
    parser.add_argument("--target", metavar="LABEL", help="class that relevance speaks for, instead of the answer")
    words = "an image, black where nothing is, or a folder of such with the images' names: overlap with each head"
    parser.add_argument("--masks", metavar="PATH", help=words)
    words = "measure how the answer changes when patches are deleted and inserted in the order of each map"
    parser.add_argument("--faithfulness", action="store_true", help=words)
    parser.add_argument("--architecture", metavar="NAME", help="what a bare checkpoint is, where it cannot tell")
    add_texts(parser)
    add_device(parser)


def run(request: argparse.Namespace) -> int:
    """Explains every image, or the model by itself; 1 where any image could not be read."""
    from sightline.errors import UserError
    from sightline.explanation.explain import no_layer
    from sightline.explanation.maps import attention_layers
    from sightline.model import load

    model = load(request.model, architecture=request.architecture, vocabulary=request.vocabulary)
    labels, prompts = lines(request.labels, ","), lines(request.prompts, "|")
    network, names = model.asked(labels, prompts)
    depth = attention_layers(model.network.backbone)
    for layer in request.layers or ():
        if not 1 <= layer <= depth:
            raise UserError(no_layer(layer, depth, 1))
    settings = {
        "layers": None if request.layers is None else [layer - 1 for layer in request.layers],
        "query": request.query,
        "fusion": request.fusion,
        "residual": request.residual,
        "target": None if request.target is None else _class(request.target, names),
        "labels": names,
    }
    document = {"model": request.model, "task": model.task}
    if request.images:
        document |= _explain_images(request, model, network, settings, labels, prompts)
    else:
        document |= _explain_model(request, model)
    if request.json:
        print(json.dumps(document))
    return 1 if any("error" in result for result in document["results"]) else 0


def _explain_model(request: argparse.Namespace, model: Any) -> dict[str, Any]:
    from sightline.errors import UserError
    from sightline.explanation.overview import explain_model

    asked = {"--masks": request.masks, "--query": request.query, "--faithfulness": request.faithfulness}
    for option, given in asked.items():
        if given:
            raise UserError(f"{option} speaks of images, and none was named")
    page = explain_model(model.network.backbone, Path(request.out), Path(request.model).name)
    if not request.json:
        print(page, flush=True)
    return {"results": [], "page": str(page), "arrays": str(page.with_name("model.npz"))}


def _explain_images(
    request: argparse.Namespace,
    model: Any,
    network: Any,
    settings: dict[str, Any],
    labels: list[str] | None,
    prompts: list[str] | None,
) -> dict[str, Any]:
    from sightline.errors import printable
    from sightline.explanation.files import explain_image, folder_names
    from sightline.explanation.overview import Overview
    from sightline.inference.files import expand, stored
    from sightline.inference.predictor import Answer

    predictor = model.predictor(labels=labels, prompts=prompts, device=request.device, precision=request.precision)
    sources = list(expand(request.images))
    names = folder_names(s.path if isinstance(s, Answer) else s for s in sources)
    overview, results, out = Overview(), [], Path(request.out)
    size = model.preprocess.size
    for source, name in zip(sources, names, strict=True):
        (answer,) = predictor.predict([source])
        if answer.prediction is None:
            results.append({"path": answer.path, "error": answer.error})
            print(f"{printable(answer.path)}: {printable(answer.error)}", file=sys.stderr)
            continue
        folder = out / name
        reply = stored(answer.prediction, folder, "mask")
        view, page = explain_image(
            network,
            model.preprocess,
            str(source),
            folder,
            name=Path(str(source)).name,
            prediction=reply,
            methods=request.method,
            mask=_mask(request.masks, Path(str(source))),
            judged=request.faithfulness,
            **settings,
        )
        result = {"path": answer.path, "page": str(page), "arrays": str(folder / "explanation.npz")}
        results.append({**result, **reply.to_json()})
        overview.add(view, Path(str(source)).name, reply.line(), page)
        size = view.size
        if not request.json:
            print(f"{printable(answer.path)}: {page}", flush=True)
    if overview.survey.images < 2:
        return {"results": results}
    page = overview.write(out, Path(request.model).name, size)
    if not request.json:
        print(f"all: {page}", flush=True)
    return {"results": results, "page": str(page), "arrays": str(page.with_name("overview.npz"))}


def _class(label: str, labels: Any) -> int:
    """The index of a class by its name. Raises UserError with the nearest name where there is none."""
    from sightline.errors import UserError, printable, suggest

    if label not in labels:
        raise UserError(f"the model has no class '{printable(label)}'.{suggest(label, labels)}")
    return list(labels).index(label)


def _mask(masks: str | None, image: Path) -> str | None:
    """The mask of an image: `masks` itself, or the file in that folder whose name begins as the image's."""
    from sightline.errors import UserError, printable

    if masks is None or not Path(masks).is_dir():
        return masks
    found = sorted(path for path in Path(masks).iterdir() if path.stem == image.stem and path.is_file())
    if not found:
        raise UserError(f"{printable(masks)} has no mask for {printable(image.name)} (a file named {image.stem}.png)")
    return str(found[0])
