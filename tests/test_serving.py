"""The server over HTTP: the same answers as `predict`, and what it does with clients that mean no good."""

import base64
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

import badinputs
from command import cli
from served import Served, base64_of, form, saved, serving
from sightline.explanation.rollout import flow
from sightline.model import load


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with a model and the kit of awkward files."""
    folder = tmp_path_factory.mktemp("serving")
    saved(folder / "model")
    badinputs.public(str(folder / "kit"))
    return folder


@pytest.fixture(scope="module")
def server(house):
    before = Path.cwd()
    os.chdir(house)
    try:
        with serving("model") as server:
            yield server
    finally:
        os.chdir(before)


def kit(house: Path, family: str, expect: str) -> list[Path]:
    items = json.loads((house / "kit/manifest.json").read_text())["items"]
    return [house / "kit" / i["path"] for i in items if (i["family"], i["expect"]) == (family, expect)]


class TestSameAnswers:
    def test_the_bytes_of_predict(self, server, house, monkeypatch):
        """Each file alone, and several in one request, good and bad."""
        monkeypatch.chdir(house / "kit/image")
        monkeypatch.setattr("sightline.model.load_bundle", _from(house))
        files = [Path(name) for name in ("ok_rgb.jpg", "exif_orientation_6.jpg", "gray16.png", "animated.gif")]
        for several in [*([file] for file in files), [*files, Path("truncated_50.jpg"), files[0]]]:
            said = cli("predict", "model", *several, "--json")
            told = server.form("/v1/predict", *several)
            assert (told.status, told.body) == (200, said.out.encode())
            assert told.headers["content-type"] == "application/json"
        said = cli("predict", "model", *files, "--json", "--top", 3)
        assert server.form("/v1/predict?top=3", *files).body == said.out.encode()

    def test_every_body_gives_the_same(self, server, house):
        file = house / "kit/image/ok_rgb.jpg"
        text = base64_of(file)
        rows = [
            server.form("/v1/predict", file),
            server.images("/v1/predict", {"images": [text]}),
            server.images("/v1/predict", {"images": [{"name": "ok_rgb.jpg", "data": text}], "top": 1}),
            server.ask("POST", "/v1/predict", file.read_bytes(), content_type="image/jpeg"),
        ]
        assert [row.status for row in rows] == [200] * 4
        results = [row.document["results"][0] for row in rows]
        assert [result["path"] for result in results] == ["ok_rgb.jpg", "image", "ok_rgb.jpg", "image"]
        assert all(result["predictions"] == results[0]["predictions"] for result in results)

    def test_what_else_is_asked_changes_no_bit(self, server, house):
        files = kit(house, "image", "accept")[:6]
        alone = {file: server.form("/v1/predict?top=3", file).body for file in files}
        wrong, threads = [], []

        def many(file: Path) -> None:
            bodies = (server.form("/v1/predict?top=3", file).body for _ in range(8))
            wrong.extend(body for body in bodies if body != alone[file])

        for file in files:
            threads.append(threading.Thread(target=many, args=(file,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_images_of_several_requests_together(self, house):
        """Where they are computed together, answers agree as closely as float32 can."""
        file = house / "kit/image/ok_rgb.jpg"
        other = house / "kit/image/ok_rgb.png"
        model = load(house / "model")
        expected = model.predict([file], top=3)[0]
        with serving(house / "model", "--batch-size", 8) as server:
            told: list[list[dict]] = []
            ask = [
                threading.Thread(
                    target=lambda: told.append(
                        server.form("/v1/predict?top=3", file, other).document["results"][0]["predictions"]
                    )
                )
                for _ in range(12)
            ]
            for thread in ask:
                thread.start()
            for thread in ask:
                thread.join()
            batches = server.ask("GET", "/metrics").body.decode()
        assert len(told) == 12
        for rows in told:
            assert [row["index"] for row in rows] == [score.index for score in expected.top]
            assert np.allclose([row["score"] for row in rows], [score.score for score in expected.top], atol=1e-6)
        assert _metric(batches, "sightline_batch_images_count") < 12  # some were computed together


def _from(house: Path):
    from sightline.checkpoints.load import load_bundle

    return lambda source, **settings: load_bundle(house / source, **settings)


def _metric(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line))


class TestExplain:
    def test_what_a_page_needs(self, server, house):
        file = house / "kit/image/exif_orientation_6.jpg"
        result = server.form("/v1/explain?top=2", file).document["results"][0]
        view = load(house / "model").explain(file)
        assert len(result["predictions"]) == 2
        sent = result["explanation"]
        assert (sent["original"], sent["query"]) == ({"width": 64, "height": 48}, "class token")
        assert [(g["rows"], g["columns"], g["prefix"]) for g in sent["layers"]] == [(3, 5, 1)] * 3
        assert np.allclose(_array(sent["rollout"]), view.rollout)
        assert np.allclose(sent["distance"], view.distance, atol=1e-3)
        for heads in sent["heads"]:
            cells, scale = _array(heads["cells"]), _array(heads["scale"])
            own = view.heads[heads["layer"]]
            assert cells.shape == (2, 16, 15)
            assert np.allclose(cells * scale[..., None] / 255, own[..., 1:], atol=own.max() / 500)
            assert np.allclose(_array(heads["prefix"]) / 255, own[..., :1], atol=1 / 500)
        through = np.eye(16, dtype=np.float32)
        for depth, maps in zip(sent["depths"], view.heads, strict=True):
            through = flow(torch.from_numpy(maps)[None])[0].numpy() @ through
            rows = _array(depth["cells"]) * _array(depth["scale"])[:, None] / 255
            assert np.allclose(rows, through[:, 1:], atol=1 / 400)
        assert np.allclose(_array(sent["positions"]) / 127.5 - 1, view.position_similarity, atol=1 / 127)
        assert np.allclose(_array(sent["colours"]["cells"]) / 255, view.colours, atol=1 / 500)
        assert sent["prefix"] == ["class token"]
        one = server.form("/v1/explain?layers=1", file).document["results"][0]["explanation"]
        assert [heads["layer"] for heads in one["heads"]] == [1]

    def test_arrays(self, server, house):
        file = house / "kit/image/ok_rgb.jpg"
        told = server.form("/v1/explain?format=npz", file)
        assert told.headers["content-type"] == "application/x-npz"
        with np.load(BytesIO(told.body)) as arrays:
            assert np.array_equal(arrays["heads"], load(house / "model").explain(file).heads)

    @pytest.mark.parametrize(
        ("query", "code"), [("layers=7", "not_possible"), ("layers=a", "parameter"), ("format=pdf", "parameter")]
    )
    def test_refusals(self, server, house, query, code):
        told = server.form(f"/v1/explain?{query}", house / "kit/image/ok_rgb.jpg")
        assert (told.status, told.code) == (422, code)


def _array(sent: dict) -> np.ndarray:
    kind = np.uint8 if sent["dtype"] == "uint8" else "<f4"
    return np.frombuffer(base64.b64decode(sent["data"]), kind).reshape(sent["shape"])


class TestBadRequests:
    def test_every_malformed_image_is_named(self, server, house):
        files = kit(house, "image", "reject")
        assert len(files) > 10
        for file in files:
            told = server.form("/v1/predict", file)
            assert (told.status, told.code) == (422, "unreadable_image"), file
            assert file.name in told.document["error"]["message"]
            assert told.document["results"][0]["error"].startswith("cannot decode: ")
            _leaks_nothing(told.body)

    def test_the_http_cases(self, server, house):
        for case in json.loads((house / "kit/http/cases.json").read_text()):
            if "drip" in case or case["name"] == "queue_overload":
                continue  # below
            body = case.get("utf8", "").encode()
            if "b64" in case:
                body = base64.b64decode(case["b64"])
            elif case.get("gen", "").startswith("json_nest"):
                body = b"[" * 20_000
            elif "gen" in case:
                body = bytes(21_000_000)
            try:
                told = server.ask(case["method"], case["path"], body, **case.get("headers", {}))
            except OSError:
                assert "closed" in case["expect"], case["name"]
                continue
            assert told.status in case["expect"], (case["name"], told)
            assert "access-control-allow-origin" not in told.headers
            assert told.status == 200 or told.code
            _leaks_nothing(told.body)

    @pytest.mark.parametrize(
        ("path", "document", "says"),
        [
            ("/v1/predict", {"images": []}, "no image"),
            ("/v1/predict", {"image": "x"}, "unknown key 'image'. Did you mean images?"),
            ("/v1/predict", {"images": ["?"]}, "images[0] is not base64"),
            ("/v1/predict", {"images": [{"path": "/etc/passwd"}]}, "images[0] is neither"),
            ("/v1/predict", {"images": "x"}, "'images' has to be a list"),
            ("/v1/predict", [], "has to be an object"),
            ("/v1/predict", {"images": ["AAAA"], "top": "many"}, "'top' has to be a whole number"),
            ("/v1/predict", {"images": ["AAAA"], "top": True}, "'top' has to be a whole number"),
            ("/v1/predict?tops=1", {"images": ["AAAA"]}, "unknown parameter 'tops'. Did you mean top?"),
            ("/v1/predict?top=1&top=2", {"images": ["AAAA"]}, "twice"),
            ("/v1/predict", {"images": ["AAAA"], "layers": [0]}, "not for this route"),
            ("/v1/predict?model=../../etc", {"images": ["AAAA"]}, "no model '../../etc'"),
            ("/v1/predict", {"images": ["AAAA"] * 33}, "more than 32 images"),
        ],
    )
    def test_what_is_wrong_is_said(self, server, path, document, says):
        told = server.images(path, document)
        assert 400 <= told.status < 500
        assert says in told.document["error"]["message"]

    def test_other_methods_and_paths(self, server):
        assert server.ask("GET", "/v1/predict").status == 405
        assert server.ask("GET", "/docs").status == server.ask("GET", "/page/../app.py").status == 404
        assert server.ask("HEAD", "/healthz")[::2] == (200, b"")
        assert server.ask("POST", "/v1/predict", b"x", content_type="text/plain").code == "media_type"

    def test_every_answer_carries_the_protecting_headers(self, server):
        for path in ("/", "/page/main.js", "/v1/models", "/nothing"):
            headers = server.ask("GET", path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "script-src 'self'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert "server" not in headers


def _leaks_nothing(body: bytes) -> None:
    for secret in (rb"0x[0-9a-f]{6,}", rb"Traceback", rb"/site-packages/", rb"/(home|root|tmp)/", rb"Pillow|torch"):
        assert not re.search(secret, body), body


class TestSlowClients:
    def test_heads_and_bodies_that_do_not_come(self, server):
        """Both at once, to save time; meanwhile others are answered."""
        where = ("127.0.0.1", server.port)
        with socket.create_connection(where) as head, socket.create_connection(where) as body:
            head.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-a: ")
            body.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
            body.sendall(b"Content-Length: 100000\r\n\r\nfew")
            began = time.monotonic()
            for client in (head, body):
                client.settimeout(15)
                told = client.recv(4096)
                assert told.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
                assert client.recv(1) == b""
                assert server.ask("GET", "/healthz").status == 200
            assert time.monotonic() - began < 15

    def test_long_heads(self, server):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-a: b\r\n" * 5000)
            assert client.recv(4096).startswith(b"HTTP/1.1 400 ")

    def test_bodies_over_the_limit(self, server):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
            client.sendall(head + b"Content-Length: 999999999999\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            chunk = b"f4240\r\n" + bytes(1_000_000) + b"\r\n"
            with pytest.raises(ConnectionError):  # nobody reads on
                client.sendall(60 * chunk)


class TestMetrics:
    def test_they_add_up(self, server, house):
        file = house / "kit/image/ok_rgb.jpg"
        before = server.ask("GET", "/metrics").body.decode()
        for _ in range(3):
            server.form("/v1/predict", file)
        server.ask("POST", "/v1/predict", b"x", content_type="text/plain")
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
            gone.sendall(b"Content-Length: 100\r\n\r\nfew")
            time.sleep(0.2)
        time.sleep(0.2)
        after = server.ask("GET", "/metrics").body.decode()

        def risen(name: str) -> float:
            return _metric(after, name) - _metric(before, name)

        outcomes = {o: rf'sightline_requests_total{{outcome="{o}",route="/v1/predict"}}' for o in _OUTCOMES}
        rises = {o: after.count(name) and _line(after, name) - _line(before, name) for o, name in outcomes.items()}
        assert rises == {"answered": 3, "refused": 1, "cancelled": 1, "failed": 0}
        # The one that shows the counters has begun, and is not yet answered.
        assert _metric(after, "sightline_received_total") == _metric(after, "sightline_requests_total") + 1
        assert risen("sightline_images_total") == 3

    def test_openapi_tells_every_route(self, server):
        document = server.ask("GET", "/openapi.json").document
        assert set(document["paths"]) == {
            *("/v1/predict", "/v1/explain", "/v1/models", "/healthz", "/readyz", "/metrics", "/"),
        }
        body = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
        assert {"multipart/form-data", "application/json"} < body.keys()


_OUTCOMES = ("answered", "refused", "cancelled", "failed")


def _line(text: str, start: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(start))


class Load(threading.Thread):
    """A client that asks again and again on one connection, and notes what came of it."""

    def __init__(self, server: Served, body: bytes):
        super().__init__()
        self.server, self.body, self.told, self.lost, self.ended = server, body, [], [], threading.Event()

    def run(self) -> None:
        kind = {"Content-Type": "multipart/form-data; boundary=cut"}
        while not self.ended.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
            try:
                connection.connect()
            except OSError:
                return  # the server no longer listens
            try:
                while not self.ended.is_set():
                    connection.request("POST", "/v1/predict?top=3", self.body, kind)
                    answer = connection.getresponse()
                    self.told.append((answer.status, answer.read()))
                    if answer.headers.get("connection") == "close":
                        break
            except (OSError, http.client.HTTPException) as fault:
                self.lost.append(fault)
            finally:
                connection.close()


class TestLife:
    def test_a_crash_a_new_model_and_the_end_under_load(self, tmp_path, house):
        """One server from beginning to end: nothing that it accepted is lost but what a killed process had."""
        folder = saved(tmp_path / "model")
        body = form(house / "kit/image/ok_rgb.jpg")
        with serving(f"m={folder}") as server:
            old = server.form("/v1/predict?top=3", house / "kit/image/ok_rgb.jpg").body
            clients = [Load(server, body) for _ in range(4)]
            for client in clients:
                client.start()
            time.sleep(0.3)
            (worker,) = server.workers()
            os.kill(worker, signal.SIGKILL)
            began = time.monotonic()
            assert _until(lambda: server.form("/v1/predict?top=3", house / "kit/image/ok_rgb.jpg").body == old)
            assert time.monotonic() - began < 30
            told = [told for client in clients for told in client.told]
            assert {status for status, _ in told} <= {200, 503}
            assert sum(status == 503 for status, _ in told) <= 8  # no more than it had
            assert all(b"worker_lost" in body for status, body in told if status == 503)

            (folder / "config.json").write_text("{}")  # a model that cannot be loaded changes nothing
            time.sleep(1.5)
            saved(folder, seed=1)
            assert _until(lambda: server.form("/v1/predict?top=3", house / "kit/image/ok_rgb.jpg").body != old)
            new = server.form("/v1/predict?top=3", house / "kit/image/ok_rgb.jpg").body
            assert json.loads(new)["results"][0]["predictions"][0]["score"] > 0

            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            ready = server.ask("GET", "/readyz")
            assert (ready.status, ready.code, ready.headers["connection"]) == (503, "draining", "close")
            for client in clients:
                client.join(20)
            assert server.process.wait(20) == 0
            err = server.process.stderr.read()
            assert "the old model stays" in err
            assert "m: loaded anew" in err
        assert not [fault for client in clients for fault in client.lost]
        bodies = [body for client in clients for status, body in client.told if status == 200]
        assert set(bodies) == {old, new}
        assert len(bodies) > 20


def _until(done, seconds: float = 40) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.1)
    return False
