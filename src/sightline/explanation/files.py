"""An image file explained: arrays, pictures and a page on disk."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, nn

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import UserError, printable
from sightline.explanation.explain import explain
from sightline.explanation.faithfulness import Faithfulness, judge
from sightline.explanation.page import METHODS, Page, maps_of
from sightline.explanation.relevance import classifies
from sightline.explanation.render import Box, fitted
from sightline.explanation.result import SHOWN, Explanation, write_arrays
from sightline.explanation.segmentation import overlap, pixel_mask
from sightline.images.decode import Limits, Source, decode
from sightline.images.preprocess import Preprocess
from sightline.types import Prediction


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


def explain_source(
    network: nn.Module, preprocess: Preprocess, source: Source, *, limits: Limits | None = None, **settings: Any
) -> Explanation:
    """What a network looks at in one image, with the image; `settings` are those of `explain`.

    Raises UserError where the image cannot be read, and what `explain` raises.
    """
    image = decode(source, limits=limits)
    view = explain(network, preprocess(source, limits=limits), **settings)
    shown, box = fitted(image, seen_box(preprocess, *image.shape[:2]), 1, SHOWN)
    return replace(view, image=shown, box=box)


def explain_image(
    network: nn.Module,
    preprocess: Preprocess,
    source: Source,
    out_dir: str | os.PathLike[str],
    *,
    name: str = "image",
    prediction: Prediction | None = None,
    methods: Sequence[str] = tuple(METHODS),
    mask: Source | None = None,
    judged: bool = False,
    limits: Limits | None = None,
    **settings: Any,
) -> tuple[Explanation, Path]:
    """Explains one image and writes `index.html`, PNG pictures and `explanation.npz` into `out_dir`.

    `name` and `prediction` are what the page says of the image, `methods` the maps it shows (`METHODS`), `settings`
    those of `explain`. `mask` is an image of the same size, black where nothing is, with which the heads' masks are
    compared. `judged` measures the faithfulness of the maps. Returns the explanation and the page's path. Each file is
    written whole or not at all, and none before everything is computed. Raises UserError where an image cannot be read
    and for masks that do not fit, WorkError where the folder cannot be written.
    """
    settings.setdefault("gradients", "relevance" in methods)
    pixels = preprocess(source, limits=limits)
    image = decode(source, limits=limits)
    truth = None if mask is None else _truth(mask, image, limits)
    view = explain(network, pixels, **settings)
    if set(methods) < set(METHODS) and not maps_of(view, methods):
        raise UserError(
            f"the model has no {' and no '.join(methods)} map; it has: {', '.join(maps_of(view)) or 'none'}"
        )
    shown, box = fitted(image, seen_box(preprocess, *image.shape[:2]), 320, SHOWN)
    view = replace(view, image=shown, box=box)
    place = view.view(*shown.shape[:2], box)
    overlaps = [] if truth is None else head_overlaps(view, truth)
    curves = judge_maps(network, pixels, view, methods, settings.get("target")) if judged else {}
    page = Page(view, shown, place, printable(name), prediction, methods, curves, overlaps)
    files = {**page.pictures(), "index.html": page.html().encode()}
    folder = Path(out_dir)
    arrays = view.arrays() | ({"overlaps": np.array(overlaps, dtype=np.float32)} if overlaps else {})
    for method, one in curves.items():
        parts = {"deletion": one.deletion, "insertion": one.insertion, "shares": one.shares}
        arrays |= {f"{part}_{method}": curve for part, curve in parts.items()}
    write_arrays(folder / "explanation.npz", arrays)
    for file, data in files.items():
        write_atomic(folder / file, data)
    return view, folder / "index.html"


def judge_maps(
    network: nn.Module,
    pixels: Float[Tensor, "3 h w"],
    explanation: Explanation,
    methods: Sequence[str] = tuple(METHODS),
    target: int | None = None,
) -> dict[str, Faithfulness]:
    """The curves of deletion and insertion of each map of an explanation of these pixels, and of random orders.

    Empty for a network that has no map, or does not tell classes apart.
    """
    if not classifies(network):
        return {}
    height, width = explanation.size
    maps = {
        method: (cells, explanation.view(height, width, grid=(cells.shape[0], cells.shape[1])))
        for method, cells in maps_of(explanation, methods).items()
    }
    return judge(network, pixels, maps, target=target) if maps else {}


def head_overlaps(explanation: Explanation, truth: Bool[np.ndarray, "_ _"]) -> list[float]:
    """How well the mask of each head of the last kept layer covers a given mask of the image, 0 to 1 (`overlap`).

    `truth` has the shape of the image, or that shape scaled. Empty where no map was kept.
    """
    assert explanation.image is not None, "an explanation of bare pixels has no image to be compared with"
    height, width = explanation.image.shape[:2]
    scaled = np.asarray(Image.fromarray(truth).resize((width, height), Image.Resampling.NEAREST))
    if not explanation.layers:
        return []
    layer = explanation.layers[-1]
    view = explanation.view(height, width, explanation.box, grid=explanation.grids[layer])
    return [overlap(pixel_mask(cells, height, width, view), scaled) for cells in explanation.attended(layer)]


def _truth(mask: Source, image: UInt8[np.ndarray, "h w 3"], limits: Limits | None) -> Bool[np.ndarray, "h w"]:
    truth = decode(mask, limits=limits)
    name = printable(os.fsdecode(mask)) if isinstance(mask, (str, os.PathLike)) else "the mask"
    if truth.shape[:2] != image.shape[:2]:
        sizes = "{}×{} pixels, and its image {}×{}".format(*truth.shape[:2], *image.shape[:2])
        raise UserError(f"{name} has {sizes}: a mask has the size of its image")
    return truth.max(axis=-1) > 0


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
