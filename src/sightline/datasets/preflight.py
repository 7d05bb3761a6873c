"""What can be said of a dataset in seconds, before every training: `check` says the rest."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sightline.datasets.check import EMPTY, class_sizes, kind_of
from sightline.datasets.findings import Finding, ordered
from sightline.datasets.image_set import Samples
from sightline.datasets.split import Splits
from sightline.images.decode import ImageError, Source, image_size, read

HEADERS = 2_000
"""Most images whose header is read."""

ENDS = 8_192
"""Bytes at either end of a file by which files of equal size are compared first."""


def quick(splits: Splits, *, seconds: float = 5.0) -> list[Finding]:
    """The faults of training data that are cheap to find, the gravest first; none where all seems well.

    Empty files; class sizes; images of the training part that are in the validation part too, byte for byte; and
    whether the headers of a sample of images can be read. Each of the last two stops after about `seconds`; a note says
    what was looked at in part only. Nothing is an error here that `check` would not call one.
    """
    counts = {label: count for label, count in splits.train.counts().items() if count}
    findings = list(class_sizes(counts))
    for samples in (splits.train.samples, splits.val.samples):
        findings += _headers(samples, seconds / 2)
    sizes = [_contents(samples) for samples in (splits.train.samples, splits.val.samples)]
    for samples, contents in zip((splits.train.samples, splits.val.samples), sizes, strict=True):
        if empty := [samples.names[i] for i, content in enumerate(contents) if content == b"0"]:
            findings.append(Finding("empty-file", f"{len(empty):,} files of 0 bytes", empty))
    findings += _leaks(splits, *sizes, seconds)
    return ordered(findings)


def _contents(samples: Samples) -> list[bytes]:
    return [samples.content(i, name) for i, name in enumerate(samples.names)]


def _headers(samples: Samples, seconds: float) -> Iterator[Finding]:
    if samples.arrays is not None:
        return
    rows = np.unique(np.linspace(0, len(samples) - 1, HEADERS).astype(int)).tolist() if len(samples) else []
    until, done = time.monotonic() + seconds, 0
    while done < len(rows) and time.monotonic() < until:
        sample = samples[rows[done]]
        done += 1
        try:
            image_size(sample.image)
        except ImageError as error:
            if EMPTY not in error.reason:
                yield Finding(kind_of(error.reason), error.reason, [sample.name])
    if done < len(samples):
        yield Finding("sampled", f"the headers of {done:,} of {len(samples):,} images were read")


def _leaks(splits: Splits, train: Sequence[bytes], val: Sequence[bytes], seconds: float) -> Iterator[Finding]:
    """Images of both parts: of equal size, then of equal ends, then of equal bytes."""
    mine, other = splits.train.samples, splits.val.samples
    wanted = set(train) & set(val) - {b"0", b"-1"}
    judged = [i for i, content in enumerate(val) if content in wanted]
    alike: dict[bytes, list[int]] = defaultdict(list)
    for i, content in enumerate(train):
        if content in wanted:
            alike[content].append(i)
    if mine.arrays is not None:  # their contents are digests already
        yield from _told(splits, [(alike[val[i]][0], i) for i in judged])
        return
    judged.sort(key=lambda i: len(alike[val[i]]))  # sizes that few files have tell most
    until = time.monotonic() + seconds
    marked: dict[tuple[bytes, bytes], int] = {}
    pairs, looked = [], 0
    while looked < len(judged) and time.monotonic() < until:
        i = judged[looked]
        for j in alike.pop(val[i], ()):  # at the first image of this size
            if time.monotonic() < until:
                marked.setdefault((val[i], _ends(mine[j].image)), j)
        image = other[i].image
        mark = _ends(image)
        j = marked.get((val[i], mark))
        if mark and j is not None and _whole(mine[j].image) == _whole(image):
            pairs.append((j, i))
        looked += 1
    yield from _told(splits, pairs)
    if looked < len(judged):
        words = f"{looked:,} of {len(judged):,} validation images were compared with training images of equal size"
        yield Finding("sampled", words)


def _told(splits: Splits, pairs: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    mine, other = splits.train, splits.val
    if pairs:
        names = [name for j, i in pairs for name in (mine.samples.names[j], other.samples.names[i])]
        kind = "duplicate" if splits.drawn else "leak"
        words = f"{len(pairs):,} validation images are training images too, byte for byte"
        yield Finding(kind, f"{words}: the accuracy measured will be too good", names)
    labelled = [(j, i) for j, i in pairs if mine.targets[j] >= 0]
    unlike = [(j, i) for j, i in labelled if mine.classes[mine.targets[j]] != other.classes[other.targets[i]]]
    if unlike:
        names = [name for j, i in unlike for name in (mine.samples.names[j], other.samples.names[i])]
        yield Finding("contradiction", f"{len(unlike):,} of them have another label there", names)


def _ends(image: Source) -> bytes:
    """A digest of the first and the last bytes; empty where there is nothing to be read."""
    try:
        if not isinstance(image, Path):
            return _whole(image)
        size = image.stat().st_size
        with image.open("rb") as file:
            head = file.read(ENDS)
            file.seek(max(len(head), size - ENDS))
            return hashlib.blake2b(head + file.read(ENDS), digest_size=16).digest()
    except OSError:
        return b""


def _whole(image: Source) -> bytes:
    try:
        return hashlib.blake2b(read(image), digest_size=16).digest()
    except ImageError:
        return b""
