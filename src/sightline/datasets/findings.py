"""What a check of a dataset has to say: each fault with its weight, the files concerned, and how to mend it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sightline.datasets.naming import some
from sightline.errors import printable

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# What can be found: how grave it is, what it is called over a list, and how it is mended.
KINDS: dict[str, tuple[Severity, str, str]] = {
    "unusable": ("error", "the data cannot be trained on", "mend what the message names"),
    "classes-differ": ("error", "classes that only some parts have", "give every part the same class folders"),
    "class-names": ("error", "class names that a file system could confuse, or that are no text", "merge or rename"),
    "unreadable-folder": ("error", "folders that cannot be read", "give yourself the right to read them"),
    "row": ("error", "rows of the table that cannot be meant", "correct or remove the rows"),
    "refused-share": ("error", "too many unreadable training images", "replace or remove the unreadable files"),
    "leak": ("error", "the same image in the training part and in another", "keep it in one part only"),
    "near-leak": (
        "error",
        "nearly the same image in the training part and in another",
        "look at them; keep copies of one picture in one part only",
    ),
    "caption": ("error", "captions that are empty, or no text in UTF-8", "write in UTF-8 what is to be seen"),
    "annotation": ("error", "annotations that cannot be meant", "correct or remove them"),
    "unknown-class": ("error", "classes that are not among the named ones", "name the class, or correct the number"),
    "member": ("error", "members of shards that cannot be meant", "pack the shard anew without what is named"),
    "missing-label": ("error", "images without what they are to be learned with", "add it, or remove the image"),
    "missing-image": ("error", "members of shards without their image", "add the image, or remove them"),
    "label": ("error", "labels that cannot be meant", "write a number or the name of a class"),
    "missing-mask": ("error", "images without a mask", "add the mask, or remove the image"),
    "mask-size": ("error", "masks of another size than their image", "look whether they belong together"),
    "mask": ("error", "masks that cannot be read", "write them as index PNG: one number for each pixel"),
    "empty-file": ("warning", "files of 0 bytes", "copy them again, or remove them"),
    "truncated": ("warning", "files that end too early", "copy them again, or remove them"),
    "over-limit": ("warning", "images over a limit", "shrink them, or raise the limit that the reason names"),
    "no-image": ("warning", "files whose content is no image that is read", "remove or convert them"),
    "unreadable": ("warning", "images that cannot be read", "replace or remove them"),
    "crash": ("warning", "images whose decoder crashed or never ended", "remove or re-encode them"),
    "no-regular-file": ("warning", "pipes, devices and links that lead nowhere", "remove them"),
    "outside-link": (
        "warning",
        "links that lead out of the folder, and are not followed",
        "copy the files, or allow it with SIGHTLINE_FOLLOW_LINKS=1",
    ),
    "mislabelled": ("warning", "images whose name ends as if they were of another format", "rename them"),
    "unnamed-image": ("warning", "images that are left out, their names not ending as images' do", "rename them"),
    "loose": ("warning", "images that are left out, being in no class folder", "move them into class folders"),
    "file-names": (
        "warning",
        "file names that differ only in case or in the coding of accents",
        "rename them: other file systems would keep only one",
    ),
    "formula": ("warning", "labels that a spreadsheet would compute", "rename the class"),
    "empty-class": ("warning", "classes without images", "fill or remove the folder"),
    "tiny-class": ("warning", "classes with very few training images", "add images, or merge classes"),
    "imbalance": (
        "warning",
        "classes of very unequal size",
        "add images of the small ones, or thin out the large ones",
    ),
    "box-outside": ("warning", "boxes that reach out of their image", "look at them; they are cut off at the edge"),
    "zero-area": ("warning", "boxes without area", "remove or correct them; they are left out"),
    "duplicate": ("warning", "the same image several times", "keep one of each"),
    "contradiction": ("warning", "the same image with different labels", "keep the right label only"),
    "near-duplicate": ("warning", "nearly the same image several times", "look at them, and keep one of each"),
    "near-contradiction": ("warning", "nearly the same image with different labels", "look at them, and relabel"),
    "shared": ("warning", "the same image in two parts that are not trained on", "keep it in one part only"),
    "blank": ("warning", "images of a single colour", "look whether they are meant"),
    "tiny-image": ("warning", "images far smaller than the others", "look whether they are thumbnails or icons"),
    "extreme-aspect": ("warning", "images far longer than wide, or wider than long", "look at them; crop them"),
    "suspicious-label": (
        "warning",
        "labels that the model's features contradict",
        "look at them, the first ones first",
    ),
    "large-image": ("note", "images far larger than the others", "shrink them, and reading is faster"),
    "orientation": ("note", "images that EXIF turns upright", "nothing: they are read upright everywhere"),
    "mode": ("note", "images that are converted to RGB", "nothing, if they are meant so"),
    "several-frames": ("note", "animations and documents of several pages", "nothing: the first frame counts"),
    "repeated-row": ("note", "rows that repeat another one", "nothing: the image counts once"),
    "unused-folder": ("note", "folders that are neither training nor validation part", "nothing, if it is meant"),
    "folder-like-image": ("note", "folders that are named like images", "nothing: their images are read"),
    "folder-loop": ("note", "links to folders that are read already", "nothing: they are not followed"),
    "hidden": ("note", "hidden files and system files", "nothing: they are left out"),
    "other-file": ("note", "files that are no images", "nothing: they are left out"),
    "sampled": ("note", "what was looked at in part only", "mend what was found; `sightline check` looks at more"),
}


@dataclass(frozen=True)
class Finding:
    """One fault or remark: `kind` is a key of `KINDS`, `reason` says what is the matter in words.

    `files` are the names in the set of what it concerns, `classes` the classes. Texts are as found: whoever prints them
    escapes them.
    """

    kind: str
    reason: str
    files: Sequence[str] = ()
    classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    @property
    def severity(self) -> Severity:
        """An error makes training wrong; a warning should be looked at; a note is good to know."""
        return KINDS[self.kind][0]

    @property
    def remedy(self) -> str:
        """How to mend it."""
        return KINDS[self.kind][2]

    def line(self) -> str:
        """One line for people, safe to print."""
        named = f" ({some(self.files, 4)})" if self.files else ""
        return f"{self.severity}: {printable(self.reason, 400)}{named}; {self.remedy}"

    def to_json(self) -> dict[str, Any]:
        """Its part of the document of `check --json`."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "reason": self.reason,
            "remedy": self.remedy,
            "files": list(self.files),
            "classes": list(self.classes),
        }


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """The gravest first, and within a kind as they were found."""
    places = {kind: (SEVERITIES.index(row[0]), i) for i, (kind, row) in enumerate(KINDS.items())}
    return sorted(findings, key=lambda finding: places[finding.kind])


def by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """The findings of each kind, the gravest kind first."""
    kinds: dict[str, list[Finding]] = {}
    for finding in ordered(findings):
        kinds.setdefault(finding.kind, []).append(finding)
    return kinds
