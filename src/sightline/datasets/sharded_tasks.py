"""What each task reads beside the images of shards: classes, masks, boxes, captions."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from sightline.datasets.captions import LONGEST, Captions, caption_fault
from sightline.datasets.coco import Row, marked, take
from sightline.datasets.member import Member
from sightline.datasets.semantic import CLASSES, MaskFile, mask_faults, named_classes
from sightline.datasets.sharded import Content, Fault, Format, bytes_of, classes_among
from sightline.datasets.shards import Entry, ShardFiles
from sightline.errors import UserError, printable
from sightline.images.decode import ImageError, image_size

LABEL = 4_096
"""Most bytes of a label."""

DOCUMENT = 2**24
"""Most bytes of a JSON document about one image."""


class _Named(Format):
    """A format whose numbers may have names, in the `classes.txt` beside the shards."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the numbers from 0 on; none where there is no such file. Raises UserError."""
        return named_classes(self.files.home, 2**20) if (self.files.home / CLASSES).is_file() else ()


class Labels(_Named):
    """`KEY.cls`: one number, or the name of a class."""

    kinds = ("cls",)
    needs = "KEY.cls (a number, or the name of a class)"

    def read(self, entry: Entry) -> str | None:
        if "cls" not in entry.others:
            return None
        try:
            text = bytes_of(entry.others["cls"], LABEL, "label").decode("utf-8-sig").strip()
        except UnicodeDecodeError as fault:
            raise Fault("label", "its label is not UTF-8") from fault
        if not text:
            raise Fault("label", "its label is empty")
        if "\n" in text or "\0" in text:
            raise Fault("label", f"its label '{printable(text, 60)}' is more than one line, or no text")
        if re.fullmatch("-[0-9]+", text):
            raise Fault("label", f"its label is {printable(text, 30)}; numbers begin at 0")
        if not re.fullmatch("[0-9]+", text):
            if self.names and text not in self.names:
                raise Fault("unknown-class", f"its label '{printable(text, 60)}' does not stand in {CLASSES}")
            return text
        text = text.lstrip("0") or "0"
        if not self.names:
            return text
        if len(text) > 9 or int(text) >= len(self.names):
            count = len(self.names)
            raise Fault("unknown-class", f"its label is {printable(text, 30)}, and {CLASSES} names {count} from 0 on")
        return self.names[int(text)]

    def contents(self, parts: Mapping[str, Sequence[str]]) -> dict[str, Content]:
        found = classes_among(parts, (), printable(self.files.source))
        made = {}
        for part, labels in parts.items():
            number = {label: i for i, label in enumerate(found[part])}
            targets = np.array([number[label] for label in labels], dtype=np.int64)
            made[part] = Content(tuple(found[part].values()), targets, None)
        return made


class Masks(Format):
    """`KEY.mask.png` or `KEY.seg.png`: the number of a class for every pixel, named by `classes.txt`."""

    kinds = ("mask.png", "seg.png")
    needs = "KEY.mask.png or KEY.seg.png"
    lack = "missing-mask"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes. Raises UserError where they are not told."""
        return named_classes(self.files.home)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The number of each value."""
        return tuple(range(len(self.names)))

    def read(self, entry: Entry) -> Member | None:
        member = next((entry.others[kind] for kind in self.kinds if kind in entry.others), None)
        if member is not None and self.thorough:
            try:
                found = mask_faults(entry.image, MaskFile(member, self.places), entry.name)
            except UserError:  # without classes, which is said once, for all
                return member
            if found:
                self.findings += found
        return member

    def contents(self, parts: Mapping[str, Sequence[Member]]) -> dict[str, Content]:
        return {
            part: Content(self.names, None, [MaskFile(member, self.places) for member in members])
            for part, members in parts.items()
        }


class Boxes(_Named):
    """`KEY.json` with the annotations of its image, as COCO writes them."""

    kinds = ("json",)
    needs = "KEY.json with 'annotations'"

    def __init__(self, files: ShardFiles, *, thorough: bool = False):
        super().__init__(files, thorough=thorough)
        self.declared: set[str] = set()

    def read(self, entry: Entry) -> list[Row] | None:
        if "json" not in entry.others:
            return None
        document = _document(entry.others["json"], "annotation")
        document = {"annotations": document} if isinstance(document, list) else document
        annotations = document.get("annotations") if isinstance(document, dict) else None
        if annotations is None:
            return None
        if not isinstance(annotations, list) or not all(isinstance(row, dict) for row in annotations):
            raise Fault("annotation", "'annotations' of its JSON is not a list of objects")
        categories = self._categories(document)
        image = {"file_name": entry.name, **self._size(document, entry)}
        rows: dict[Any, list[Row]] = {0: []}
        for row in annotations:
            category = next((row[key] for key in ("category_id", "category", "category_name") if key in row), None)
            known = categories
            if not categories and isinstance(category, int | str) and category != "":
                known = {category: str(category)}  # nobody says which there are
            take({**row, "image_id": 0, "category_id": category}, {0: image}, known, rows, self.findings.append)
        return rows[0]

    @cached_property
    def _numbered(self) -> Mapping[int | str, str]:
        self.declared.update(self.names)
        return _by_name(dict(enumerate(self.names)))

    def _categories(self, document: Mapping[str, Any]) -> Mapping[int | str, str]:
        """The categories by ids and names: the document's own, or those in `classes.txt` from 0 on."""
        own = document.get("categories")
        if own is None:
            return self._numbered
        found: dict[int | str, str] = {}
        for row in own if isinstance(own, list) else [None]:
            key, name = (row.get("id"), row.get("name")) if isinstance(row, dict) else (None, None)
            if not isinstance(key, int | str) or not isinstance(name, str) or not name or key in found:
                raise Fault("annotation", "'categories' of its JSON is not a list of objects with an 'id' and a 'name'")
            found[key] = name
        self.declared.update(found.values())
        return _by_name(found)

    def _size(self, document: Mapping[str, Any], entry: Entry) -> Mapping[str, Any]:
        """Width and height where they are said; a check looks into the image itself otherwise."""
        several = document.get("images")
        if isinstance(several, list) and len(several) != 1:
            raise Fault("annotation", f"its JSON is about {len(several)} images, not about one")
        for said in (document, document.get("image"), several[0] if isinstance(several, list) else None):
            if isinstance(said, dict) and "width" in said and "height" in said:
                return {"width": said["width"], "height": said["height"]}
        if not self.thorough:
            return {}
        try:
            height, width = image_size(entry.image)
        except ImageError:
            return {}  # the image itself is told of elsewhere
        return {"width": width, "height": height}

    def contents(self, parts: Mapping[str, Sequence[list[Row]]]) -> dict[str, Content]:
        where = printable(self.files.source)
        told = {part: {row.category for rows in images for row in rows} for part, images in parts.items()}
        found = classes_among(told, self.declared, where)
        if not any(found.values()):
            raise UserError(f"{where}: no annotation has a category, so that there is nothing to tell apart")
        made = {}
        for part, images in parts.items():
            number = {name: i for i, name in enumerate(found[part])}
            made[part] = Content(tuple(found[part].values()), None, [marked(rows, number) for rows in images])
        return made


class Texts(Format):
    """`KEY.txt`, a caption; or the `caption` or `captions` of `KEY.json`."""

    kinds = ("txt", "json")
    needs = "KEY.txt (or 'caption' in KEY.json)"

    def read(self, entry: Entry) -> Captions | None:
        if "txt" in entry.others:
            data = bytes_of(entry.others["txt"], 4 * LONGEST + 3, "caption")
            captions = [data.decode("utf-8-sig", "surrogateescape")]
        elif "json" in entry.others:
            document = _document(entry.others["json"], "caption")
            told = document if isinstance(document, dict) else {}
            found = next((told[key] for key in ("caption", "captions") if key in told), None)
            if found is None:
                return None
            captions = found if isinstance(found, list) else [found]
        else:
            return None
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise Fault("caption", "the caption in its JSON is neither a text nor a list of texts")
        captions = list(dict.fromkeys(caption.strip() for caption in captions))
        for caption in captions:
            if (fault := caption_fault(caption)) is not None:
                raise Fault("caption", fault)
        return Captions(tuple(captions))

    def contents(self, parts: Mapping[str, Sequence[Captions]]) -> dict[str, Content]:
        return {part: Content((), None, list(captions)) for part, captions in parts.items()}


def _by_name(categories: Mapping[int | str, str]) -> Mapping[int | str, str]:
    return {**{name: name for name in categories.values()}, **categories}


def _document(member: Member, kind: str) -> Any:
    try:
        return json.loads(bytes_of(member, DOCUMENT, kind))
    except (ValueError, RecursionError) as fault:
        raise Fault(kind, f"its '{printable(member.name)}' is not valid JSON: {printable(fault, 100)}") from fault


SHARDED = {"classify": Labels, "segment": Masks, "clip": Texts, "detect": Boxes}
