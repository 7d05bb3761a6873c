"""What OpenAPI says of the routes, in the form in which FastAPI takes it."""

from collections.abc import Sequence
from typing import Any

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
        }
    },
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_NO = {
    400: "The request is malformed.",
    401: "The key is missing or wrong.",
    403: "The request comes from a page of another origin.",
    404: "There is no such model.",
    408: "The request came too slowly.",
    413: "The request is too large.",
    415: "The body is of a kind that is not taken.",
    421: "The server does not answer under this name.",
    422: "A parameter, or every image, is at fault.",
    503: "Too much is asked at once, or the server is loading, or ending.",
}


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"description": _NO[status], "content": _json(_ERROR), **({"headers": _RETRY} if status == 503 else {})}
        for status in sorted({400, 401, 403, 408, 421, *statuses})
    }


_SCORE = {
    "type": "object",
    "required": ["label", "index", "score"],
    "properties": {
        "label": {"type": "string"},
        "index": {"type": "integer", "minimum": 0},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
    },
}
_RESULT = {
    "type": "object",
    "required": ["path"],
    "properties": {
        "path": {"type": "string"},
        "predictions": {"type": "array", "items": _SCORE},
        "error": {"type": "string", "description": "Why this image could not be read."},
        "explanation": {
            "type": "object",
            "description": (
                "Picture, rollout, attention of each layer and head, distances. Arrays have dtype, shape and base64 "
                "data; rows of attention are bytes, to be multiplied by scale/255."
            ),
        },
    },
}
_DOCUMENT = {
    "type": "object",
    "required": ["model", "task", "results"],
    "properties": {
        "model": {"type": "string"},
        "task": {"type": "string"},
        "results": {"type": "array", "items": _RESULT},
    },
}
_IMAGE = {"type": "string", "format": "binary"}
_TEXT = {"type": "string", "contentEncoding": "base64"}


def _body(**settings: Any) -> dict[str, Any]:
    named = {
        "type": "object",
        "required": ["data"],
        "properties": {"name": {"type": "string", "maxLength": 1024}, "data": _TEXT},
        "additionalProperties": False,
    }
    document = {
        "type": "object",
        "required": ["images"],
        "properties": {"images": {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, named]}}, **settings},
        "additionalProperties": False,
    }
    form = {
        "type": "object",
        "required": ["images"],
        "properties": {"images": {"type": "array", "minItems": 1, "items": _IMAGE}},
        "additionalProperties": False,
    }
    kinds = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
    content = {
        "multipart/form-data": {"schema": form},
        **_json(document),
        **{kind: {"schema": _IMAGE} for kind in kinds},
    }
    return {"required": True, "content": content}


_TOP = {"type": "integer", "minimum": 1, "maximum": 1_000_000}
_LAYERS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 10_000}}


def _parameter(name: str, schema: Any, words: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": words}


def _settings(models: Sequence[str], *more: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """What may be said beside the images: in the query, and in JSON."""
    model = {"type": "string", "enum": list(models)}
    parameters = [
        _parameter("top", _TOP, "How many classes an answer has."),
        _parameter("model", model, "Which model; the first where none is named."),
    ]
    return {"requestBody": _body(top=_TOP, model=model, **settings), "parameters": [*parameters, *more]}


_OK = "The document of `predict --json`; an image that could not be read has an error instead of predictions."


def predict(models: Sequence[str]) -> dict[str, Any]:
    """What is said of `/v1/predict` where these models are served."""
    return {
        "summary": "What is in images.",
        "responses": {200: {"description": _OK, "content": _json(_DOCUMENT)}, **_refusals(404, 413, 415, 422, 503)},
        "openapi_extra": _settings(models),
    }


def explain(models: Sequence[str]) -> dict[str, Any]:
    """What is said of `/v1/explain` where these models are served."""
    layers = _parameter("layers", {"type": "string", "pattern": r"^[0-9]{1,4}(,[0-9]{1,4})*$"}, "From 0, as in 0,5,11.")
    kind = _parameter("format", {"type": "string", "enum": ["json", "npz"]}, "npz: all arrays of one image.")
    content = {**_json(_DOCUMENT), "application/x-npz": {"schema": _IMAGE}}
    return {
        "summary": "What is in images, and where the model looked.",
        "responses": {200: {"description": _OK, "content": content}, **_refusals(404, 413, 415, 422, 503)},
        "openapi_extra": _settings(models, layers, kind, layers=_LAYERS),
    }


_STATUS = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}
MODELS: dict[str, Any] = {
    "summary": "Which models are served.",
    "responses": {200: {"description": "Their names, tasks and sizes.", "content": _json({"type": "object"})}}
    | _refusals(),
}
HEALTH: dict[str, Any] = {
    "summary": "Whether the server lives.",
    "responses": {200: {"description": "It lives.", "content": _json(_STATUS)}} | _refusals(),
}
READY: dict[str, Any] = {
    "summary": "Whether requests should be sent here.",
    "responses": {200: {"description": "They should.", "content": _json(_STATUS)}} | _refusals(503),
}
METRICS: dict[str, Any] = {
    "summary": "What has been done, for Prometheus.",
    "responses": {200: {"description": "Counters.", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    | _refusals(),
}
PAGE: dict[str, Any] = {
    "summary": "The web page.",
    "responses": {200: {"description": "HTML.", "content": {"text/html": {"schema": {"type": "string"}}}}}
    | _refusals(),
}
