"""The page about a dataset: what a check found, with the pictures concerned side by side."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from sightline.checkpoints.atomic import write_atomic
from sightline.datasets.check import Checked
from sightline.datasets.findings import KINDS, Finding, by_kind
from sightline.errors import printable
from sightline.explanation.page import document
from sightline.images.decode import ImageError, decode

PICTURE = 112
"""Longer side of a picture, in pixels."""

SHOWN = 40
"""Most findings of a kind that are shown; the others are counted."""

TOGETHER = 6
"""Most pictures of one finding."""


_NARROW = 'style="flex: 0 0 8.5rem; overflow-wrap: anywhere; font-size: .8rem; line-height: 1.3"'


def write_page(checked: Checked, path: Path) -> None:
    """Writes the page, whole or not at all. Raises WorkError where the disk refuses."""
    write_atomic(path, html(checked).encode("utf-8", "replace"))


def html(checked: Checked) -> str:
    """The page: pictures inside, nothing loaded from elsewhere."""
    pile = checked.pile
    wanted = {name for finding in checked.findings for name in finding.files[:SHOWN]}
    rows = {name: row for row, name in enumerate(pile.samples.names) if name in wanted}
    album = _Album(checked, rows)
    kinds = by_kind(checked.findings)
    sections = [_summary(checked), _overview(kinds), *(_section(kind, found, album) for kind, found in kinds.items())]
    return document(f"{printable(checked.source)}: what was found", "\n".join(sections))


class _Album:
    """Small pictures of the images of a dataset, by name."""

    def __init__(self, checked: Checked, rows: dict[str, int]):
        self.pile, self.readable, self.rows = checked.pile, checked.readable, rows

    def figure(self, name: str) -> str:
        """The picture of an image with its name and label."""
        words = escape(printable(name, 120))
        row = self.rows.get(name)
        if row is None:
            return f"<figure {_NARROW}><figcaption>{words}</figcaption></figure>"
        label = escape(printable(self.pile.labels[self.pile.label[row]], 40))
        picture = self._picture(row) if self.readable[row] else ""
        return f"<figure {_NARROW}>{picture}<figcaption>{words}<br><b>{label}</b></figcaption></figure>"

    def _picture(self, row: int) -> str:
        try:
            pixels = decode(self.pile.samples[row].image, target=(PICTURE, PICTURE))
        except ImageError:  # it has changed since it was looked at
            return ""
        data = base64.b64encode(_jpeg(pixels)).decode()
        return f'<img src="data:image/jpeg;base64,{data}" alt="">'


def _jpeg(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels)
    factor = PICTURE / max(image.size)
    size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
    kernel = Image.Resampling.BOX if factor < 1 else Image.Resampling.NEAREST
    buffer = BytesIO()
    image.resize(size, kernel, reducing_gap=3).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _summary(checked: Checked) -> str:
    document = checked.to_json()
    counts, seen = document["counts"], document["statistics"]
    rows = {
        "images": f"{counts['images']:,}, of which {counts['readable']:,} can be read",
        "found": ", ".join(f"{counts[s]:,} {s}{'' if counts[s] == 1 else 's'}" for s in ("error", "warning", "note")),
        "parts": "; ".join(
            f"{printable(name)}: {sum(classes.values()):,} images of {len(classes):,} classes"
            for name, classes in checked.parts.items()
        ),
    }
    if seen:
        for side in ("width", "height", "aspect"):
            rows[side] = "{min:g} to {max:g}, median {median:g}".format(**seen[side])
        for what in ("formats", "modes"):
            rows[what] = ", ".join(f"{name} {count:,}" for name, count in seen[what].items())
    verdict = "<p>Training on it would be wrong: mend the errors first.</p>" if counts["error"] else ""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"{verdict}<table>{cells}</table>"


def _overview(kinds: dict[str, list[Finding]]) -> str:
    if not kinds:
        return "<p>Nothing was found.</p>"
    rows = "".join(
        f'<tr><td>{KINDS[kind][0]}</td><th><a href="#{kind}">{escape(KINDS[kind][1])}</a></th>'
        f"<td>{len(found):,}</td><td>{escape(KINDS[kind][2])}</td></tr>"
        for kind, found in kinds.items()
    )
    head = "<tr><th>weight</th><th>what</th><th>findings</th><th>what to do</th></tr>"
    return f'<h2>Overview</h2><div class="wide"><table>{head}{rows}</table></div>'


def _section(kind: str, found: Sequence[Finding], album: _Album) -> str:
    severity, title, remedy = KINDS[kind]
    shown = "".join(_one(finding, album) for finding in found[:SHOWN])
    more = f"<p>and {len(found) - SHOWN:,} more</p>" if len(found) > SHOWN else ""
    opened, ending = " open" if severity != "note" else "", "" if len(found) == 1 else "s"
    return (
        f'<h2 id="{kind}">{escape(title[0].upper() + title[1:])}</h2><p>{severity}; {escape(remedy)}</p>'
        f"<details{opened}><summary>{len(found):,} finding{ending}</summary>"
        f'<div class="row" style="gap: 0 2.5rem">{shown}</div>{more}</details>'
    )


def _one(finding: Finding, album: _Album) -> str:
    figures = "".join(album.figure(name) for name in finding.files[:TOGETHER])
    more = len(finding.files) - TOGETHER
    rest = f"<figure {_NARROW}><figcaption>and {more:,} more</figcaption></figure>" if more > 0 else ""
    words = f"<p>{escape(printable(finding.reason, 400))}</p>"
    return f'<div style="max-width: 100%">{words}<div class="row">{figures}{rest}</div></div>'
