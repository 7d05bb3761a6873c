"""The images of a request, from whichever body they come in: a form, JSON, or an image as it is."""

import asyncio
import base64
import binascii
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from sightline.errors import printable, suggest
from sightline.serving.rejection import ClientGone, Rejection

_KEYS = ("images", "top", "model", "layers")
_MEDIA = ("multipart/form-data", "application/json", "application/octet-stream")
_NAME = 1024
"""The longest name of an image."""
_SOON = 2**18
"""Bodies of more bytes are read by a thread, so that other requests do not wait for it."""


@dataclass
class Asked:
    """What a body holds: images with their names, and settings where it is JSON."""

    images: list[bytes]
    names: list[str]
    settings: Mapping[str, Any]


class Room:
    """The memory that requests may take up together, from their first byte until they are answered."""

    def __init__(self, most: int):
        self.most, self.taken = most, 0

    @contextmanager
    def hold(self) -> Generator[Callable[[int], None]]:
        """Gives a function that takes some bytes, all of which come back at the end; it raises Rejection when full."""
        held = 0

        def take(count: int) -> None:
            nonlocal held
            if self.taken + count > self.most:
                raise Rejection(503, "busy", "too much is being sent at once; try again later", retry_after=2)
            held += count
            self.taken += count

        try:
            yield take
        finally:
            self.taken -= held


async def read(request: Request, most_bytes: int, most_images: int, take: Callable[[int], None]) -> Asked:
    """The images of a request, whose bytes are taken from a `Room` as they come.

    Raises Rejection where the body is too large, holds none, too many, or something else; ClientGone where it breaks
    off.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    media = kind.decode("latin-1")
    if media not in _MEDIA and not media.startswith("image/"):
        raise Rejection(
            415,
            "media_type",
            "send images as multipart/form-data, as application/json with base64, or one with its own type",
        )
    body = await _all(request, most_bytes, take)

    def parse() -> Asked:
        if media == "application/json":
            return _from_json(body, most_images)
        if media == "multipart/form-data":
            return _from_form(body, options.get(b"boundary", b""), most_images)
        return Asked([body], ["image"], {})

    asked = parse() if len(body) < _SOON else await asyncio.to_thread(parse)
    if not asked.images:
        raise Rejection(422, "no_image", "the request holds no image")
    return asked


async def _all(request: Request, most: int, take: Callable[[int], None]) -> bytes:
    too_large = Rejection(413, "too_large", f"the request has more than {most:,} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large
            take(len(part))
            parts.append(part)
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(parts)


def _too_many(most: int) -> Rejection:
    return Rejection(413, "too_many_images", f"the request has more than {most} images")


def _from_json(body: bytes, most: int) -> Asked:
    # Counted before it is read: a text of nothing but brackets would take the parser very deep.
    if body.count(b"[") + body.count(b"{") > 8 * most + 64:
        raise Rejection(422, "json", "the JSON has too many lists and objects")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Rejection(400, "json", "the body is not JSON") from None
    if not isinstance(document, dict):
        raise Rejection(422, "json", 'the JSON has to be an object: {"images": ["…base64…"]}')
    for key in document:
        if key not in _KEYS:
            raise Rejection(422, "json", f"unknown key '{printable(key)}'.{suggest(key, _KEYS)}")
    rows = document.pop("images", None)
    if not isinstance(rows, list):
        raise Rejection(422, "json", "'images' has to be a list of base64 texts, or of objects with 'name' and 'data'")
    if len(rows) > most:
        raise _too_many(most)
    asked = Asked([], [], document)
    for i, row in enumerate(rows):
        name, data = ("image", row) if isinstance(row, str) else _named(row, i)
        try:
            asked.images.append(base64.b64decode(data, validate=True))
        except (binascii.Error, ValueError):
            raise Rejection(422, "base64", f"images[{i}] is not base64") from None
        asked.names.append(name)
    return asked


def _named(row: Any, i: int) -> tuple[str, str]:
    if isinstance(row, dict) and row.keys() <= {"name", "data"}:
        name, data = row.get("name", "image"), row.get("data")
        if isinstance(name, str) and isinstance(data, str) and len(name) <= _NAME:
            return name, data
    raise Rejection(422, "json", f"images[{i}] is neither a base64 text nor an object with 'name' and 'data'")


class _Form:
    """The files of a form, collected in memory while it is parsed."""

    def __init__(self, most: int):
        self.most = most
        self.asked = Asked([], [], {})
        self.field, self.value, self.headers = b"", b"", {}
        self.parts: list[bytes] = []
        self.name = ""
        self.whole = False

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self.begin,
            "on_header_field": self.header_field,
            "on_header_value": self.header_value,
            "on_header_end": self.header_end,
            "on_headers_finished": self.headers_finished,
            "on_part_data": lambda data, start, end: self.parts.append(data[start:end]),
            "on_part_end": self.end,
            "on_end": self.finish,
        }

    def begin(self) -> None:
        if len(self.asked.images) == self.most:
            raise _too_many(self.most)
        self.headers, self.parts = {}, []

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self.field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def header_end(self) -> None:
        self.headers[self.field.lower()] = self.value
        self.field = self.value = b""

    def headers_finished(self) -> None:
        _, said = parse_options_header(self.headers.get(b"content-disposition"))
        field = said.get(b"name", b"").decode("utf-8", "replace")
        if field not in ("images", "images[]"):
            raise Rejection(422, "form", f"the form has a field '{printable(field)}'; images are called 'images'")
        # Browsers and curl write names as they are, in UTF-8.
        name = said.get(b"filename", b"").decode("utf-8", "replace") or "image"
        if len(name) > _NAME:
            raise Rejection(422, "form", f"the name of an image is longer than {_NAME} characters")
        self.name = name

    def end(self) -> None:
        self.asked.images.append(b"".join(self.parts))
        self.asked.names.append(self.name)

    def finish(self) -> None:
        self.whole = True


def _from_form(body: bytes, boundary: bytes, most: int) -> Asked:
    if not boundary:
        raise Rejection(400, "form", "the form's content type has no boundary")
    form = _Form(most)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise Rejection(400, "form", "the form is not well-formed") from None
    if not form.whole:
        raise Rejection(400, "form", "the form breaks off before its end")
    return form.asked
