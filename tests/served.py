"""A server in a process of its own, and what is asked of it."""

import base64
import http.client
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch

from command import started
from sightline.images.preprocess import Preprocess
from sightline.model import Model
from sightline.network import create_model


def saved(folder: Path, *, seed: int = 0, labels: tuple[str, ...] = ("cat", "dog", "<b>bird</b>")) -> Path:
    """A small model with random weights, of which every one matters, on a grid of unequal primes: 3 rows, 5 columns."""
    torch.manual_seed(seed)
    small = {"embed_dim": 24, "depth": 3, "num_heads": 2, "image_size": (48, 80)}
    network = create_model("vit_tiny_patch16_224", num_classes=len(labels), **small)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Model(network, Preprocess(size=(48, 80)), labels).save(folder)


class Told(NamedTuple):
    """An answer over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> dict:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.document["error"]["code"]


class Served(NamedTuple):
    """A running server."""

    process: subprocess.Popen
    url: str

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Told:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Told(answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def form(self, path: str, *files: Path) -> Told:
        """Images as a form sends them."""
        return self.ask("POST", path, form(*files), content_type="multipart/form-data; boundary=cut")

    def images(self, path: str, document: object) -> Told:
        """A JSON document."""
        return self.ask("POST", path, json.dumps(document).encode(), content_type="application/json")

    def workers(self) -> list[int]:
        """The processes that compute: grandchildren, for one between forks them."""
        return [pid for child in _children(self.process.pid) for pid in _children(child)]


def form(*files: Path) -> bytes:
    parts = [
        b'--cut\r\nContent-Disposition: form-data; name="images"; filename="%s"\r\nContent-Type: image/x\r\n\r\n%s\r\n'
        % (os.fsencode(file.name), file.read_bytes())
        for file in files
    ]
    return b"".join([*parts, b"--cut--\r\n"])


def base64_of(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = entry.read_bytes()
        except OSError:
            continue
        if int(text.rpartition(b")")[2].split()[1]) == parent:
            found.append(int(entry.parent.name))
    return found


@contextmanager
def serving(*words: object, **environment: str) -> Iterator[Served]:
    """A server on a free port, ready; it has to end well."""
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    process = started("serve", *words, "--port", 0, "--json", env=settings)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield Served(process, json.loads(line)["url"])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err, err
