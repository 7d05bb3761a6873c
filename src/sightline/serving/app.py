"""The routes, and what OpenAPI says of them."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from sightline.errors import printable, suggest
from sightline.serving import openapi
from sightline.serving.batching import Desk
from sightline.serving.bodies import Asked, Room, read
from sightline.serving.gate import Gate
from sightline.serving.jobs import Reply
from sightline.serving.metrics import CONTENT_TYPE, Metrics
from sightline.serving.openapi import HEALTH, METRICS, MODELS, PAGE, READY
from sightline.serving.rejection import ClientGone, Rejection
from sightline.serving.settings import Settings

_PAGE = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
MOST_EXPLAINED = 8
"""The most images of a request whose explanations are wanted, each of which may be megabytes."""
_MOST_TOP = 1_000_000
_REQUESTS = 20
"""As many requests of the largest size may be in memory; of smaller ones, more."""


def make_app(desks: Mapping[str, Desk], settings: Settings, metrics: Metrics) -> Gate:
    """The application over some models by name, of which the first is asked where a request names none."""
    app = FastAPI(
        title="Sightline", version="1", description="Image models over HTTP.", docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip

    room = Room(_REQUESTS * settings.max_bytes)

    async def rejected(_request: Request, fault: Exception) -> Response:
        assert isinstance(fault, Rejection)
        return _reply(Reply(fault.status, fault.body()), fault.headers())

    async def no_route(_request: Request, fault: Exception) -> Response:
        assert isinstance(fault, HTTPException)
        no = Rejection(fault.status_code, "http", HTTPStatus(fault.status_code).phrase.lower())
        return _reply(Reply(no.status, no.body()), dict(fault.headers or {}))

    async def unforeseen(_request: Request, _fault: Exception) -> Response:
        no = Rejection(500, "unforeseen", "the request could not be answered; the server's log has the reason")
        return _reply(Reply(no.status, no.body()))

    app.add_exception_handler(Rejection, rejected)
    app.add_exception_handler(Exception, unforeseen)
    app.add_exception_handler(HTTPException, no_route)

    async def answer(request: Request, kind: str, parameters: Mapping[str, Any]) -> Reply:
        query = _query(request, parameters)
        with room.hold() as take:
            asked = await read(request, settings.max_bytes, settings.max_images, take)
            desk, header = _order(desks, kind, asked, query, parameters)
            return await _unless_gone(request, desk.ask(header, asked.images))

    @app.post("/v1/predict", **openapi.predict(list(desks)))
    async def predict(request: Request) -> Response:
        return _reply(await answer(request, "predict", {"top": 1, "model": None}))

    @app.post("/v1/explain", **openapi.explain(list(desks)))
    async def explain(request: Request) -> Response:
        parameters = {"top": 5, "model": None, "layers": None, "format": "json"}
        reply = await answer(request, "explain", parameters)
        if reply.status == 200 and reply.body.startswith(b"PK"):
            return Response(reply.body, media_type="application/x-npz")
        return _reply(reply)

    @app.get("/v1/models", **MODELS)
    async def models() -> Response:
        rows = [{"name": name, "ready": desk.ready, **_facts(desk.facts)} for name, desk in desks.items()]
        limits = {"images": settings.max_images, "explained": MOST_EXPLAINED, "bytes": settings.max_bytes}
        return _json({"models": rows, "limits": limits})

    @app.get("/healthz", **HEALTH)
    async def healthz() -> Response:
        return _json({"status": "alive"})

    @app.get("/readyz", **READY)
    async def readyz() -> Response:
        if gate.draining:
            raise Rejection(503, "draining", "the server is ending", retry_after=5)
        if not all(desk.ready for desk in desks.values()):
            raise Rejection(503, "loading", "a model is not loaded", retry_after=2)
        return _json({"status": "ready"})

    @app.get("/metrics", **METRICS)
    async def show_metrics() -> Response:
        for name, desk in desks.items():
            metrics.queued.labels(name).set(desk.queued)
            metrics.ready.labels(name).set(desk.ready)
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    for path, content in _page().items():
        _serve_page(app, path, content, PAGE)
    routes = {str(route.path) for route in app.routes if hasattr(route, "path")}
    gate = Gate(app, settings, metrics, routes)
    return gate


def _serve_page(app: FastAPI, path: str, content: tuple[bytes, str], said: Mapping[str, Any]) -> None:
    body, media = content

    async def page() -> Response:
        return Response(body, media_type=media, headers={"cache-control": "no-cache"})

    app.get(path, include_in_schema=path == "/", **said)(page)


def _page() -> dict[str, tuple[bytes, str]]:
    """The files of the page by their paths: read once, so that no path of a request reaches the disk."""
    found = {}
    for file in sorted(files("sightline.serving").joinpath("page").iterdir(), key=lambda file: file.name):
        name, _, kind = file.name.rpartition(".")
        if kind in _PAGE:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            found[path] = (file.read_bytes(), _PAGE[kind])
            assert name, "a file of the page has a name"
    return found


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("task", "labels", "parameters", "layers", "size", "pixels") if key in facts}


def _json(document: Any) -> Response:
    return _reply(Reply(200, json.dumps(document).encode() + b"\n"))


def _reply(reply: Reply, headers: Mapping[str, str] | None = None) -> Response:
    return Response(reply.body, reply.status, headers, media_type="application/json")


async def _unless_gone(request: Request, work: Any) -> Reply:
    """The answer, unless the client leaves before it is there; then the work is cancelled. Raises ClientGone."""
    answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGone
        return answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _query(request: Request, parameters: Mapping[str, Any]) -> dict[str, Any]:
    query: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name not in parameters:
            raise Rejection(422, "parameter", f"unknown parameter '{printable(name)}'.{suggest(name, parameters)}")
        if name in query:
            raise Rejection(422, "parameter", f"the parameter '{name}' stands there twice")
        query[name] = value
    return query


def _order(
    desks: Mapping[str, Desk], kind: str, asked: Asked, query: Mapping[str, Any], parameters: Mapping[str, Any]
) -> tuple[Desk, dict[str, Any]]:
    """Whom to ask, and for what: settings from the query and, in JSON, from the body."""
    for name in asked.settings:
        if name not in parameters:
            raise Rejection(422, "json", f"'{name}' is not for this route")
        if name in query:
            raise Rejection(422, "parameter", f"'{name}' stands in the query and in the body")
    given = {**parameters, **asked.settings, **query}
    name = next(iter(desks)) if given["model"] is None else given["model"]
    desk = desks.get(name) if isinstance(name, str) else None
    if desk is None:
        raise Rejection(404, "model", f"there is no model '{printable(name)}'; /v1/models lists them")
    header: dict[str, Any] = {"kind": kind, "names": asked.names}
    header["top"] = _whole(given["top"], "top", 1, _MOST_TOP)
    if kind == "explain":
        if len(asked.images) > MOST_EXPLAINED:
            raise Rejection(413, "too_many_images", f"more than {MOST_EXPLAINED} images cannot be explained at once")
        header["layers"] = _layers(given["layers"])
        header["format"] = given["format"]
        if given["format"] not in ("json", "npz"):
            raise Rejection(422, "parameter", "'format' is json or npz")
        if given["format"] == "npz" and len(asked.images) != 1:
            raise Rejection(422, "parameter", "format=npz takes one image")
    return desk, header


def _whole(value: Any, name: str, least: int, most: int) -> int:
    text = value if isinstance(value, str) else str(value) if type(value) is int else ""
    if text.isdecimal() and text.isascii() and len(text) < 20 and least <= int(text) <= most:
        return int(text)
    raise Rejection(422, "parameter", f"'{name}' has to be a whole number from {least} to {most}")


def _layers(value: Any) -> Sequence[int] | None:
    """Layers from 0, as text with commas or as a list."""
    if value is None:
        return None
    several = value.split(",") if isinstance(value, str) else value
    if not isinstance(several, list) or not 0 < len(several) <= 1000:
        raise Rejection(422, "parameter", "'layers' has to be numbers from 0, with commas between")
    return sorted({_whole(one, "layers", 0, 10_000) for one in several})
