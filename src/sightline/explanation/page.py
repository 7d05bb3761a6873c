"""One explanation as pictures, and as a page that needs nothing but itself."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sightline.errors import printable
from sightline.explanation.faithfulness import Faithfulness
from sightline.explanation.figures import LINES, Chart, distance_chart, distance_plot, faithfulness_charts
from sightline.explanation.queries import BOTH, MEAN
from sightline.explanation.render import View, filter_sheet, overlay, png, seen_part, sheet, tiles, veil
from sightline.explanation.result import Explanation
from sightline.explanation.segmentation import MASS, pixel_mask
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
.figures td + td, .figures th + th { text-align: right; font-variant-numeric: tabular-nums }
th { color: var(--ink) } details { border-top: 1px solid var(--line); padding: .5rem 0 } summary { cursor: pointer }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif } svg line { stroke: var(--line) }
svg circle { fill: var(--dot); fill-opacity: .65 }
svg polyline { fill: none; stroke: var(--dot); stroke-width: 2 } svg .pale { stroke-width: 1; stroke-opacity: .25 }
.wide { overflow-x: auto } .matrix td { text-align: center; padding: .15rem .45rem; color: var(--ink) }
.matrix th { padding: .15rem .45rem } .hit { background: rgb(60 140 90 / calc(var(--share) * .7)) }
.miss { background: rgb(200 60 40 / min(1, calc(var(--share) * 4))) }
.three img { width: calc(33% - .3rem); image-rendering: pixelated } .three img + img { margin-left: .4rem }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1rem }
.maps img, .cards img { width: 100% }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .8rem }
.cards figcaption { overflow-wrap: anywhere; font-size: .85rem }
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


METHODS = {
    "rollout": "Rollout, with the skip connections",
    "raw": "Rollout of the attention alone",
    "attention": "The last layer's attention",
    "relevance": "Relevance: attention times its gradient",
    "activation": "Class activation",
}
"""The maps that can be drawn over an image, by the names that `--method` takes, in order."""

_FILES = {method: f"{'rollout-raw' if method == 'raw' else method}.png" for method in METHODS}


def maps_of(explanation: Explanation, methods: Sequence[str] = tuple(METHODS)) -> dict[str, Float[np.ndarray, "_ _"]]:
    """The maps that an explanation has, by the names of `METHODS`, in the order of `methods`."""
    found = {method: getattr(explanation, "rollout_raw" if method == "raw" else method) for method in methods}
    return {method: cells for method, cells in found.items() if cells is not None}


def figure(picture: bytes, caption: str) -> str:
    """A PNG picture with its caption, inside the page; `caption` is text."""
    data = base64.b64encode(picture).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


@dataclass
class Page:
    """The pictures of an explanation over `image`, and the HTML page that shows them.

    `view` says where the grid lies on the image. `name` is put into the page escaped. `methods` are the maps that are
    drawn, where the explanation has them. `judged` are curves of deletion and insertion by the names of maps, and
    `overlaps` says for each head of the last kept layer how well its mask covers a given one.
    """

    explanation: Explanation
    image: UInt8[np.ndarray, "h w 3"]
    view: View
    name: str
    prediction: Reply | None = None
    drawn: UInt8[np.ndarray, "h w 3"] | None = None
    methods: Sequence[str] = tuple(METHODS)
    judged: Mapping[str, Faithfulness] = field(default_factory=dict)
    overlaps: Sequence[float] = ()
    _png: dict[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        explanation = self.explanation
        self._png = {"original.png": png(Image.fromarray(self.image))}
        if self.drawn is not None:
            self._png["answer.png"] = png(Image.fromarray(self.drawn))
        if explanation.gaze is not None:
            pictures = [self._over(cells) for cells in explanation.gaze]
            self._png["gaze.png"] = png(sheet(pictures, list(map(printable, explanation.gaze_words)), 3))
        if explanation.text_similarity is not None:
            least = float(explanation.text_similarity.min())
            pictures = [self._over(cells - least) for cells in explanation.text_similarity]
            self._png["texts.png"] = png(sheet(pictures, list(map(printable, explanation.texts)), 3))
        over = {method: self._over(cells) for method, cells in maps_of(explanation, self.methods).items()}
        self._png |= {_FILES[method]: png(Image.fromarray(picture)) for method, picture in over.items()}
        if over:
            method, picture = next(iter(over.items()))
            self._png["side-by-side.png"] = png(sheet([self.image, picture], ["original", METHODS[method]], 2))
        small, view = seen_part(self.image, self.view, 144)
        for layer in explanation.layers:
            maps = explanation.attended(layer)
            labels = [f"layer {layer + 1}, head {head + 1}" for head in range(len(maps))]
            own = view._replace(stride=explanation.strides[layer])
            picture = sheet([overlay(small, cells, own) for cells in maps], labels, 6)
            self._png[f"heads-layer-{layer + 1:02}.png"] = png(picture)
        if explanation.layers:
            own = view._replace(stride=explanation.strides[explanation.layers[-1]])
            maps = explanation.attended(explanation.layers[-1])
            masked = [veil(small, pixel_mask(cells, small.shape[0], small.shape[1], own)) for cells in maps]
            labels = [f"head {head + 1}" for head in range(len(maps))]
            if self.overlaps:
                labels = [f"{label}: {one:.2f}" for label, one in zip(labels, self.overlaps, strict=True)]
            self._png["masks.png"] = png(sheet(masked, labels, 6))
        shape = explanation.colours.shape[:2]
        scale = max(1, 320 // max(shape))
        shades = (explanation.colours * 255).round().astype(np.uint8)
        self._png["colours.png"] = png(Image.fromarray(shades.repeat(scale, axis=0).repeat(scale, axis=1)))
        self._png["norms.png"] = png(Image.fromarray(self._over(explanation.norms)))
        if len(explanation.distance):
            self._png["distance.png"] = png(distance_chart(explanation.distance).picture())
        if explanation.position_similarity is not None:
            self._png["positions.png"] = png(tiles(explanation.position_similarity))
        if explanation.filters is not None:
            drawn = filter_sheet(explanation.filters.pictures)
            self._png |= {} if drawn is None else {"filters.png": png(drawn)}
        for file, chart in zip(("deletion.png", "insertion.png"), self._charts(), strict=False):
            self._png[file] = png(chart.picture())

    def _over(self, cells: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "h w 3"]:
        stride = self.explanation.stride_of((cells.shape[0], cells.shape[1]))
        return overlay(self.image, cells, self.view._replace(stride=stride))

    def _charts(self) -> Sequence[Chart]:
        return faithfulness_charts(dict(self.judged)) if self.judged else ()

    def pictures(self) -> dict[str, bytes]:
        """PNG files by name."""
        return dict(self._png)

    def html(self) -> str:
        """The page: pictures inside, nothing loaded from elsewhere."""
        sections = [self._answer(), self._texts(), self._gaze(), self._rollouts(), self._activation()]
        sections += [self._judged(), self._heads(), self._masks(), self._distances(), self._features()]
        sections += [positions_section(self._png), filters_section(self._png)]
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
        return figure(self._png[name], caption)

    def _class(self, index: int | None) -> str:
        """The name of a class as HTML, by its number where nobody said more."""
        scores = () if self.prediction is None else self.prediction.rows()
        label = next((s.label for s in scores if s.index == index), None)
        return f"class {index}" if label is None else f"“{escape(label)}”"

    def _rollouts(self) -> str:
        explanation = self.explanation
        if explanation.rollout is None:
            shown = "" if "activation.png" in self._png else self._figure("original.png", "The image")
            return (
                "<h2>Attention</h2><p>This network has no attention, so that there are no attention maps, no rollout "
                f"and no attention distances to show.</p>{shown}"
            )
        drawn = [method for method in self.methods if _FILES[method] in self._png and method != "activation"]
        figures = [self._figure("original.png", "The image")]
        figures += [self._figure(_FILES[method], METHODS[method]) for method in drawn]
        known = {BOTH: "the class and the distillation token together", MEAN: "the mean of the patches"}
        asked = known.get(explanation.query, f"the {explanation.query}")
        merged = (
            " Where the network merges patches, a merged patch's share is spread evenly over those it was made of."
            if len(set(explanation.grids)) > 1
            else ""
        )
        relevance = (
            f" Relevance speaks for {self._class(explanation.relevance_class)}: each layer's attention counts as far "
            "as more of it would raise that class's score, and the layers are multiplied."
            if "relevance" in drawn
            else ""
        )
        reads = ", which the head reads," if explanation.query == explanation.head_query else ""
        return (
            f"<h2>Attention rollout</h2><p>How much of each patch arrives at {escape(asked)}{reads} when the maps of "
            "all layers are multiplied "
            f"({explanation.fusion} of the heads, {explanation.residual:g} for the skip connection).{merged} Colours "
            "reach from 0 to the largest share; what the model did not see is dimmed. Rollout follows attention, not "
            f"causes: it does not say why a class was chosen.{relevance}</p>"
            f'<div class="maps">{"".join(figures)}</div>'
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
        if "activation.png" not in self._png:
            return ""
        named = self._class(explanation.activation_class)
        figures = [self._figure("original.png", "The image"), self._figure("activation.png", "Class activation")]
        return (
            f"<h2>Class activation</h2><p>How much each place speaks for {named}: the classifier's weights for this "
            "class times what the network holds there. The mean over all places, with the class's bias, is its score "
            "before the softmax. Colours reach from 0 to the largest value; places that speak against the class are "
            f'as dark as those that say nothing.</p><div class="maps">{"".join(figures)}</div>'
        )

    def _judged(self) -> str:
        if not self.judged:
            return ""
        rows = "".join(
            f'<tr><th><span style="color:{LINES[number % len(LINES)]}">■</span> {escape(METHODS.get(name, name))}</th>'
            f"<td>{one.deletion_area:.3f}</td><td>{one.insertion_area:.3f}</td><td>{one.score:+.3f}</td></tr>"
            for number, (name, one) in enumerate(self.judged.items())
        )
        charts = "".join(f"<figure>{one.svg()}<figcaption>{one.name}</figcaption></figure>" for one in self._charts())
        return (
            "<h2>Is it true?</h2><p>The patches are taken away, the most important first, and then put back into a "
            "blurred image. A map that names what the answer rests on makes the probability fall fast and rise fast: "
            "a small area under deletion, a large one under insertion. A map that does no better than a random order "
            "explains nothing here.</p><table><tr><th>map</th><td>deletion</td><td>insertion</td><td>difference</td>"
            f'</tr>{rows}</table><div class="row charts">{charts}</div>'
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
        asked = escape(self.explanation.query)
        return (
            f"<h2>Each head</h2><p>What each head of a layer gives to every patch when the {asked} asks.{more}</p>"
            f"{''.join(parts)}"
        )

    def _masks(self) -> str:
        if "masks.png" not in self._png:
            return ""
        best = (
            f" The number is the overlap with the given mask (intersection over union); the best head has "
            f"{max(self.overlaps):.2f}."
            if self.overlaps
            else ""
        )
        caption = f"Layer {self.explanation.layers[-1] + 1}, each head's mask"
        return (
            f"<h2>Attention as a segmentation</h2><p>The patches that together hold {MASS:.0%} of what a head gives to "
            f"patches, as DINO's paper shows it.{best}</p>{self._figure('masks.png', caption)}"
        )

    def _distances(self) -> str:
        if not len(self.explanation.distance):
            return ""
        height, width = self.explanation.size
        return (
            "<h2>Mean attention distance</h2><p>How far each head looks, in pixels of the model's input of "
            f"{height}×{width}; a dot is a head.</p>{distance_plot(self.explanation.distance)}"
        )

    def _features(self) -> str:
        explanation = self.explanation
        shares = ", ".join(f"{share:.0%}" for share in explanation.colours_variance)
        out = np.argwhere(explanation.outliers)
        named = ", ".join(f"{row + 1},{column + 1}" for row, column in out[:12]) + (" …" if len(out) > 12 else "")
        flag = (
            f" {len(out)} of {explanation.norms.size} patches stand out by their norm (row,column: {named}): what they "
            "hold is hardly of their place, and maps may point at them for no reason in the image."
            if len(out)
            else " No patch stands out."
        )
        registers = [name for name in explanation.prefix_names if name.startswith("register")]
        own = f" The network has {len(registers)} registers, which are there to take this over." if registers else ""
        prefix = ", ".join(
            f"{name} {norm:.3g}" for name, norm in zip(explanation.prefix_names, explanation.prefix_norms, strict=True)
        )
        figures = [
            self._figure("colours.png", f"Three principal components as colours ({shares} of the variance)"),
            self._figure("norms.png", "Norms of the last patches"),
        ]
        return (
            "<h2>What the patches hold</h2><p>Patches of like colour hold like things. Norms are those before the "
            f"final norm: median {np.median(explanation.norms):.3g}, largest {explanation.norms.max():.3g}"
            f'{f"; {prefix}" if prefix else ""}.{flag}{own}</p><div class="maps">{"".join(figures)}</div>'
        )


def positions_section(pictures: Mapping[str, bytes]) -> str:
    """What a page says of the positions, whose picture is `positions.png` where there is one."""
    if "positions.png" not in pictures:
        return (
            "<h2>Position similarity</h2><p>Left out: this network has no table of positions, whose rows could be "
            "compared.</p>"
        )
    shown = figure(pictures["positions.png"], "Cosine similarity")
    return (
        "<h2>Position similarity</h2><p>One tile for a patch, where the patch stands: how alike its position is to "
        f"all others, from opposite (black) to equal (yellow).</p>{shown}"
    )


def filters_section(pictures: Mapping[str, bytes]) -> str:
    """What a page says of the first filters, whose picture is `filters.png` where there is one."""
    if "filters.png" not in pictures:
        return (
            "<h2>First filters</h2><p>Left out: no convolution with several filters meets the pixels of a picture "
            "in this network.</p>"
        )
    shown = figure(pictures["filters.png"], "Principal components, the one of largest variance first")
    return (
        "<h2>First filters</h2><p>What the first convolution sees: in a Vision Transformer, the patch embedding."
        f"</p>{shown}"
    )
