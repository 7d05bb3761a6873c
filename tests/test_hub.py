"""`hf:org/name` against a hub on the loopback interface that serves what huggingface_hub asks for."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from sightline.checkpoints.convert import convert
from sightline.checkpoints.directory import write_model
from sightline.checkpoints.load import load_bundle
from sightline.errors import UserError, WorkError
from sightline.images.preprocess import Preprocess
from sightline.network import create_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import json, sys
from sightline.checkpoints.load import load_bundle
from sightline.errors import UserError, WorkError
try:
    bundle = load_bundle(sys.argv[1])
    weight = bundle.network.state_dict()["head.classifier.weight"]
    print(json.dumps({"labels": bundle.labels, "sum": float(weight.double().sum()), "size": bundle.preprocess.size}))
except (UserError, WorkError) as fault:
    print(json.dumps({"refused": str(fault), "status": fault.status}))
"""


class Hub(BaseHTTPRequestHandler):
    """Files of `org/name` at one commit; every request is written down."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        owner, name, verb, revision, *rest = [*self.path.split("?")[0].strip("/").split("/"), "", "", "", ""]
        file = self.folder / "/".join(part for part in rest if part)
        if (owner, name, verb) != ("org", "name", "resolve"):
            return self.refuse("RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse("RevisionNotFound")
        if not file.is_file():
            return self.refuse("EntryNotFound")
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
        return None

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    handler = type("Handler", (Hub,), {"folder": tmp_path / "repository", "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def repository(tmp_path: Path) -> dict[str, object]:
    """A transformers directory with files that nobody needs; returns what a load has to find."""
    network = create_model(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=3, num_classes=3
    )
    torch.nn.init.normal_(network.head.classifier.weight)
    write_model(tmp_path / "ours", network, Preprocess((32, 32), resize="squash"), ("ant", "bee", "cat"))
    convert(tmp_path / "ours", "transformers", tmp_path / "repository")
    for spare in ("pytorch_model.bin", "tf_model.h5", "README.md"):
        (tmp_path / "repository" / spare).write_bytes(b"not needed")
    weight = network.head.classifier.weight.detach()
    return {"labels": ["ant", "bee", "cat"], "sum": float(weight.double().sum()), "size": [32, 32]}


def run(source: str, tmp_path: Path, server: ThreadingHTTPServer, **settings: str) -> dict[str, object]:
    """Loads in a process of its own: huggingface_hub reads its settings once, when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "SIGHTLINE_"))}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **settings}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, source], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout)


def test_only_what_is_needed_is_fetched_once_and_then_cached(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    expected, asked = repository(tmp_path), hub.RequestHandlerClass.asked
    assert run("hf:org/name", tmp_path, hub) == expected
    assert {line for line in asked if "/resolve/" not in line} == set()
    got = {line.rsplit("/", 1)[-1] for line in asked if line.startswith("GET")}
    assert got == {"config.json", "preprocessor_config.json", "model.safetensors"}
    asked.clear()
    assert run(f"hf:org/name@{COMMIT}", tmp_path, hub, SIGHTLINE_OFFLINE="1") == expected
    assert asked == []


@pytest.fixture
def online(hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ThreadingHTTPServer:
    """The hub as it is for this process, which has read its settings long before."""
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub tries again for half a minute
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return hub


@pytest.mark.parametrize("switch", ["SIGHTLINE_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_without_a_cache_says_so_and_asks_nobody(
    tmp_path: Path, online: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    repository(tmp_path)
    monkeypatch.setenv(switch, "1")
    with pytest.raises(UserError, match=r"^'org/[a-z-]*' is not in the cache, and downloads are forbidden"):
        load_bundle("hf:org/name")
    assert online.RequestHandlerClass.asked == []


def test_what_is_not_there_is_named(tmp_path: Path, online: ThreadingHTTPServer) -> None:
    repository(tmp_path)
    for source, said in [("hf:org/other", "no 'org/other'"), ("hf:org/name@v9", "no revision 'v9'")]:
        with pytest.raises(UserError, match=said):
            load_bundle(source)
    (tmp_path / "repository" / "model.safetensors").unlink()
    (tmp_path / "repository" / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_bundle("hf:org/name")


def test_shards_are_fetched_by_their_index(tmp_path: Path, online: ThreadingHTTPServer) -> None:
    expected = repository(tmp_path)
    folder = tmp_path / "repository"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(state)}
    for place in set(places.values()):
        save_file({name: state[name] for name in state if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    weight = load_bundle("hf:org/name").network.state_dict()["head.classifier.weight"]
    assert float(weight.double().sum()) == expected["sum"]


def test_a_hub_that_is_away_is_not_the_user_s_fault(tmp_path: Path, online: ThreadingHTTPServer) -> None:
    online.shutdown()
    online.server_close()
    with pytest.raises(WorkError, match="cannot reach the hub"):
        load_bundle("hf:org/name")


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:../../etc", "hf:a/b/c", "hf:org/name\n"])
def test_names_that_cannot_be_on_a_hub(source: str) -> None:
    with pytest.raises(UserError, match="hf:org/name"):
        load_bundle(source)
