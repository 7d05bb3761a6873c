"""An image file explained: arrays, pictures and a page on disk."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch import nn

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import printable
from sightline.explanation.explain import Explanation, explain
from sightline.explanation.page import Page
from sightline.explanation.render import Box, fitted
from sightline.images.decode import Limits, Source, decode
from sightline.images.preprocess import Preprocess
from sightline.registry import table
from sightline.types import Reply


def seen_box(preprocess: Preprocess, height: int, width: int) -> Box:
    """The region of an upright image that a pixel contract shows to the model, to half a pixel of its input.

    (left, top, right, bottom) in pixels of the image; it reaches beyond the image where the contract fills up.
    """
    rows, columns = preprocess.scaled(height, width)
    if preprocess.resize == "native":
        return 0.0, 0.0, float(width), float(height)
    (top, bottom), (left, right) = (
        ((scale - wanted) / 2 * length / scale, (scale + wanted) / 2 * length / scale)
        for scale, wanted, length in zip((rows, columns), preprocess.size, (height, width), strict=True)
    )
    return left, top, right, bottom


def explain_image(
    network: nn.Module,
    preprocess: Preprocess,
    source: Source,
    out_dir: str | os.PathLike[str],
    *,
    name: str = "image",
    prediction: Reply | None = None,
    layers: Sequence[int] | None = None,
    limits: Limits | None = None,
    labels: Sequence[str] | None = None,
) -> tuple[Explanation, Path]:
    """Explains one image and writes `index.html`, PNG pictures and `explanation.npz` into `out_dir`.

    `name` and `prediction` are what the page says of the image. Returns the explanation and the page's path. Each file
    is written whole or not at all, and none before everything is computed. Raises UserError where the image cannot be
    read, WorkError where the folder cannot be written.
    """
    image = decode(source, limits=limits)
    view = explain(network, preprocess(source, limits=limits), layers=layers, labels=labels)
    shown, box = fitted(image, seen_box(preprocess, *image.shape[:2]), 320, 1024)
    height, width = shown.shape[:2]
    drawn = None if prediction is None else drawing(prediction, shown, width / image.shape[1], labels)
    page = Page(view, shown, view.view(height, width, box), printable(name), prediction, drawn)
    files = {**page.pictures(), "index.html": page.html().encode()}
    folder = Path(out_dir)
    view.save(folder / "explanation.npz")
    for file, data in files.items():
        write_atomic(folder / file, data)
    return view, folder / "index.html"


def drawing(
    reply: Reply, image: UInt8[np.ndarray, "h w 3"], scale: float, labels: Sequence[str] | None
) -> UInt8[np.ndarray, "h w 3"] | None:
    """The image with the answer in it, as the `DRAWINGS` tables of this room do it; None for answers in words alone.

    `scale` is that of the image to the original.
    """
    draw = table("explanation", "DRAWINGS").get(type(reply).__name__)
    return None if draw is None else draw(reply, image, scale, labels)


def folder_names(sources: Iterable[object]) -> list[str]:
    """A folder name for each source: the stem of its file, with a number where that is taken already."""
    names: list[str] = []
    taken: set[str] = set()
    for source in sources:
        stem = Path(source).stem if isinstance(source, (str, os.PathLike)) else "image"
        stem = stem if stem.strip(".") else "image"
        name, count = stem, 1
        while name.casefold() in taken:
            name, count = f"{stem}-{count + 1}", count + 1
        taken.add(name.casefold())
        names.append(name)
    return names
