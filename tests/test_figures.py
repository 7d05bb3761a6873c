"""Charts: what is drawn stands where the numbers say, in the file as on the page."""

import math
import re

import numpy as np

from sightline.explanation.faithfulness import Faithfulness
from sightline.explanation.figures import curve_chart, distance_chart, faithfulness_charts


def test_dots_of_the_picture_and_of_the_page_agree():
    distance = np.array([[10.0, 40.0], [25.0, math.nan], [0.0, 5.0]], np.float32)
    chart = distance_chart(distance)
    svg, picture = chart.svg(), np.asarray(chart.picture())
    dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(dots) == 5
    for x, y in dots:
        assert picture[round(2 * float(y)), round(2 * float(x))].tolist() == [179, 38, 30]
    heights = {value: chart.y(value) for value in (0.0, 40.0)}
    assert heights[0.0] > heights[40.0] >= 10
    assert svg.count("<text") == len(chart.ticks) + 3 + 1


def test_bars_reach_a_deviation_to_either_side_and_never_below_nothing():
    distance, deviation = np.array([[10.0, 1.0]], np.float32), np.array([[3.0, 2.0]], np.float32)
    chart = distance_chart(distance, deviation)
    assert chart.bars == [(0.5, 7.0, 13.0), (0.5, 0.0, 3.0)]
    assert chart.ticks[-1] >= 13


def test_deep_networks_have_room_for_their_labels():
    chart = distance_chart(np.ones((48, 3), np.float32))
    assert len(chart.dots) == 144
    assert [label for _, label in chart.places][:3] == ["1", "3", "5"]


def test_curves_are_lines_with_names_that_are_text():
    chart = curve_chart("a & b", {"<map>": (np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.25, 0.0]))})
    svg = chart.svg()
    assert "<map>" not in svg
    assert "&lt;map&gt;" in svg
    assert 'aria-label="a &amp; b"' in svg
    points = re.search(r'points="([^"]+)"', svg)[1].split()
    assert points == [f"{chart.x(x):.1f},{chart.y(y):.1f}" for x, y in ((0, 1), (0.5, 0.25), (1, 0))]
    picture = np.asarray(chart.picture())
    assert picture[round(2 * chart.y(0.625)), round(2 * chart.x(0.25))].tolist() == [179, 38, 30]


def test_both_curves_of_every_map_are_drawn():
    shares = np.array([0.0, 1.0], np.float32)
    one = Faithfulness(shares, np.array([0.9, 0.1], np.float32), np.array([0.2, 0.9], np.float32))
    deletion, insertion = faithfulness_charts({"rollout": one, "random": one})
    assert [name for name, _ in deletion.lines] == ["rollout", "random"]
    assert deletion.lines[0][1] != insertion.lines[0][1]
