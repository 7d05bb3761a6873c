"""One explanation as a page that needs nothing but itself."""

import base64
import math
from dataclasses import dataclass, field
from html import escape
from string import Template

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sightline.errors import printable
from sightline.explanation.explain import Explanation
from sightline.explanation.render import View, filter_sheet, overlay, png, seen_part, sheet, tiles
from sightline.types import Reply

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f24; --soft: #646a75; --line: #d9dce2; --ground: #fff; --dot: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e9ee; --soft: #9aa1ad; --line: #363b44; --ground: #15171b; --dot: #f98c0a } }
body { margin: 2rem auto; padding: 0 1.2rem; max-width: 62rem; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p, figcaption, summary, td, th { color: var(--soft) } figure { margin: 0 }
img, svg { max-width: 100%; height: auto } .row { display: flex; flex-wrap: wrap; gap: 1rem }
.row figure { flex: 1 1 16rem } .charts figure { flex: 1 1 26rem } .row img { width: 100% }
table { border-collapse: collapse } td, th { padding: .15rem 1rem .15rem 0; text-align: left; font-weight: normal }
th { color: var(--ink) } details { border-top: 1px solid var(--line); padding: .5rem 0 } summary { cursor: pointer }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif } svg line { stroke: var(--line) }
svg circle { fill: var(--dot); fill-opacity: .65 }
svg polyline { fill: none; stroke: var(--dot); stroke-width: 2 } svg .pale { stroke-width: 1; stroke-opacity: .25 }
.wide { overflow-x: auto } .matrix td { text-align: center; padding: .15rem .45rem; color: var(--ink) }
.matrix th { padding: .15rem .45rem } .hit { background: rgb(60 140 90 / calc(var(--share) * .7)) }
.miss { background: rgb(200 60 40 / min(1, calc(var(--share) * 4))) }
.three img { width: calc(33% - .3rem); image-rendering: pixelated } .three img + img { margin-left: .4rem }
.pair img { width: calc(50% - .3rem); image-rendering: pixelated } .pair img + img { margin-left: .6rem }
"""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def document(title: str, body: str) -> str:
    """A page of HTML that loads nothing: `title` is text, `body` is HTML that the caller has escaped."""
    return _PAGE.substitute(title=escape(title), style=_STYLE, body=body)


@dataclass
class Page:
    """The pictures of an explanation over `image`, and the HTML page that shows them.

    `view` says where the grid lies on the image. `name` is put into the page escaped.
    """

    explanation: Explanation
    image: UInt8[np.ndarray, "h w 3"]
    view: View
    name: str
    prediction: Reply | None = None
    drawn: UInt8[np.ndarray, "h w 3"] | None = None
    _png: dict[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        explanation = self.explanation
        self._png = {"original.png": png(Image.fromarray(self.image))}
        maps = {
            "rollout.png": explanation.rollout,
            "rollout-raw.png": explanation.rollout_raw,
            "activation.png": explanation.activation,
        }
        over = {name: self._over(cells) for name, cells in maps.items() if cells is not None}
        self._png |= {name: png(Image.fromarray(picture)) for name, picture in over.items()}
        if self.drawn is not None:
            self._png["answer.png"] = png(Image.fromarray(self.drawn))
        if explanation.gaze is not None:
            pictures = [self._over(cells) for cells in explanation.gaze]
            self._png["gaze.png"] = png(sheet(pictures, list(map(printable, explanation.gaze_words)), 3))
        if explanation.text_similarity is not None:
            least = float(explanation.text_similarity.min())
            pictures = [self._over(cells - least) for cells in explanation.text_similarity]
            self._png["texts.png"] = png(sheet(pictures, list(map(printable, explanation.texts)), 3))
        if over:
            name, picture = next(iter(over.items()))
            labels = ["original", "attention rollout" if name == "rollout.png" else "class activation"]
            self._png["side-by-side.png"] = png(sheet([self.image, picture], labels, 2))
        small, view = seen_part(self.image, self.view, 144)
        for layer, maps in zip(explanation.layers, explanation.head_maps, strict=True):
            labels = [f"layer {layer + 1}, head {head + 1}" for head in range(len(maps))]
            view = view._replace(stride=explanation.strides[layer])
            picture = sheet([overlay(small, cells, view) for cells in maps], labels, 6)
            self._png[f"heads-layer-{layer + 1:02}.png"] = png(picture)
        if explanation.position_similarity is not None:
            self._png["positions.png"] = png(tiles(explanation.position_similarity))
        if explanation.filters is not None:
            picture = filter_sheet(explanation.filters.pictures)
            self._png |= {} if picture is None else {"filters.png": png(picture)}

    def _over(self, cells: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "h w 3"]:
        stride = self.explanation.stride_of((cells.shape[0], cells.shape[1]))
        return overlay(self.image, cells, self.view._replace(stride=stride))

    def pictures(self) -> dict[str, bytes]:
        """PNG files by name."""
        return dict(self._png)

    def html(self) -> str:
        """The page: pictures inside, nothing loaded from elsewhere."""
        sections = [self._answer(), self._texts(), self._gaze(), self._rollouts(), self._activation()]
        sections += [self._heads(), self._distances(), self._positions(), self._filters()]
        return document(f"What the model looked at in {self.name}", "\n".join(filter(None, sections)))

    def _answer(self) -> str:
        if self.prediction is None:
            return ""
        rows = (f"<tr><th>{escape(s.label)}</th><td>{s.score:.1%}</td></tr>" for s in self.prediction.rows())
        table = f"<table>{''.join(rows)}</table>"
        return table if self.drawn is None else table + self._figure("answer.png", "The answer")

    def _gaze(self) -> str:
        if "gaze.png" not in self._png:
            return ""
        figure = self._figure("gaze.png", "The mean over the heads of the last layer")
        return (
            "<h2>The head's own attention</h2><p>What each of these, an object that was found or a class that was told "
            f"apart, asks of the patches. Colours reach from 0 to the largest share.</p>{figure}"
        )

    def _texts(self) -> str:
        if "texts.png" not in self._png:
            return ""
        figure = self._figure("texts.png", "The cosine of each patch and each text")
        return (
            "<h2>Where the texts are</h2><p>How near each patch lies to each text, in the space in which whole images "
            "are compared with texts. Each picture has its own scale, from the least cosine of all to its largest: it "
            f"shows where, not how well.</p>{figure}"
        )

    def _figure(self, name: str, caption: str) -> str:
        data = base64.b64encode(self._png[name]).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"

    def _rollouts(self) -> str:
        explanation = self.explanation
        if explanation.rollout is None:
            figure = "" if "activation.png" in self._png else self._figure("original.png", "The image")
            return (
                "<h2>Attention</h2><p>This network has no attention, so that there are no attention maps, no rollout "
                f"and no attention distances to show.</p>{figure}"
            )
        figures = [
            self._figure("original.png", "The image"),
            self._figure("rollout.png", "Rollout, with the skip connections"),
            self._figure("rollout-raw.png", "Rollout of the attention alone"),
        ]
        asked = {
            "class token": "the class token",
            "class and distillation tokens": "the class and the distillation token together",
            "mean of patches": "the mean of the patches",
        }
        merged = (
            " Where the network merges patches, a merged patch's share is spread evenly over those it was made of."
            if len(set(explanation.grids)) > 1
            else ""
        )
        return (
            f"<h2>Attention rollout</h2><p>How much of each patch arrives at {asked[explanation.query]}, which "
            f"the head reads, when the maps of all layers are multiplied.{merged} Colours reach from 0 to the largest "
            "share; what the model did not see is dimmed. Rollout follows attention, not causes: it does not say why "
            f'a class was chosen.</p><div class="row">{"".join(figures)}</div>'
        )

    def _activation(self) -> str:
        explanation = self.explanation
        if explanation.activation is None:
            return (
                ""
                if explanation.rollout is not None
                else "<h2>Class activation</h2><p>Left out: it is exact only where one dense layer reads the mean of "
                "all places, and this network's head does something else.</p>"
            )
        scores = () if self.prediction is None else self.prediction.rows()
        label = next((s.label for s in scores if s.index == explanation.activation_class), None)
        named = f"class {explanation.activation_class}" if label is None else f"“{escape(label)}”"
        figures = [self._figure("original.png", "The image"), self._figure("activation.png", "Class activation")]
        return (
            f"<h2>Class activation</h2><p>How much each place speaks for {named}: the classifier's weights for this "
            "class times what the network holds there. The mean over all places, with the class's bias, is its score "
            "before the softmax. Colours reach from 0 to the largest value; places that speak against the class are "
            f'as dark as those that say nothing.</p><div class="row">{"".join(figures)}</div>'
        )

    def _heads(self) -> str:
        if not self.explanation.layers:
            return ""
        parts = [
            f"<details{' open' if layer == self.explanation.layers[-1] else ''}><summary>Layer {layer + 1}</summary>"
            f"{self._figure(f'heads-layer-{layer + 1:02}.png', f'Layer {layer + 1}, each head')}</details>"
            for layer in self.explanation.layers
        ]
        others = len(self.explanation.grids) - len(parts)
        more = f" {others} more layers are not shown; “--layers” chooses." if others else ""
        return f"<h2>Each head</h2><p>What each head of a layer gives to every patch.{more}</p>{''.join(parts)}"

    def _distances(self) -> str:
        if not len(self.explanation.distance):
            return ""
        height, width = self.explanation.size
        return (
            "<h2>Mean attention distance</h2><p>How far each head looks, in pixels of the model's input of "
            f"{height}×{width}; a dot is a head.</p>{distance_plot(self.explanation.distance)}"
        )

    def _positions(self) -> str:
        if "positions.png" not in self._png:
            return (
                "<h2>Position similarity</h2><p>Left out: this network has no table of positions, whose rows could be "
                "compared.</p>"
            )
        figure = self._figure("positions.png", "Cosine similarity")
        return (
            "<h2>Position similarity</h2><p>One tile for a patch, where the patch stands: how alike its position is to "
            f"all others, from opposite (black) to equal (yellow).</p>{figure}"
        )

    def _filters(self) -> str:
        if "filters.png" not in self._png:
            return (
                "<h2>First filters</h2><p>Left out: no convolution with several filters meets the pixels of a picture "
                "in this network.</p>"
            )
        caption = "Principal components, the one of largest variance first"
        return (
            "<h2>First filters</h2><p>What the first convolution sees: in a Vision Transformer, the patch embedding."
            f"</p>{self._figure('filters.png', caption)}"
        )


def distance_plot(distance: np.ndarray) -> str:
    """Mean attention distances [layers, heads] as an SVG picture: layers across, pixels upwards, a dot a head.

    NaN has no dot.
    """
    left, right, top, bottom = 44, 8, 10, 34
    depth, width, height = len(distance), 620, 240
    largest = float(np.nan_to_num(distance).max())
    step = _round_step(largest)
    ticks = [step * i for i in range(max(math.ceil(largest / step), 1) + 1)]
    across = [left + (width - left - right) * (i + 0.5) / depth for i in range(depth)]

    def up(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / ticks[-1]

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="Mean attention distance">']
    for tick in ticks:
        y = up(tick)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for layer, x in enumerate(across):
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 15}" text-anchor="middle">{layer + 1}</text>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{up(float(value)):.1f}" r="4"/>'
            for value in distance[layer]
            if not np.isnan(value)
        ]
    parts.append(f'<text x="{width / 2:.0f}" y="{height - 4}" text-anchor="middle">layer</text></svg>')
    return "".join(parts)


def _round_step(largest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides 0 to `largest` into two to five parts."""
    power = 10.0 ** math.floor(math.log10(max(largest, 1.0)))
    return power * next(step for step in (0.2, 0.5, 1, 2) if largest <= 5 * step * power)
