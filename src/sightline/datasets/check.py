"""The pre-flight of a dataset: everything that is wrong with its files, classes and parts, before time is spent."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sightline.datasets.duplicates import DETAIL, candidates, confirmed, same
from sightline.datasets.examine import MODES, SUFFIXES, Looks, each, fine, look, look_at_header
from sightline.datasets.findings import SEVERITIES, Finding, ordered
from sightline.datasets.image_set import ImageSet, Names, Samples, joined
from sightline.datasets.inventory import WHOLE, Inventory, take_stock
from sightline.datasets.naming import some
from sightline.images.decode import FORMATS

REFUSED_SHARE = 0.01
"""The share of unreadable training images above which training stops."""

TINY_CLASS = 10
"""Training images below which a class is called tiny."""

IMBALANCE = 10
"""How many times as large as the smallest class the largest may be."""

CONFIRMED = 20_000
"""Most images whose likeness to others is confirmed by a second look."""

NO_CLASS = ""
"""The label of an image that has none."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Checked:
    """What a check found.

    `parts` counts the images of each class of each part; `statistics` describe those that can be read, and `readable`
    says which of the `pile` these are.
    """

    source: str
    parts: Mapping[str, Mapping[str, int]]
    pile: "Pile"
    readable: Bool[np.ndarray, " n"]
    statistics: Mapping[str, Any]
    findings: Sequence[Finding]
    quick: bool
    seconds: float = 0.0

    @property
    def severity(self) -> str | None:
        """That of the gravest finding; None where there is none."""
        return next((s for s in SEVERITIES if any(f.severity == s for f in self.findings)), None)

    def to_json(self) -> dict[str, Any]:
        """The document of `check --json`."""
        counts = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}
        kinds: dict[str, int] = defaultdict(int)
        for finding in self.findings:
            kinds[finding.kind] += 1
        return {
            "data": self.source,
            "fit": not counts["error"],
            "quick": self.quick,
            "counts": {"images": len(self.readable), "readable": int(self.readable.sum()), **counts},
            "parts": {name: dict(classes) for name, classes in self.parts.items()},
            "statistics": dict(self.statistics),
            "kinds": dict(kinds),
            "findings": [finding.to_json() for finding in self.findings],
            "seconds": self.seconds,
        }


def check(
    source: str | Path,
    *,
    seed: int = 0,
    workers: int = 1,
    quick: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Checked:
    """Looks at every file of a dataset and says what is wrong with it; nothing is written.

    With `quick` images are judged by their headers, and duplicates are not sought. `workers` processes read images,
    this one where there are none. `progress` is told what is done, how much of it, and of how much. Raises UserError
    where there is no dataset.
    """
    progress("listing", 0, 0)
    stock = take_stock(source, seed=seed)
    pile = Pile(stock)
    looks = Looks.empty(len(pile.samples), pixels=not quick)
    rows = range(len(pile.samples))
    total = len(rows)
    for row, seen in each(
        look_at_header if quick else look,
        pile.samples,
        rows,
        workers=workers,
        progress=lambda done: progress("reading", done, total),
    ):
        if seen is None:
            looks.crashed.add(row)
            looks.reasons[row] = "its decoder crashed, or did not come to an end"
        else:
            looks.put(row, seen)
    findings = [*stock.findings, *_classes(stock), *_unreadable(stock, pile, looks), *_kinds(pile, looks)]
    findings += _sizes(pile, looks)
    if not quick:
        findings += _duplicates(stock, pile, looks, workers, progress)
    return Checked(
        str(source),
        {name: _counted_in(images) for name, images in stock.parts.items()},
        pile,
        looks.readable,
        _statistics(looks),
        ordered(findings),
        quick,
    )


def _counted_in(images: ImageSet) -> Mapping[str, int]:
    """Images of each class, or all of them where they have not one class each."""
    return {NO_CLASS: len(images)} if images.samples.marks is not None else images.counts() or {NO_CLASS: len(images)}


class Pile:
    """The images of all parts in one row, and of each the part and the label."""

    def __init__(self, stock: Inventory):
        parts = list(stock.parts.items())
        every = [images.samples for _, images in parts]
        root, stored = (every[0].root, every[0].stored) if every else (Path(), None)
        assert all(samples.root == root and samples.stored is stored for samples in every)
        self.samples = Samples(
            Names(name for samples in every for name in samples.names),
            np.concatenate([np.empty(0, dtype=np.int64), *(samples.targets for samples in every)]),
            root,
            joined([samples.arrays for samples in every]),
            stored,
        )
        self.names = [name for name, _ in parts]
        self.part = np.repeat(np.arange(len(parts)), [len(images) for _, images in parts])
        labels = sorted({label for _, images in parts for label in images.classes})
        number = {label: i for i, label in enumerate(labels)}
        self.labels = [*labels, NO_CLASS]
        places = [np.array([*(number[c] for c in images.classes), len(labels)]) for _, images in parts]
        self.label = np.concatenate(
            [np.empty(0, dtype=np.int64), *(p[images.targets] for p, (_, images) in zip(places, parts, strict=True))]
        )

    def called(self, rows: Sequence[int] | Int64[np.ndarray, " n"]) -> list[str]:
        """The names of some images."""
        return [self.samples.names[int(row)] for row in rows]

    def classes(self, rows: Sequence[int]) -> list[str]:
        """The labels of some images, each once."""
        return [self.labels[i] for i in sorted({int(self.label[row]) for row in rows})]

    def lies_in(self, rows: Sequence[int]) -> list[str]:
        """The parts of some images, each once."""
        return [self.names[i] for i in sorted({int(self.part[row]) for row in rows})]


def _classes(stock: Inventory) -> Iterator[Finding]:
    """Empty, tiny and unequal classes."""
    for name, images in stock.parts.items():
        if images.samples.marks is not None:
            continue  # it is objects and pixels that have classes
        empty = [label for label, count in images.counts().items() if not count]
        where = f" of '{name}'" if name != WHOLE else ""
        if empty:
            yield Finding("empty-class", f"classes{where} without images: {some(empty)}", (), empty)
    learned = stock.parts.get(stock.trained)
    counts = {label: count for label, count in learned.counts().items() if count} if learned else {}
    yield from class_sizes(counts)


def class_sizes(counts: Mapping[str, int]) -> Iterator[Finding]:
    """What is to be said of training classes of these sizes."""
    tiny = [label for label, count in counts.items() if count < TINY_CLASS]
    if tiny:
        told = some((f"{label}: {counts[label]}" for label in tiny), 8)
        yield Finding("tiny-class", f"classes of fewer than {TINY_CLASS} training images: {told}", (), tiny)
    if counts and max(counts.values()) > IMBALANCE * min(counts.values()):
        large, small = max(counts, key=lambda c: counts[c]), min(counts, key=lambda c: counts[c])
        told = f"{some([large])} has {counts[large]:,} training images, {some([small])} has {counts[small]:,}"
        yield Finding("imbalance", told, (), (large, small))


EMPTY = "file is empty"

# What a refusal says, and what kind of finding it is.
_REASONS = (
    (EMPTY, "empty-file"),
    ("truncated", "truncated"),
    ("over the limit", "over-limit"),
    ("content is none of", "no-image"),
    ("not a regular file", "no-regular-file"),
)


def kind_of(reason: str) -> str:
    """The kind of finding that an image's refusal is."""
    return next((kind for words, kind in _REASONS if words in reason.lower()), "unreadable")


def _unreadable(stock: Inventory, pile: Pile, looks: Looks) -> Iterator[Finding]:
    for row, reason in sorted(looks.reasons.items()):
        yield Finding(
            "crash" if row in looks.crashed else kind_of(reason), reason, pile.called([row]), pile.classes([row])
        )
    learned = pile.part == pile.names.index(stock.trained) if stock.trained in pile.names else np.zeros(0, dtype=bool)
    refused = [row for row in looks.reasons if learned.any() and learned[row]]
    if learned.any() and len(refused) / int(learned.sum()) > REFUSED_SHARE:
        share = f"{len(refused):,} of {int(learned.sum()):,} training images cannot be read"
        yield Finding("refused-share", f"{share}; training stops above {REFUSED_SHARE:.0%}", pile.called(refused))


def _kinds(pile: Pile, looks: Looks) -> Iterator[Finding]:
    """Formats, modes, orientation, frames."""
    good = looks.readable
    formats = list(FORMATS)
    for row in np.flatnonzero(good).tolist() if pile.samples.arrays is None else ():
        name, found = pile.samples.names[row], int(looks.formats[row])
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
        if found < len(formats) and suffix not in SUFFIXES[formats[found]]:
            yield Finding("mislabelled", f"its content is {formats[found]}, its name ends in '{suffix}'", [name])
    for mode in range(1, len(MODES)):
        rows = np.flatnonzero(good & (looks.modes == mode))
        if len(rows):
            yield Finding("mode", f"{len(rows):,} images: {MODES[mode]}", pile.called(rows))
    for kind, flags, words in (
        ("orientation", looks.turned, "are stored turned or mirrored, as EXIF says"),
        ("several-frames", looks.several, "have more than one frame or page"),
    ):
        rows = np.flatnonzero(good & flags)
        if len(rows):
            yield Finding(kind, f"{len(rows):,} images {words}", pile.called(rows))
    for row in np.flatnonzero(looks.blank).tolist():
        yield Finding("blank", "all its pixels are alike", pile.called([row]), pile.classes([row]))


def _sizes(pile: Pile, looks: Looks) -> Iterator[Finding]:
    """Images whose size or shape is far from that of the others."""
    rows = np.flatnonzero(looks.readable)
    if not len(rows):
        return
    height, width = looks.heights[rows].astype(np.float64), looks.widths[rows].astype(np.float64)
    length, ratio = np.sqrt(height * width), np.maximum(height, width) / np.minimum(height, width)
    for kind, odd in (
        ("tiny-image", length < np.median(length) / 4),
        ("large-image", length > np.median(length) * 8),
        ("extreme-aspect", (ratio > 5) & (ratio > 3 * np.median(ratio))),
    ):
        for i in np.flatnonzero(odd):
            size = f"{width[i]:.0f}×{height[i]:.0f} pixels"
            usual = f"; the median is {np.median(width):.0f}×{np.median(height):.0f}"
            yield Finding(kind, size + usual, pile.called([int(rows[i])]))


def _statistics(looks: Looks) -> dict[str, Any]:
    """Sizes, shapes, formats and modes of the readable images."""
    good = looks.readable
    if not good.any():
        return {}
    height, width = looks.heights[good], looks.widths[good]
    formats = [*FORMATS, "pixels"]
    return {
        "width": _range(width.astype(np.float64)),
        "height": _range(height.astype(np.float64)),
        "aspect": _range(width / height),
        "formats": _counted(formats, looks.formats[good]),
        "modes": _counted(MODES, looks.modes[good]),
        "turned": int(looks.turned[good].sum()),
    }


def _range(values: Float64[np.ndarray, " n"]) -> dict[str, float]:
    found = (values.min(), np.median(values), values.max())
    return {name: round(float(value), 3) for name, value in zip(("min", "median", "max"), found, strict=True)}


def _counted(names: Sequence[str], numbers: np.ndarray) -> dict[str, int]:
    counts = np.bincount(numbers, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def _duplicates(stock: Inventory, pile: Pile, looks: Looks, workers: int, progress: Progress) -> Iterator[Finding]:
    """The same and nearly the same images, within and across parts, and what their labels say."""
    good = looks.readable
    held = set(stock.splits.val.samples.names) if stock.splits is not None and stock.splits.drawn else set()
    groups = same(looks.digests, good)
    copies = {group[0]: group for group in groups}
    for group in groups:
        yield from _told(stock, pile, group, held, near=False)
    single = good.copy()
    single[[row for group in groups for row in group[1:]]] = False
    near, every = _near(pile.samples, looks, single & (looks.spread >= DETAIL), workers, progress)
    for group in near:
        rows = sorted(row for first in group for row in copies.get(first, [first]))
        yield from _told(stock, pile, rows, held, near=True)
    if not every:
        yield Finding("sampled", "so many images look alike that only the most alike were compared closely")


def _near(
    samples: Samples, looks: Looks, wanted: Bool[np.ndarray, " n"], workers: int, progress: Progress
) -> tuple[list[list[int]], bool]:
    """Groups of nearly the same images among the wanted ones, and whether all that look alike were compared."""
    rows = np.flatnonzero(wanted)
    aspects = (looks.widths[rows] / np.maximum(looks.heights[rows], 1)).astype(np.float32)
    pairs, _, every = candidates(
        looks.lumas[rows], aspects, progress=lambda done: progress("comparing", done, len(rows))
    )
    involved: dict[int, None] = {}
    for row in pairs.ravel().tolist():  # the most alike first
        involved.setdefault(row)
    chosen = list(involved)[:CONFIRMED]
    seen = each(
        fine,
        samples,
        [int(rows[i]) for i in chosen],
        workers=min(workers, 1 + len(chosen) // 64),
        progress=lambda done: progress("confirming", done, len(chosen)),
    )
    pictures = {row: picture for row, picture in seen if picture is not None}
    groups = confirmed(rows[pairs].tolist(), pictures, len(wanted))
    return groups, every and len(chosen) == len(involved)


def _told(stock: Inventory, pile: Pile, rows: Sequence[int], held: set[str], *, near: bool) -> Iterator[Finding]:
    """What is to be said of a group of images that are the same, or nearly."""
    names, labels, parts = pile.called(rows), pile.classes(rows), pile.lies_in(rows)
    what = "nearly the same image" if near else "the same image"
    if len(parts) > 1:
        learned = stock.trained in parts
        kind = ("near-leak" if near else "leak") if learned else "shared"
        yield Finding(kind, f"{what} in {' and '.join(parts)}", names, labels)
    if len(labels) > 1:
        kind = "near-contradiction" if near else "contradiction"
        yield Finding(kind, f"{what} with the labels {some(labels)}", names, labels)
    elif len(parts) == 1:
        apart = 0 < sum(name in held for name in names) < len(names)
        divided = ", divided between training and validation by the seed" if apart else ""
        yield Finding("near-duplicate" if near else "duplicate", f"{what} {len(rows)} times{divided}", names, labels)
