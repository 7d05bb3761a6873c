"""A labelled set of images, light enough for millions of files."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from sightline.images.decode import Stored


class Marks(ABC):
    """What is marked in an image beyond one class for all of it: boxes, a mask, a caption."""

    @abstractmethod
    def content(self) -> bytes:
        """Bytes that are equal where the marks are, as far as that is cheap to know; part of the fingerprint."""

    @abstractmethod
    def renumbered(self, places: Int64[np.ndarray, " k"]) -> "Marks":
        """The same marks where class i has become class `places[i]`."""


class Sample(NamedTuple):
    """One image: a file, a member of an archive, or pixels [h, w, 3]; what it is to be taken for; its name.

    That is the index of its class, -1 for none, or where the set has them the `Marks` in it.
    """

    image: Path | Stored | UInt8[np.ndarray, "h w 3"]
    target: Any
    name: str


class Names(Sequence[str]):
    """Many names in one block of memory: a fraction of a list of strings, and not copied when processes are forked."""

    def __init__(self, names: Iterable[str]):
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += os.fsencode(name)  # names that are not UTF-8 survive, as surrogate escapes
            ends.append(len(text))
        self._text, self._ends = bytes(text), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:  # ty: ignore[incompatible-method-override]  (no slices)
        i = range(len(self))[i]
        return os.fsdecode(self._text[self._ends[i] : self._ends[i + 1]])

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(self._text[start:end]) for start, end in pairwise(self._ends.tolist()))

    def place(self, name: str) -> int:
        """Where a name stands among names that are sorted by their bytes. Raises KeyError for no such name."""
        wanted, low, high = os.fsencode(name), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._text[self._ends[middle] : self._ends[middle + 1]] < wanted:
                low = middle + 1
            else:
                high = middle
        if low == len(self) or self._text[self._ends[low] : self._ends[low + 1]] != wanted:
            raise KeyError(name)
        return low


@dataclass(frozen=True, eq=False)
class Drawn(Sequence[UInt8[np.ndarray, "_ _ 3"]]):
    """Pixels that are drawn whenever they are asked for: `draw` makes those of each of `numbers`.

    `formula` stands for what is drawn: an equal formula draws equal pixels of an equal number.
    """

    draw: Callable[[int], UInt8[np.ndarray, "_ _ 3"]]
    numbers: Int64[np.ndarray, " n"]
    formula: str

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "_ _ 3"]:  # ty: ignore[incompatible-method-override]  (no slices)
        return self.draw(int(self.numbers[i]))


Arrays = Sequence[UInt8[np.ndarray, "_ _ 3"]]


def joined(parts: Sequence[Arrays | None]) -> Arrays | None:
    """The pixels of several sets of samples, which are all drawn by one formula, or none is; None without any."""
    drawn = [part for part in parts if isinstance(part, Drawn)]
    if drawn:
        assert len(drawn) == len(parts)
        assert len({part.formula for part in drawn}) == 1
        return replace(drawn[0], numbers=np.concatenate([part.numbers for part in drawn]))
    return [array for part in parts for array in part or ()] or None


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """Samples kept as columns: names, class indices, and the folder or archive of the files, or their pixels.

    `marks` are what is marked in each image; there are no class indices then (-1).
    """

    names: Sequence[str]
    targets: Int64[np.ndarray, " n"]
    root: Path = Path()
    arrays: Arrays | None = None
    stored: Mapping[str, Stored] | None = None
    marks: Sequence[Marks] | None = None

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.targets)
        assert self.marks is None or len(self.marks) == len(self.targets)
        assert self.arrays is None or len(self.arrays) == len(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> Sample:  # ty: ignore[incompatible-method-override]  (no slices)
        name = self.names[i]
        target = int(self.targets[i]) if self.marks is None else self.marks[i]
        if self.arrays is not None:
            return Sample(self.arrays[i], target, name)
        return Sample(self.root / name if self.stored is None else self.stored[name], target, name)

    def content(self, i: int, name: str) -> bytes:
        """Of sample i, called `name`: its file's size in bytes (-1 where it is gone), size and CRC-32, or a digest.

        Of a member of an archive the CRC-32 is known, of pixels the digest is computed, and for pixels that are drawn
        stands their formula.
        """
        if isinstance(self.arrays, Drawn):
            return f"{self.arrays.formula} {self.arrays.numbers[i]}".encode()
        if self.arrays is not None:
            return f"{self.arrays[i].shape} {hashlib.sha256(self.arrays[i].tobytes()).hexdigest()}".encode()
        if self.stored is not None:
            return self.stored[name].content
        try:
            return b"%d" % os.stat(os.path.join(self.root, name)).st_size  # noqa: PTH116, PTH118  (a Path costs more)
        except OSError:
            return b"-1"

    def select(self, rows: Int64[np.ndarray, " m"]) -> "Samples":
        """These rows alone, in the order given."""
        chosen = rows.tolist()
        if isinstance(self.arrays, Drawn):
            arrays: Arrays | None = replace(self.arrays, numbers=self.arrays.numbers[rows])
        else:
            arrays = None if self.arrays is None else [self.arrays[i] for i in chosen]
        marks = None if self.marks is None else [self.marks[i] for i in chosen]
        names = Names(self.names[i] for i in chosen)
        return Samples(names, self.targets[rows], self.root, arrays, self.stored, marks)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their classes: `classes[sample.target]` is the class of each sample, -1 for one without a label."""

    classes: tuple[str, ...]
    samples: Samples

    def __post_init__(self) -> None:
        targets = self.samples.targets
        assert not len(targets) or (targets.min() >= -1 and targets.max() < len(self.classes))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def targets(self) -> Int64[np.ndarray, " n"]:
        """The class index of each sample."""
        return self.samples.targets

    def counts(self) -> dict[str, int]:
        """Images per class, in the order of the classes."""
        counts = np.bincount(self.targets[self.targets >= 0], minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def select(self, rows: Int64[np.ndarray, " m"]) -> "ImageSet":
        """The set of these rows alone, with all classes."""
        return ImageSet(self.classes, self.samples.select(rows))

    def joined(self, other: "ImageSet") -> "ImageSet":
        """The images of both sets, which have the same classes and lie in the same place."""
        assert self.classes == other.classes
        mine, theirs = self.samples, other.samples
        assert mine.root == theirs.root
        assert mine.stored is theirs.stored
        arrays = None if mine.arrays is None or theirs.arrays is None else joined([mine.arrays, theirs.arrays])
        names = Names([*mine.names, *theirs.names])
        targets = np.concatenate([mine.targets, theirs.targets])
        marks = None if mine.marks is None or theirs.marks is None else [*mine.marks, *theirs.marks]
        return ImageSet(self.classes, Samples(names, targets, mine.root, arrays, mine.stored, marks))

    def renumbered(self, classes: tuple[str, ...]) -> "ImageSet":
        """The same images with the same classes in another order."""
        assert set(classes) == set(self.classes)
        if classes == self.classes:
            return self
        places = np.array([classes.index(name) for name in self.classes], dtype=np.int64)
        if self.samples.marks is not None:
            marks = [marks.renumbered(places) for marks in self.samples.marks]
            return ImageSet(classes, replace(self.samples, marks=marks))
        return ImageSet(classes, replace(self.samples, targets=places[self.targets]))

    def unlabelled(self) -> "ImageSet":
        """The same images without classes."""
        return ImageSet((), replace(self.samples, targets=np.full(len(self), -1, dtype=np.int64)))

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of what the set consists of, wherever it lies.

        It covers the classes and their order, and of each sample in turn the name, the class and the content as far as
        that is cheap to know: pixels of arrays, sizes and checksums of what lies in an archive, but only the sizes of
        files, in bytes (-1 where a file is gone).
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for i, (name, target) in enumerate(zip(self.samples.names, self.targets.tolist(), strict=True)):
            digest.update(b"\n%b\0%d\0%b" % (os.fsencode(name), target, self.samples.content(i, name)))
            if self.samples.marks is not None:
                digest.update(b"\0%b" % self.samples.marks[i].content())
        return digest.hexdigest()


def unlabelled(files: Sequence[Path]) -> ImageSet:
    """A set of files without classes, in the order given: what prediction and self-supervised training read."""
    return ImageSet((), Samples(Names(map(str, files)), np.full(len(files), -1)))
