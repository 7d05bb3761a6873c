"""How a run without labels is known to have collapsed: rules of the doctor about features, teachers and codebooks.

A loss says nothing of it: a network that calls all images by the same name has an easy life. So the features are looked
at, and what the objective says of its teacher or codebook (docs/guides/pretrain.md tells the rules with their reasons).
"""

from collections.abc import Mapping
from statistics import fmean

from sightline.training.chart import Chart, Finding
from sightline.training.symptoms import Rule

FLAT = 2.0
"""Effective rank of the features of a batch below which they hold a single number."""

SHRUNK = 0.1
"""Deviation of the features, as a share of that before the first update, below which all images look alike."""

LOOKS = 2
"""Looks in a row at which features have to be so: one batch can be odd."""

ALONE = 1.5
"""Prototypes or entries of a codebook in use, by the exponential of the entropy, below which there is one only."""

EVEN = 0.995
"""Entropy of the teacher's answers, as a share of the largest, above which it prefers nothing."""

RECORDS = 10
"""Recorded batches in a row over which the last two are averaged."""

WARM = 50
"""Updates before which a codebook is too young for a verdict: the decoder has yet to find out what codes are for."""


def feature_collapse(chart: Chart) -> Finding | None:
    """The features of all images have become the same, or differ in one direction only."""
    if len(chart.spreads) <= LOOKS:
        return None
    (first, _), last = chart.spreads[0], chart.spreads[-LOOKS:]
    alike = all(deviation < SHRUNK * first for deviation, _ in last)
    if not alike and not all(rank < FLAT for _, rank in last):
        return None
    deviation, rank = last[-1]
    what = (
        f"deviate by {deviation:.2g}, {deviation / max(first, 1e-12):.1%} of what they did before the first update"
        if alike
        else f"use {rank:.2f} directions"
    )
    return Finding(
        "feature-collapse",
        chart.step,
        "error",
        f"the features of different images {what}: the network tells them apart no longer",
        f"Use a smaller learning rate (--lr {chart.settings.lr / 10:.1g}) and a longer warm-up, and larger batches; "
        "with a teacher, centring and a higher --momentum.",
    )


def teacher_collapse(chart: Chart) -> Finding | None:
    """The teacher calls all images by the same prototype, or prefers none."""
    seen = chart.assignments[-RECORDS:]
    if len(seen) < RECORDS:
        return None
    entropy, used = (fmean(values) for values in zip(*seen, strict=True))
    one = used < ALONE
    if not one and entropy < EVEN:
        return None
    words = (
        f"the teacher calls all images of a batch by the same prototype ({used:.2f} in use)"
        if one
        else f"the teacher prefers no prototype to another (entropy {entropy:.2%} of the largest)"
    )
    advice = (
        "Keep the centring on (--centring centre or sinkhorn), or move the centre faster (--centre-momentum 0.9)."
        if one
        else "Sharpen the teacher: --teacher-temperature 0.04, and a warm-up of it (--warm-teacher-temperature)."
    )
    rate = f" A smaller learning rate (--lr {chart.settings.lr / 10:.1g}) helps too."
    return Finding("teacher-collapse", chart.step, "error", words, advice + rate)


def codebook_collapse(chart: Chart) -> Finding | None:
    """Nearly all patches are called by the same word."""
    seen = chart.words[-RECORDS:]
    if len(seen) < RECORDS or chart.step < WARM or fmean(seen) >= ALONE:
        return None
    return Finding(
        "codebook-collapse",
        chart.step,
        "error",
        f"patches are called by one entry of the codebook ({fmean(seen):.2f} in use), and nothing is left to guess",
        "Learn the codebook anew, with --use-weight 20 and --standardised true, a smaller learning rate, or a longer "
        "fall of its temperature (--anneal 1); or name another (--codebook).",
    )


COLLAPSES: Mapping[str, Rule] = {
    "feature-collapse": feature_collapse,
    "teacher-collapse": teacher_collapse,
    "codebook-collapse": codebook_collapse,
}
"""Rules for every record of a run, by the kind of their finding."""
