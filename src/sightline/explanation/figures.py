"""Charts, as SVG for a page and as a picture for a file, from the same numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from sightline.explanation.faithfulness import Faithfulness

_WIDTH, _HEIGHT = 620, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 10, 34
_FINE = 2  # pixels of a file for one of the chart's
_INK, _SOFT, _LINE, _GROUND = "#1d1f24", "#646a75", "#d9dce2", "#ffffff"
LINES = ("#b3261e", "#1f6fb4", "#2c7a4b", "#8a5a00", "#6d4aa8", "#646a75")
"""Colours of lines, in order; dashes tell them apart for every eye."""
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "1 4")


@dataclass
class Chart:
    """Dots and lines over two axes.

    `places` are what is written below, each at its share of the width, 0 to 1; `ticks` the values written at the side,
    from 0 to the largest that fits. Dots and named lines have points (share of the width, value), bars (share, lowest
    value, highest).
    """

    name: str
    across_title: str
    places: Sequence[tuple[float, str]]
    ticks: Sequence[float]
    dots: Sequence[tuple[float, float]] = ()
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]] = ()
    bars: Sequence[tuple[float, float, float]] = ()

    def x(self, share: float) -> float:
        """Pixels from the left."""
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * share

    def y(self, value: float) -> float:
        """Pixels from above."""
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / self.ticks[-1]

    def svg(self) -> str:
        """The chart as an element of a page, in the colours of the page."""
        head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{escape(self.name)}">'
        parts = [head]
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for share, label in self.places:
            spot = f'x="{self.x(share):.1f}" y="{_HEIGHT - _BOTTOM + 15}"'
            parts.append(f'<text {spot} text-anchor="middle">{escape(label)}</text>')
        for share, low, high in self.bars:
            x = self.x(share)
            parts.append(f'<line x1="{x:.1f}" y1="{self.y(low):.1f}" x2="{x:.1f}" y2="{self.y(high):.1f}"/>')
        for share, value in self.dots:
            parts.append(f'<circle cx="{self.x(share):.1f}" cy="{self.y(value):.1f}" r="4"/>')
        for number, (label, points) in enumerate(self.lines):
            path = " ".join(f"{self.x(share):.1f},{self.y(value):.1f}" for share, value in points)
            look = f"stroke:{LINES[number % len(LINES)]};stroke-dasharray:{_DASHES[number % len(_DASHES)] or 'none'}"
            parts.append(f'<polyline points="{path}" style="{look}"><title>{escape(label)}</title></polyline>')
        middle = f'x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle"'
        return "".join([*parts, f"<text {middle}>{escape(self.across_title)}</text></svg>"])

    def picture(self) -> Image.Image:
        """The chart as a picture on white; lines are told apart by their colours."""
        page = Image.new("RGB", (_WIDTH * _FINE, _HEIGHT * _FINE), _GROUND)
        draw, font = ImageDraw.Draw(page), ImageFont.load_default(11 * _FINE)

        def at(share: float, value: float) -> tuple[float, float]:
            return self.x(share) * _FINE, self.y(value) * _FINE

        for tick in self.ticks:
            draw.line([at(0, tick), at(1, tick)], fill=_LINE, width=_FINE)
            spot = ((_LEFT - 6) * _FINE, self.y(tick) * _FINE)
            draw.text(spot, f"{tick:g}", fill=_SOFT, font=font, anchor="rm")
        for share, label in self.places:
            draw.text((self.x(share) * _FINE, (_HEIGHT - 24) * _FINE), label, fill=_SOFT, font=font, anchor="mm")
        draw.text((_WIDTH * _FINE / 2, (_HEIGHT - 8) * _FINE), self.across_title, fill=_INK, font=font, anchor="mm")
        for share, low, high in self.bars:
            draw.line([at(share, low), at(share, high)], fill=_LINE, width=2 * _FINE)
        for share, value in self.dots:
            (x, y), radius = at(share, value), 3.5 * _FINE
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=LINES[0])
        for number, (_, points) in enumerate(self.lines):
            draw.line([at(*point) for point in points], fill=LINES[number % len(LINES)], width=2 * _FINE)
        return page


def distance_chart(
    distance: Float[np.ndarray, "layers heads"], deviation: Float[np.ndarray, "layers heads"] | None = None
) -> Chart:
    """Mean attention distances: layers across, pixels upwards, a dot a head (arXiv 2010.11929, figure 7, right).

    NaN has no dot. `deviation` over images is drawn as a bar behind each dot, one to either side.
    """
    depth, largest = len(distance), float(np.nan_to_num(distance).max())
    reach = distance if deviation is None else distance + deviation
    ticks = _ticks(max(largest, float(np.nan_to_num(reach).max())))
    places = [((layer + 0.5) / depth, layer) for layer in range(depth)]
    every = -(-depth // 24)
    known = [(share, layer, head) for share, layer in places for head in np.flatnonzero(~np.isnan(distance[layer]))]
    bars = []
    if deviation is not None:
        bars = [
            (share, max(float(distance[layer, head] - deviation[layer, head]), 0.0), float(reach[layer, head]))
            for share, layer, head in known
        ]
    return Chart(
        "Mean attention distance",
        "layer",
        [(share, str(layer + 1)) for share, layer in places if layer % every == 0],
        ticks,
        [(share, float(distance[layer, head])) for share, layer, head in known],
        bars=bars,
    )


def distance_plot(distance: Float[np.ndarray, "layers heads"]) -> str:
    """`distance_chart` as SVG."""
    return distance_chart(distance).svg()


def curve_chart(name: str, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> Chart:
    """Probabilities over shares of the patches, a line for each name."""
    places = [(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)]
    lines = [(label, list(zip(x.tolist(), y.clip(0, 1).tolist(), strict=True))) for label, (x, y) in curves.items()]
    return Chart(name, "patches", places, (0.0, 0.25, 0.5, 0.75, 1.0), lines=lines)


def faithfulness_charts(judged: dict[str, Faithfulness]) -> tuple[Chart, Chart]:
    """The curves of deletion and of insertion of several maps."""
    deletion = {name: (one.shares, one.deletion) for name, one in judged.items()}
    insertion = {name: (one.shares, one.insertion) for name, one in judged.items()}
    return curve_chart("Probability as patches are deleted", deletion), curve_chart(
        "Probability as patches are put back", insertion
    )


def _ticks(largest: float) -> list[float]:
    """0 and on by steps of 1, 2 or 5 times a power of ten, up to `largest` or a little more, in two to five parts."""
    power = 10.0 ** math.floor(math.log10(max(largest, 1.0)))
    step = power * next(step for step in (0.2, 0.5, 1, 2) if largest <= 5 * step * power)
    return [step * i for i in range(max(math.ceil(largest / step), 1) + 1)]
