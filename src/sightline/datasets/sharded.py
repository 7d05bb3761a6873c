"""Shards as samples: what lies beside the images is read for a task, every fault is gathered, and parts are told."""

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int64

from sightline.datasets.findings import Finding
from sightline.datasets.image_set import ImageSet, Marks, Names, Samples
from sightline.datasets.member import Member
from sightline.datasets.naming import class_names, some
from sightline.datasets.rows import TOLD, refuse, validation_among
from sightline.datasets.shards import Entry, Met, ShardFiles, Shards, entries
from sightline.datasets.split import TRAINING, Splits, hold_out
from sightline.errors import UserError, printable
from sightline.images.limits import Refusal
from sightline.registry import find, table

ALL = "all"
"""The one part of shards whose names tell none."""

HELD_OUT = 0.2
"""Share of images with labels that is set apart where they have no validation part of their own."""


class Fault(Exception):  # noqa: N818
    """Why what lies beside an image cannot be meant: a kind of finding, and the reason."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Content(NamedTuple):
    """What some images of one part are learned with: their classes, and an index of each image or its marks."""

    classes: tuple[str, ...]
    targets: Int64[np.ndarray, " n"] | None
    marks: list[Marks] | None


class Format(ABC):
    """What lies beside the images in shards, for one task; made for every reading.

    `thorough` asks for whatever a check wants to know and training would find out later. `numbers` are the samples that
    have been understood, `said` what is said of them, `lacking` those that have no member of these `kinds`.
    """

    kinds: ClassVar[tuple[str, ...]]
    needs: ClassVar[str]
    """What lies beside an image, for people."""
    lack = "missing-label"
    """The kind of finding that an image without it is."""

    def __init__(self, files: ShardFiles, *, thorough: bool = False):
        self.files, self.thorough = files, thorough
        self.numbers, self.said = array("q"), []
        self.lacking: list[str] = []
        self.findings: list[Finding] = []

    def meet(self, number: int, entry: Entry) -> None:
        """Takes one sample."""
        try:
            said = self.read(entry)
        except Fault as fault:
            self.findings.append(Finding(fault.kind, fault.reason, [entry.name]))
            return
        if said is None:
            self.lacking.append(entry.name)
        else:
            self.numbers.append(number)
            self.said.append(said)

    @abstractmethod
    def read(self, entry: Entry) -> Any:
        """What is said of an image, None where nothing is. Raises Fault where it cannot be meant."""

    @abstractmethod
    def contents(self, parts: Mapping[str, Sequence[Any]]) -> dict[str, Content]:
        """What is learned of the images of each part, the first of which is the one to learn from. Raises UserError."""


def bytes_of(member: Member, most: int, kind: str) -> bytes:
    """All of a small member. Raises Fault for one of more bytes than `most`, or that cannot be read."""
    if member.size > most:
        raise Fault(kind, f"its '{printable(member.name)}' has {member.size:,} bytes, over the limit of {most:,}")
    try:
        return member.read(most)
    except Refusal as fault:
        raise Fault("member", f"its '{printable(member.name)}': {fault}") from fault


def classes_among(parts: Mapping[str, Iterable[str]], declared: Iterable[str], where: str) -> dict[str, dict[str, str]]:
    """The classes of each part as found, with what they are called: all that are learned, then those of it alone.

    Raises UserError for names that a file system could confuse.
    """
    learned: dict[str, str] | None = None
    found = {}
    for part, names in parts.items():
        own = class_names({*names, *declared}, where)
        if learned is None:
            learned = own
        found[part] = {**learned, **own}
        class_names(found[part], where)
    return found


@dataclass
class Gathered:
    """All samples of shards: `part` is the number of each one's part, in the order of `files.parts`."""

    files: ShardFiles
    formats: Sequence[Format]
    met: Met
    names: list[str] = field(default_factory=list)
    part: array = field(default_factory=lambda: array("b"))
    columns: array = field(default_factory=lambda: array("q"))

    def shards(self) -> Shards:
        """The images, to be read."""
        rows = np.frombuffer(self.columns, dtype=np.int64).reshape(-1, 4)
        return Shards(self.files.home, [name for part in self.files.parts.values() for name in part], self.names, rows)

    def image_sets(self, content: Format | None) -> dict[str, ImageSet]:
        """The images of each part that a format has understood; without any format, all. Raises UserError."""
        count = len(self.names)
        numbers = np.arange(count) if content is None else np.array(content.numbers, dtype=np.int64)
        order = sorted(range(len(numbers)), key=lambda i: os.fsencode(self.names[numbers[i]]))
        places = np.array(self.part, dtype=np.int64)[numbers[order]]
        chosen = {part: np.array(order)[places == i] for i, part in enumerate(self.files.parts)}
        chosen = {part: rows.astype(np.int64) for part, rows in chosen.items()}
        learned = sorted(chosen, key=lambda part: part not in (*TRAINING, ALL))
        told: dict[str, Content] = {}
        if content is not None:
            told = content.contents({part: [content.said[i] for i in chosen[part].tolist()] for part in learned})
        stored, sets = self.shards(), {}
        for part, rows in chosen.items():
            classes, targets, marks = told.get(part, Content((), None, None))
            names = Names(self.names[i] for i in numbers[rows].tolist())
            targets = np.full(len(rows), -1, dtype=np.int64) if targets is None else targets
            sets[part] = ImageSet(classes, Samples(names, targets, self.files.home, stored=stored, marks=marks))
        return sets

    def notes(self, content: Format | None) -> list[str]:
        """What was left out, for people."""
        read = () if content is None else content.kinds
        left = {kind: count for kind, count in self.met.kinds.items() if kind not in read}
        told = [f"hidden members left out: {self.met.hidden:,}"] if self.met.hidden else []
        if left:
            kinds = some((f"{kind}: {count:,}" for kind, count in sorted(left.items(), key=lambda row: -row[1])), 8)
            told.append(f"members that are not read for this: {kinds}")
        warned = [finding for finding in (content.findings if content else ()) if finding.severity != "error"]
        told += [f"{some(finding.files)}: {finding.reason}" for finding in warned[:TOLD]]
        return told + ([f"and {len(warned) - TOLD:,} more such remarks"] if len(warned) > TOLD else [])


def gather(files: ShardFiles, formats: Sequence[Format]) -> Gathered:
    """Lists all shards, and lets the formats read what lies beside the images."""
    gathered = Gathered(files, formats, Met())
    place = 0
    for number, shards in enumerate(files.parts.values()):
        for shard in shards:
            for entry in entries(files, shard, gathered.met):
                for content in formats:
                    content.meet(len(gathered.names), entry)
                gathered.names.append(entry.name)
                gathered.part.append(number)
                gathered.columns.extend((place, entry.image.offset, entry.image.size, entry.image.crc))
            place += 1
    return gathered


def read_shards(files: ShardFiles, task: str, seed: int, held_out: float) -> Splits:
    """The images of shards with what a task learns of them.

    Raises UserError that names every member that cannot be meant, every image without what the task needs, and every
    member without its image.
    """
    content: Format = find("datasets", "SHARDED", task, "task that learns from shards")(files)
    gathered = gather(files, [content])
    refuse_faults(gathered, content)
    return divided(gathered, content, gathered.image_sets(content), seed, held_out)


def refuse_faults(gathered: Gathered, content: Format | None) -> None:
    """Raises UserError where something that was met is an error."""
    where = printable(gathered.files.source)
    findings = [*gathered.met.findings, *(content.findings if content is not None else ())]
    if content is not None and len(content.lacking) == len(gathered.names) > 0:
        found = some((f"KEY.{kind}" for kind in gathered.met.kinds), 8) or "nothing"
        plain = f"none of {len(gathered.names):,} images has what is to be learned beside it"
        told = "" if not findings else f"\n{_line(gathered.files, findings[0])}"
        raise UserError(f"{where}: {plain}: KEY.jpg (or .png, …) and {content.needs}; found with them: {found}{told}")
    if content is not None:
        findings += _lacking(content)
    errors = [finding for finding in findings if finding.severity == "error"]
    refuse([(i, _line(gathered.files, finding)) for i, finding in enumerate(errors)])
    if not gathered.names:
        count = sum(map(len, gathered.files.parts.values()))
        raise UserError(f"{where}: no images in {count:,} shards")


def _line(files: ShardFiles, finding: Finding) -> str:
    return f"{printable(f'{files.home}/{finding.files[0]}')}: {finding.reason}"


def _lacking(content: Format) -> list[Finding]:
    return [Finding(content.lack, f"beside it is no {content.needs}", [name]) for name in content.lacking]


def divided(
    gathered: Gathered, content: Format | None, sets: Mapping[str, ImageSet], seed: int, held_out: float
) -> Splits:
    """Training and validation part of image sets; a share is held out where there are no parts. Raises UserError."""
    files = gathered.files
    where, notes = printable(files.source), [*files.notes, *gathered.notes(content)]
    trained = ALL if ALL in sets else "train"
    told = sets[trained]
    classified = content is not None and told.samples.marks is None
    if classified and len(told.classes) < 2:
        raise UserError(f"{where}: all images have one class, {some(told.classes)}, and a classifier needs two")
    if trained == ALL:
        return hold_out(told, files.source, seed=seed, share=held_out, notes=notes)
    validation, left_out = validation_among(set(sets), f"{where}: the shards have no part")
    judged = sets[validation]
    if extra := [name for name in judged.classes if name not in told.classes]:
        raise UserError(f"{where}: classes in '{validation}' but none to learn: {some(extra)}")
    for part, images in ((trained, told), (validation, judged)):
        if not len(images):
            raise UserError(f"{where}: no images in the shards of '{part}'")
    if classified and (empty := [name for name, count in judged.counts().items() if not count]):
        notes.append(f"classes of '{validation}' without images: {some(empty)}")
    return Splits(told, judged, files.source, [*notes, *left_out])


class Stock(NamedTuple):
    """What a check learns of shards: the images of each part, what is wrong, and what training would read."""

    parts: dict[str, ImageSet]
    findings: list[Finding]
    splits: Splits | None


def stock(files: ShardFiles, seed: int) -> Stock:
    """Lists shards that may have faults, by whatever task can learn from what lies beside their images.

    Where several can, the images are shown as the first one has them, and the others' faults are told too.
    """
    formats: list[Format] = [made(files, thorough=True) for made in table("datasets", "SHARDED").values()]
    gathered = gather(files, formats)
    content = next((one for one in formats if one.said), None) or next((one for one in formats if one.findings), None)
    findings = [*files.findings, *gathered.met.findings]
    for one in formats:
        if one is content or one.said:
            findings += one.findings
    if content is not None:
        findings += _lacking(content)
    if gathered.met.hidden:
        findings.append(Finding("hidden", f"{gathered.met.hidden:,} hidden members"))
    read = {kind for one in formats if one.said for kind in one.kinds}
    left = [f"{kind} ({count:,})" for kind, count in gathered.met.kinds.items() if kind not in read]
    if left:
        findings.append(Finding("other-file", f"members that are not read: {some(left, 8)}"))
    sets, splits = {}, None
    try:
        sets = gathered.image_sets(content)
        if not gathered.names:
            raise UserError(f"no images in {sum(map(len, files.parts.values())):,} shards")
        if content is not None and not any(finding.severity == "error" for finding in findings):
            splits = divided(gathered, content, sets, seed, HELD_OUT)
    except UserError as fault:
        if not any(finding.severity == "error" for finding in findings):
            findings.append(Finding("unusable", str(fault)))
        sets = sets or gathered.image_sets(None)
    return Stock(sets, findings, splits)
