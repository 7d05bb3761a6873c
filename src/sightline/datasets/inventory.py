"""What lies in a dataset, faults and all: where opening it would stop at the first, this goes on and names each."""

import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from sightline.datasets import sharded
from sightline.datasets.archive import SUFFIXES, archive_place
from sightline.datasets.findings import Finding
from sightline.datasets.folder import Folder, Place
from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.naming import natural, some
from sightline.datasets.open import open_dataset
from sightline.datasets.scan import CLUTTER, EXTENSIONS, Skipped, leads_out
from sightline.datasets.shards import MEANT, find_shards
from sightline.datasets.split import TRAINING, VALIDATION, Splits
from sightline.datasets.table import Row, read_rows
from sightline.errors import UserError, printable
from sightline.images.decode import FORMATS
from sightline.registry import table

WHOLE = "all"
"""What the one part of a dataset is called that has no parts of its own."""

SNIFFED = 1_000
"""Most files that are no images by name whose content is looked at."""


@dataclass
class Inventory:
    """The images of each part of a dataset with their labels, and what is wrong with its structure.

    Parts are named train, val, test, …, or `WHOLE`; `splits` is what training would read, None where it would refuse.
    Classes are in natural order of their names; an image without class has the index -1.
    """

    source: str
    parts: dict[str, ImageSet] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    splits: Splits | None = None

    @property
    def trained(self) -> str:
        """The part that is learned from."""
        return next((name for name in self.parts if name in TRAINING), WHOLE)


def take_stock(source: str | Path, *, seed: int = 0) -> Inventory:
    """Lists a dataset that may have faults. Raises UserError only where nothing is there to be listed."""
    path = Path(source)
    stock = Inventory(str(source))
    if (files := find_shards(path, tuple(MEANT))) is not None:
        stock.parts, stock.findings, stock.splits = sharded.stock(files, seed)
        stock.findings += _unlike_classes(stock.parts, stock.trained)
        stock.findings += _alike_files(name for part in stock.parts.values() for name in part.samples.names)
        return stock
    for recognised, listed in table("datasets", "STOCKS").values():
        if recognised(path):
            return _marked(stock, path, listed)
    folder = os.path.isdir(path)  # noqa: PTH112
    file = os.path.isfile(path)  # noqa: PTH113
    listing, archive = file and path.suffix.lower() == ".csv", file and path.name.lower().endswith(SUFFIXES)
    if folder:
        odd = _Oddities(path)
        odd.walk()
        _lay_out(_Open(path, odd.images), stock)
        stock.findings += odd.told()
    elif archive:
        _lay_out(archive_place(path), stock)
    elif listing:
        _list_table(path, stock)
    stock.findings += _unlike_classes(stock.parts, stock.trained)
    stock.findings += _alike_files(name for part in stock.parts.values() for name in part.samples.names)
    try:
        stock.splits = open_dataset(source, task=_task(str(source)), seed=seed)
    except UserError as fault:
        if not (folder or archive or listing):
            raise
        if not any(finding.severity == "error" for finding in stock.findings):
            stock.findings.append(Finding("unusable", str(fault)))
    if stock.splits is not None and not stock.parts:  # built in
        splits = stock.splits
        stock.parts = {WHOLE: splits.together()} if splits.drawn else {"train": splits.train, "val": splits.val}
    return stock


def _marked(stock: Inventory, path: Path, listed: Callable[[Path], Iterable[Any]]) -> Inventory:
    """The parts of a set whose images have marks, as the reader of its format lists them."""
    try:
        for part, images, findings in listed(path):
            stock.parts[WHOLE if part == "all" else part] = images
            stock.findings += findings
    except UserError as fault:
        stock.findings.append(Finding("unusable", str(fault)))
    stock.findings += _unlike_classes(stock.parts, stock.trained)
    return stock


def _task(source: str) -> str:
    """What a built-in set is opened for; any other has classes of images here."""
    return next(
        iter(table("datasets", "BUILTIN").get(source.removeprefix("builtin:").partition(":")[0], ("classify",)))
    )


class _Open(Folder):
    """A folder of which parts may be closed; the others are read all the same. `plain` are the images below it."""

    def __init__(self, root: Path, plain: Sequence[str]):
        super().__init__(root)
        self.plain = plain

    def contents(self, part: str, skipped: Skipped) -> tuple[list[str], list[str]]:
        try:
            return super().contents(part, skipped)
        except UserError:  # told by the walk
            return [], []

    def images_below(self, folder: str, skipped: Skipped) -> list[str]:
        try:
            return super().images_below(folder, skipped)
        except UserError:
            return [name for name in self.plain if name.startswith(folder)]


def _lay_out(place: Place, stock: Inventory) -> None:
    """The parts and classes of a folder or an archive, as `arrange` finds them, but whatever is wrong with them."""
    skipped, aside = Skipped(), Skipped()
    folders, loose = place.contents("", skipped)
    known = {_folded(name): name for name in folders}
    training = next((known[name] for name in TRAINING if name in known), None)
    judging = [known[name] for name in VALIDATION if name in known]
    if training is not None and not judging and place.contents(training, aside)[1]:
        training = None  # images right inside: a class of railway trains
    if training is None and (not judging or set(judging) != set(folders)):
        stock.parts[WHOLE] = _part(place, "", folders, skipped, stock)
    else:
        for part in ([training] if training else []) + judging:
            inside, images = place.contents(part, skipped)
            loose += [f"{part}/{name}" for name in images]
            stock.parts[_folded(part)] = _part(place, f"{part}/", inside, skipped, stock)
        if unused := [name for name in folders if name not in (training, *judging)]:
            reason = f"neither training nor validation part: {some(unused)}"
            stock.findings.append(Finding("unused-folder", reason, unused))
    if not any(len(images) for images in stock.parts.values()) and loose:  # no classes: look at what there is
        stock.parts = {WHOLE: ImageSet((), place.samples(Names(loose), np.full(len(loose), -1)))}
    elif loose:
        stock.findings.append(Finding("loose", f"in no class folder: {len(loose):,} images", sorted(loose)))
    if skipped.loops:
        stock.findings.append(Finding("folder-loop", f"{skipped.loops:,} links to folders that are read already"))


def _part(place: Place, below: str, folders: Sequence[str], skipped: Skipped, stock: Inventory) -> ImageSet:
    found = {folder: place.images_below(f"{below}{folder}/", skipped) for folder in folders}
    classes, problems = merged(found, f"{place.where}/{below}".rstrip("/"))
    stock.findings += problems
    files = {label: [name for folder in several for name in found[folder]] for label, several in classes.items()}
    names = Names(name for several in files.values() for name in several)
    return ImageSet(tuple(files), place.samples(names, _targets(files)))


class _Oddities:
    """What lies below a folder besides images; links to folders are not followed here."""

    def __init__(self, root: Path):
        self.root, self.home = root, os.path.realpath(root)
        self.bound = os.environ.get("SIGHTLINE_FOLLOW_LINKS") != "1"
        self.images: list[str] = []
        self.odd: dict[str, list[str]] = defaultdict(list)
        self.findings: list[Finding] = []

    def walk(self) -> None:
        """Looks at every name."""
        waiting = [""]
        while waiting:
            here = waiting.pop()
            try:
                with os.scandir(os.path.join(self.root, here)) as entries:  # noqa: PTH118
                    waiting += [f"{here}{name}/" for name in self._sort(here, entries)]
            except OSError as error:
                reason = f"cannot read the folder: {error.strerror or error}"
                self.findings.append(Finding("unreadable-folder", reason, [here or "."]))
        self.images.sort()

    def _sort(self, here: str, entries: Iterable[os.DirEntry]) -> Iterator[str]:
        for entry in entries:
            name, image = f"{here}{entry.name}", entry.name.lower().endswith(EXTENSIONS)
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                reason = f"a link that leads nowhere: {error.strerror or error}"
                self.findings.append(Finding("no-regular-file", reason, [name]))
                continue
            if entry.name.startswith(".") or entry.name.lower() in CLUTTER:
                self.odd["hidden"].append(name)
            elif self.bound and entry.is_symlink() and leads_out(entry.path, self.home):
                self.odd["outside-link"].append(name)
            elif stat.S_ISDIR(mode):
                if image:
                    self.odd["folder-like-image"].append(name)
                if not entry.is_symlink():
                    yield entry.name
            elif not stat.S_ISREG(mode):
                self.findings.append(Finding("no-regular-file", "a pipe, socket or device", [name]))
            elif image:
                self.images.append(name)
            else:
                self.odd["other-file"].append(name)

    def told(self) -> list[Finding]:
        """What was found."""
        others = self.odd["other-file"]
        self.odd["unnamed-image"] = [name for name in others[:SNIFFED] if _is_image(self.root / name)]
        self.odd["other-file"] = sorted(set(others) - set(self.odd["unnamed-image"]))
        for kind, words in (
            ("outside-link", "links that lead out of the folder"),
            ("unnamed-image", "images by content, but not by name"),
            ("other-file", "files that are no images by name"),
            ("hidden", "hidden files and folders"),
            ("folder-like-image", "folders named like images"),
        ):
            if names := sorted(self.odd[kind]):
                self.findings.append(Finding(kind, f"{len(names):,} {words}", names))
        return self.findings


def _list_table(file: Path, stock: Inventory) -> None:
    """The rows of a table that can be meant, by part; every other row is named."""
    faults: list[tuple[int, str]] = []
    rows: dict[str, Row] = {}
    where = printable(file)
    repeated, formulas = 0, set()
    try:
        for row in read_rows(file, faults):
            first = rows.setdefault(row.name, row)
            if (first.label, first.part) != (row.label, row.part):
                what = f"'{printable(row.name)}' stands differently in line {first.line}"
                faults.append((row.line, f"{where}, line {row.line}: {what}"))
            else:
                repeated += first is not row
            if row.label.startswith(("=", "@")):
                formulas.add(row.label)
    except UserError as fault:  # the table ends here
        faults.append((0, str(fault)))
    for row in list(rows.values()):
        if not os.path.isfile(file.parent / row.name):  # noqa: PTH113
            del rows[row.name]
            faults.append((row.line, f"{where}, line {row.line}: there is no such file: '{printable(row.name)}'"))
    stock.findings += [Finding("row", reason) for _, reason in sorted(faults)]
    if formulas:
        labels = sorted(formulas)
        stock.findings.append(Finding("formula", f"labels that begin like a formula: {some(labels)}", (), labels))
    if repeated:
        stock.findings.append(Finding("repeated-row", f"{repeated:,} rows name an image again"))
    parts = {row.part for row in rows.values()}
    for part in sorted(parts, key=lambda name: (name not in TRAINING, name)):
        found: dict[str, list[str]] = defaultdict(list)
        for row in sorted(row for row in rows.values() if row.part == part):
            found[row.label].append(row.name)
        names, problems = merged(found, printable(file))
        stock.findings += problems
        files = {label: [name for raw in several for name in found[raw]] for label, several in names.items()}
        samples = Samples(Names(name for several in files.values() for name in several), _targets(files), file.parent)
        stock.parts[part or WHOLE] = ImageSet(tuple(files), samples)


def merged(found: Iterable[str], where: str) -> tuple[dict[str, list[str]], list[Finding]]:
    """The names of classes in natural order with what they are called on disk, and what is wrong with them."""
    names: dict[str, list[str]] = defaultdict(list)
    folded: dict[str, list[str]] = defaultdict(list)
    findings = []
    for raw in sorted(found, key=natural):
        if any("\ud800" <= c <= "\udfff" for c in raw):
            reason = f"{where}: the class name '{printable(raw)}' is not valid UTF-8"
            findings.append(Finding("class-names", reason, (), (raw,)))
        names[unicodedata.normalize("NFC", raw)].append(raw)
        folded[_folded(raw)].append(raw)
    for several in folded.values():
        if len(several) > 1:
            told = ", ".join(f"'{printable(ascii(raw)[1:-1])}'" for raw in several)
            reason = f"{where}: the classes {told} differ only in case or in the coding of accents"
            findings.append(Finding("class-names", reason, (), tuple(several)))
    return dict(names), findings


def _targets(files: Mapping[str, Sequence[str]]) -> Int64[np.ndarray, " n"]:
    return np.repeat(np.arange(len(files)), [len(several) for several in files.values()]).astype(np.int64)


def _unlike_classes(parts: dict[str, ImageSet], trained: str) -> list[Finding]:
    """Where a part does not have the classes of the training part."""
    findings = []
    if trained not in parts:
        return findings
    learned = parts[trained].classes
    for name, images in parts.items():
        if name == trained or set(images.classes) == set(learned):
            continue
        missing, extra = (
            [c for c in learned if c not in images.classes],
            [c for c in images.classes if c not in learned],
        )
        gaps = [f"not in '{name}': {some(missing)}"] if missing else []
        gaps += [f"only in '{name}': {some(extra)}"] if extra else []
        alike = {_folded(c) for c in missing} & {_folded(c) for c in extra}
        hint = "; some differ only in case or in the coding of accents" if alike else ""
        findings.append(Finding("classes-differ", "; ".join(gaps) + hint, (), (*missing, *extra)))
    return findings


def _alike_files(names: Iterable[str]) -> list[Finding]:
    """Files of one folder that another file system would take for one."""
    alike: dict[str, list[str]] = defaultdict(list)
    firsts: dict[str, str] = {}
    for name in names:
        folder, _, own = name.rpartition("/")
        key = f"{folder}/{_folded(own)}"
        if (first := firsts.setdefault(key, name)) != name:
            alike[key] = alike[key] or [first]
            alike[key].append(name)
    reason = "these names differ only in case or in the coding of accents"
    return [Finding("file-names", reason, tuple(several)) for several in alike.values()]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _is_image(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            head = stream.read(32)
    except OSError:
        return False
    return any(known.begins(head) for known in FORMATS.values())
