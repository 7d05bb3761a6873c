"""A page over many explanations, and one of what a network shows without any image."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch import nn

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import printable
from sightline.explanation.figures import distance_chart
from sightline.explanation.filters import patch_filters
from sightline.explanation.maps import attention_layers, evaluating
from sightline.explanation.page import document, figure, filters_section, positions_section
from sightline.explanation.positions import position_similarity
from sightline.explanation.queries import token_names
from sightline.explanation.render import filter_sheet, fitted, png, sheet, tiles
from sightline.explanation.result import Explanation, write_arrays
from sightline.explanation.survey import MOST_COLOURED, Survey

MOST_SHOWN = 200
"""Images that have a small picture on the page; the others are explained all the same."""


class Entry(NamedTuple):
    """One explained image of an overview: its name, the answer in words, its page, a small PNG picture."""

    name: str
    answer: str
    page: Path
    picture: bytes


class Overview:
    """Explanations of many images by one network, as one page with what they show together."""

    def __init__(self) -> None:
        self.survey, self.entries, self.small = Survey(), [], []

    def add(self, view: Explanation, name: str, answer: str, page: Path) -> None:
        """Counts an explanation in; `name` and `answer` are text, `page` is its page."""
        self.survey.add(view)
        if len(self.entries) < MOST_SHOWN and view.picture is not None:
            small, _ = fitted(np.asarray(view.picture), (0, 0, 1, 1), 1, 200)
            self.entries.append(Entry(printable(name), answer, page, png(Image.fromarray(small))))
        if len(self.small) < MOST_COLOURED and view.image is not None:
            self.small.append(fitted(view.image, (0, 0, 1, 1), 144, 144)[0])

    def write(self, folder: Path, model: str, size: tuple[int, int]) -> Path:
        """Writes `index.html`, `overview.npz`, and as PNG the distances and the shared colours; returns the page.

        Raises WorkError where it cannot be written.
        """
        files: dict[str, bytes] = {}
        distance = self.survey.distance
        if len(distance):
            chart = distance_chart(distance, self.survey.deviation)
            files["distance.png"] = png(chart.picture())
        colours = self.survey.colours()
        pairs = [
            picture
            for image, cells in zip(self.small, colours.pictures, strict=False)
            for picture in (image, _enlarged(cells, 144))
        ]
        if pairs:
            files["colours.png"] = png(sheet(pairs, [""] * len(pairs), 8))
        write_arrays(folder / "overview.npz", self.survey.arrays())
        body = self._body(folder, size, files, colours.variance)
        files["index.html"] = document(f"What {printable(model)} looks at", body).encode()
        for name, data in files.items():
            write_atomic(folder / name, data)
        return folder / "index.html"

    def _body(self, folder: Path, size: tuple[int, int], files: dict[str, bytes], variance: np.ndarray) -> str:
        cards = []
        for entry in self.entries:
            link = quote(entry.page.relative_to(folder).as_posix())
            data = base64.b64encode(entry.picture).decode()
            image = f'<img src="data:image/png;base64,{data}" alt="{escape(entry.name)}">'
            words = f"{escape(entry.name)}<br>{escape(entry.answer)}"
            cards.append(f'<figure><a href="{link}">{image}</a><figcaption>{words}</figcaption></figure>')
        more = self.survey.images - len(self.entries)
        parts = [f"<p>{self.survey.images} images{f'; {more} have no picture here' if more else ''}.</p>"]
        parts.append(f'<div class="cards">{"".join(cards)}</div>')
        if "distance.png" in files:
            chart = distance_chart(self.survey.distance, self.survey.deviation).svg()
            parts.append(
                f"<h2>Mean attention distance</h2><p>How far each head looks, in pixels of the model's input of "
                f"{size[0]}×{size[1]}: the mean over {self.survey.images} images, and a bar of one standard deviation "
                f"to either side.</p>{chart}"
            )
        if "colours.png" in files:
            shares = ", ".join(f"{share:.0%}" for share in variance)
            shown = figure(files["colours.png"], f"Three principal components ({shares} of the variance)")
            parts.append(
                "<h2>What the patches hold</h2><p>Each image, and its patches in colours that all images share: like "
                f"colours hold like things.</p>{shown}"
            )
        return "\n".join(parts)


def explain_model(backbone: nn.Module, folder: Path, name: str) -> Path:
    """Writes what a backbone shows without an image, positions and filters, as PNG, `model.npz` and `index.html`.

    Returns the page's path. Raises WorkError where it cannot be written.
    """
    config: Any = backbone.config
    with evaluating(backbone):
        first = next(backbone.parameters())
        blank = torch.zeros(1, config.in_chans, *config.image_size, device=first.device, dtype=first.dtype)
        names = token_names(backbone, backbone(blank).prefix)
        similarity = position_similarity(backbone)
    filters = patch_filters(backbone)
    arrays: dict[str, Any] = {"size": np.array(config.image_size)}
    pictures: dict[str, bytes] = {}
    if similarity is not None:
        arrays["position_similarity"] = similarity.cpu().numpy()
        pictures["positions.png"] = png(tiles(arrays["position_similarity"]))
    if filters is not None:
        arrays |= {"filters": filters.directions, "filters_variance": filters.variance}
        arrays["filters_pictures"] = filters.pictures
        drawn = filter_sheet(filters.pictures)
        pictures |= {} if drawn is None else {"filters.png": png(drawn)}
    rows = {
        "input": "{}×{} pixels".format(*config.image_size),
        "layers of attention": str(attention_layers(backbone)),
        "tokens before the patches": ", ".join(names) or "none",
    }
    table = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows.items())
    note = "<p>What it looks at shows only with images: <code>sightline explain MODEL IMAGE…</code></p>"
    sections: Sequence[str] = [f"<table>{table}</table>{note}", positions_section(pictures), filters_section(pictures)]
    write_arrays(folder / "model.npz", arrays)
    pictures["index.html"] = document(f"What {printable(name)} has learned", "\n".join(sections)).encode()
    for file, data in pictures.items():
        write_atomic(folder / file, data)
    return folder / "index.html"


def _enlarged(cells: np.ndarray, longest: int) -> np.ndarray:
    """Colours from 0 to 1 as an image whose longer side has about `longest` pixels; cells become squares."""
    scale = max(1, longest // max(cells.shape[:2]))
    return (cells * 255).round().astype(np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
