"""WebDataset shards: tar archives whose members of one key make a sample, found and listed by their headers alone."""

import itertools
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sightline.datasets.findings import Finding
from sightline.datasets.image_set import Names
from sightline.datasets.member import INDEXED, Bounds, Listing, Member
from sightline.datasets.naming import natural, some
from sightline.datasets.scan import CLUTTER, EXTENSIONS, Skipped, contents
from sightline.datasets.split import TRAINING, VALIDATION
from sightline.datasets.tarred import Plain, index_tar
from sightline.errors import UserError, printable

SUFFIX = ".tar"
"""What the name of a shard ends in."""

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""What the names of compressed shards end in, which are refused: no member of theirs can be reached by itself."""

MOST = 100_000
"""Shards that a pattern may stand for."""

PEEKED = 1_000
"""Members of a single archive by which it is told whether it is a shard."""

_PARTS = (*TRAINING, *VALIDATION)


@dataclass(frozen=True)
class ShardFiles:
    """The shards of a dataset by part, `all` where there is one part: their names relative to `home`.

    `source` is what the user called them, `notes` are about what else lies there.
    """

    source: str
    home: Path
    parts: Mapping[str, Sequence[str]]
    notes: Sequence[str] = ()
    findings: Sequence[Finding] = ()


class Entry(NamedTuple):
    """One sample: its key in the shard, its image and what it is called, and its other members by their kind.

    The kind of `a/b.seg.png`, whose key is `a/b`, is `seg.png`, in lower case.
    """

    name: str
    image: Member
    others: Mapping[str, Member]


@dataclass
class Met:
    """What was met in shards besides whole samples."""

    findings: list[Finding] = field(default_factory=list)
    hidden: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


class Shards(Mapping[str, Member]):
    """The images of shards by their names (the shard's, then their own), as columns, sorted by the bytes of names."""

    def __init__(self, home: Path, shards: Sequence[str], names: Sequence[str], rows: Int64[np.ndarray, "n 4"]):
        order = sorted(range(len(names)), key=lambda i: os.fsencode(names[i]))
        self.home, self.shards = str(home), tuple(shards)
        self.names, self._rows = Names(names[i] for i in order), rows[order]  # of each: shard, offset, size, checksum

    def __getitem__(self, name: str) -> Member:
        shard, offset, size, crc = self._rows[self.names.place(name)].tolist()
        whole = os.path.join(self.home, self.shards[shard])  # noqa: PTH118
        return Member(whole, name[len(self.shards[shard]) + 1 :], INDEXED, offset, size, size, crc)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# Which files


def find_shards(path: Path, kinds: Sequence[str] | None = None) -> ShardFiles | None:
    """The shards that a path means, None where it means something else.

    That is a folder with tar archives and without images, or one whose folders `train` and `val` are such; a pattern
    in braces, `a-{000..012}.tar` or `{a,b}.tar`; or a single archive that has images with members of these `kinds`
    beside them, where `kinds` are told. Shards whose names say `train` and `val` are these parts. Raises UserError for
    compressed shards, and for names of which only some say a part.
    """
    if os.path.isdir(path):  # noqa: PTH112  (False where a folder above is closed to us, not an exception)
        return _in_folder(path)
    if os.path.exists(path):  # noqa: PTH110
        return _single(path, kinds)
    names = _expanded(str(path))
    if len(names) < 2 or not all(name.lower().endswith((SUFFIX, *PACKED)) for name in names):
        return None
    _refuse_packed(str(path), names)
    if len({os.path.normpath(name) for name in names}) < len(names):
        raise UserError(f"{printable(path)} names a shard twice")
    home = os.path.commonpath([os.path.dirname(name) or "." for name in names]) if _alike(names) else ""  # noqa: PTH120
    shards = [os.path.relpath(name, home or ".") for name in names]
    return ShardFiles(str(path), Path(home), _parts(str(path), shards))


def _alike(names: Sequence[str]) -> bool:
    return len({os.path.isabs(name) for name in names}) == 1  # noqa: PTH117


def _expanded(text: str) -> list[str]:
    """What a pattern in braces stands for; the text alone where it is none. Raises UserError for too many."""
    choices = [
        _alternatives(piece, text) if i % 2 else [piece]
        for i, piece in enumerate(re.split(r"(\{[0-9]{1,18}\.\.[0-9]{1,18}\}|\{[^{}]*,[^{}]*\})", text))
    ]
    if math.prod(map(len, choices)) > MOST:
        raise UserError(f"{printable(text)} stands for more than {MOST:,} shards")
    return ["".join(pieces) for pieces in itertools.product(*choices)]


def _alternatives(braces: str, text: str) -> Sequence[str]:
    """What a pair of braces stands for: words, or numbers as wide as the ends of the range where one begins with 0."""
    if "," in braces:
        return braces[1:-1].split(",")
    first, last = braces[1:-1].split("..")
    count = int(last) - int(first) + 1
    if not 0 < count <= MOST:
        raise UserError(f"{printable(text)}: {braces} stands for no shards, or for more than {MOST:,}")
    padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]


def _in_folder(path: Path) -> ShardFiles | None:
    home = str(path)
    here = _tars(path)
    if here is None:
        return None
    if here.shards:
        inner = {name: _tars(path / name) for name in here.folders if name.casefold() in _PARTS}
        if also := [name for name, tars in inner.items() if tars is not None and tars.shards]:
            raise UserError(f"{printable(home)}: shards lie in it and in its folders {some(also)}: move some away")
        notes = [f"folders left out: {some(here.folders)}"] if here.folders else []
        shards = [*here.shards]
        _refuse_packed(home, shards)
        return ShardFiles(home, path, _parts(home, shards), [*notes, *here.notes], here.findings)
    parts: dict[str, list[str]] = {}
    notes, findings, unused = [], [], []
    for folder in here.folders:
        inner = _tars(path / folder) if folder.casefold() in _PARTS else None
        if inner is None or not inner.shards:
            unused.append(folder)
            continue
        part = "train" if folder.casefold() in TRAINING else folder.casefold()
        if part in parts:
            raise UserError(f"{printable(home)}: two folders for the part '{part}'")
        parts[part] = [f"{folder}/{name}" for name in inner.shards]
        _refuse_packed(home, parts[part])
        notes += inner.notes
        findings += inner.findings
    if not parts:
        return None
    if unused:
        notes.append(f"folders left out: {some(unused)}")
    if len(parts) == 1:
        parts = {"all": next(iter(parts.values()))}
    elif "train" not in parts:
        raise UserError(f"{printable(home)}: there are {some(parts)} but no folder 'train' with shards")
    return ShardFiles(home, path, parts, notes, findings)


class _Tars(NamedTuple):
    shards: list[str]
    folders: list[str]
    notes: list[str]
    findings: list[Finding]


def _tars(folder: Path) -> _Tars | None:
    """The shards right inside a folder and its folders; None where it holds images, or cannot be read."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries]
        plain = [name for name, _ in found if not name.startswith(".") and name.lower() not in CLUTTER]
        folders = sorted(name for name, inside in found if inside and name in plain)
        shards = [name for name in plain if name.lower().endswith((SUFFIX, *PACKED)) and name not in folders]
        if not shards:
            return _Tars([], folders, [], []) if not any(name.lower().endswith(EXTENSIONS) for name in plain) else None
        skipped = Skipped()
        if contents(str(folder), skipped, home=str(folder))[1] or any(_has_images(folder / name) for name in folders):
            return None
    except (OSError, UserError):
        return None
    links = sorted(skipped.outside)
    told = [Finding("outside-link", "links that lead out of the folder", links)] if links else []
    shards = sorted((name for name in shards if name in skipped.others), key=natural)
    others = [name for name in skipped.others if name not in shards]
    notes = Skipped(hidden=skipped.hidden, others=others, odd=skipped.odd, outside=links).notes()
    notes = [note.replace("being no image files", "being no shards") for note in notes]
    return _Tars(shards, folders, notes, told)


def _has_images(folder: Path) -> bool:
    return any(name.lower().endswith(EXTENSIONS) for _, _, names in os.walk(folder) for name in names)


def _single(path: Path, kinds: Sequence[str] | None) -> ShardFiles | None:
    name = path.name
    if not os.path.isfile(path) or not name.lower().endswith((SUFFIX, *PACKED)):  # noqa: PTH113
        return None
    if kinds is not None and (name.lower().endswith(PACKED) or not peek(path, unsure=True) & set(kinds)):
        return None
    _refuse_packed(str(path), [name])
    return ShardFiles(str(path), path.parent, {"all": [name]})


def _refuse_packed(source: str, names: Sequence[str]) -> None:
    packed = [name for name in names if name.lower().endswith(PACKED)]
    if packed:
        raise UserError(
            f"{printable(source)}: compressed shards cannot be read one sample at a time: {some(packed)}; decompress "
            "them (gunzip), images are compressed already"
        )


def _parts(source: str, shards: Sequence[str]) -> dict[str, list[str]]:
    """The shards of each part that their names tell; all in one where they tell none, or the same one."""
    told: dict[str, list[str]] = {}
    for name in shards:
        words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in _PARTS]
        part = next(iter(words), "")
        told.setdefault("train" if part in TRAINING else part, []).append(name)
    if len(told) == 1:
        return {"all": list(shards)}
    if "" in told or "train" not in told:
        without = some(told.get("", ())) if "" in told else "none is for training"
        what = f"no part stands in the names of {without}" if "" in told else without
        known = some(name for part, names in told.items() if part for name in names)
        raise UserError(
            f"{printable(source)}: {known} are named for a part, and {what}; name all shards for one, or none"
        )
    return told


# What is in them


class _Listed(Listing):
    """Every member of a shard, hidden ones excepted, in order."""

    def __init__(self, path: Path, bounds: Bounds):
        super().__init__(path, bounds)
        self.found: list[tuple[str, int, int, int]] = []
        self.faulty: list[tuple[str | None, str]] = []

    def refuse(self, reason: str, member: str | bytes | None = None) -> UserError:
        """Notes which member it is."""
        name = os.fsdecode(member) if isinstance(member, bytes) else member
        self.faulty.append((name, reason))
        return super().refuse(reason, member)

    def wants(self, plain: str) -> bool:
        if any(part.startswith(".") or part.lower() in CLUTTER for part in plain.split("/")):
            self.skipped.hidden += 1
            return False
        return True

    def add(self, plain: str, *, kind: int, offset: int, packed: int, size: int, crc: int) -> None:
        self.found.append((plain, offset, size, crc))


def entries(files: ShardFiles, shard: str, met: Met) -> Iterator[Entry]:
    """The samples of a shard in order of their first members; `met` gets what is no part of one."""
    path = files.home / shard
    listing = _Listed(path, Bounds(bytes=float("inf")))  # nothing is unpacked, and every image has its own limit
    complete = True
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block
            raise listing.refuse("it is not a regular file")
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise listing.refuse("it is compressed: decompress it (gunzip), images are compressed already")
            file.seek(0)
            _, complete = index_tar(Plain(file), os.fstat(file.fileno()).st_size, listing)
    except OSError as error:
        listing.refuse(f"cannot read the shard: {error.strerror or error}")
    except UserError:
        pass  # noted by the listing
    met.hidden += listing.skipped.hidden
    spoilt = {split_key(name)[0] for name, _ in listing.faulty if name is not None}
    for name, reason in listing.faulty:
        told = reason if name is None else f"it {reason}"
        met.findings.append(Finding("member", told, [shard if name is None else f"{shard}/{name}"]))
    groups: dict[str, dict[str, Member]] = {}
    for name, offset, size, crc in listing.found:
        key, kind = split_key(name)
        group = groups.setdefault(key, {})
        other = group.setdefault(kind, Member(str(path), name, INDEXED, offset, size, size, crc))
        if other.name != name:
            reason = f"its shard has '{printable(other.name)}' too, and the two differ in case alone"
            met.findings.append(Finding("member", reason, [f"{shard}/{name}"]))
            spoilt.add(key)
    if not complete and listing.found:
        spoilt.add(split_key(listing.found[-1][0])[0])  # the rest of it may be what was lost
    for key, group in groups.items():
        if key not in spoilt:
            yield from _entry(shard, group, met)


def _entry(shard: str, group: Mapping[str, Member], met: Met) -> Iterator[Entry]:
    images = [kind for kind in group if f".{kind}" in EXTENSIONS]
    others = {kind: member for kind, member in group.items() if kind not in images}
    for kind in others:
        met.kinds[kind] = met.kinds.get(kind, 0) + 1
    first = next(iter(group.values()))
    if len(images) == 1:
        yield Entry(f"{shard}/{group[images[0]].name}", group[images[0]], others)
    elif images:
        reason = f"two images have one key: {some(group[kind].name for kind in images)}"
        met.findings.append(Finding("member", reason, [f"{shard}/{group[kind].name}" for kind in images]))
    elif MEANT & others.keys() or any(f".{kind}".endswith(EXTENSIONS) for kind in others):
        names = [f"{shard}/{member.name}" for member in others.values()]
        reason = f"no image has the key '{printable(split_key(first.name)[0])}', which ends at the first dot"
        met.findings.append(Finding("missing-image", reason, names))


MEANT = frozenset({"cls", "txt", "json", "mask.png", "seg.png"})
"""Kinds of members that say something of an image."""


def split_key(name: str) -> tuple[str, str]:
    """The key of a member, its path up to the first dot of its file name, and its kind: what follows, in lower case."""
    folder, slash, own = name.rpartition("/")
    key, _, kind = own.partition(".")
    return f"{folder}{slash}{key}", kind.lower()


def kinds_in(path: Path) -> set[str] | None:
    """The kinds of members that stand beside images at the beginning of shards; None for what is no shard."""
    files = find_shards(path, tuple(MEANT))
    return None if files is None else peek(files.home / next(iter(files.parts.values()))[0])


class _Enough(Exception):  # noqa: N818
    pass


class _Peeked(_Listed):
    def tally(self, count: int) -> None:
        super().tally(count)
        if self.count > PEEKED:
            raise _Enough


def peek(path: Path, *, unsure: bool = False) -> set[str]:
    """The kinds of members that stand beside images in the first ones of an archive; none where it cannot be read.

    With `unsure` texts and JSON do not count where images lie in several folders, which may be classes.
    """
    listing = _Peeked(path, Bounds(bytes=float("inf")))
    try:
        with path.open("rb") as file:
            index_tar(Plain(file), os.fstat(file.fileno()).st_size, listing)
    except (_Enough, UserError, OSError):
        pass  # what was seen is judged
    members = [split_key(name) for name, *_ in listing.found]
    pictured = {key for key, kind in members if f".{kind}" in EXTENSIONS}
    found = {kind for key, kind in members if key in pictured}
    several = unsure and len({key.rpartition("/")[0] for key in pictured}) > 1
    return found & (MEANT - {"txt", "json"} if several else MEANT)
