"""`sightline serve`: a model over HTTP, and a page that shows what it sees."""

import argparse
import importlib.util
import json
import os
import sys
from typing import Any

from sightline.cli.options import add_device, add_fields, given
from sightline.errors import UserError, printable

SUMMARY = "Answer images over HTTP, and on a web page that shows where the model looks."
EXAMPLE = "sightline serve runs/photos --port 8000"


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    from sightline.serving.settings import Settings

    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="model directory, checkpoint, or hf:org/name; NAME=MODEL names it"
    )
    add_fields(parser, Settings)
    parser.add_argument(
        "--allow-host", action="append", metavar="NAME", help="a further name under which it may be asked"
    )
    parser.add_argument("--architecture", metavar="NAME", help="what a bare checkpoint is, where it cannot tell")
    add_device(parser)


def run(request: argparse.Namespace) -> int:
    """Serves until it is told to end."""
    needed = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"serving needs {' and '.join(missing)}: pip install 'sightline[serve]'")

    from sightline.serving.server import serve
    from sightline.serving.settings import Settings

    named = given(request, Settings)
    named.setdefault("api_key", os.environ.get("SIGHTLINE_API_KEY") or None)
    settings = Settings(**named, allow_hosts=tuple(request.allow_host or ()))
    models = named_models(request.models)
    options = {"architecture": request.architecture, "device": request.device, "precision": request.precision}

    def started(url: str) -> None:
        if request.json:
            print(json.dumps({"url": url, "models": list(models)}), flush=True)
        elif not request.quiet:
            served = ", ".join(map(printable, models))
            print(f"sightline: {served} at {url} (Ctrl-C ends)", file=sys.stderr, flush=True)

    serve(models, settings, options, started)
    return 0


def named_models(words: list[str]) -> dict[str, str]:
    """Sources by the names under which they are served: NAME=MODEL, or a model under its own. Raises UserError."""
    models: dict[str, str] = {}
    for word in words:
        name, _, source = word.rpartition("=") if not os.path.lexists(word) else (word, "", word)
        name = name or source
        if name in models:
            raise UserError(f"two models are called {printable(name)}; NAME=MODEL gives one another name")
        models[name] = source
    return models
