"""The server over HTTP: the same answers as `predict`, and what it does with clients that mean no good."""

import asyncio
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
from command import cli, refusal
from served import Served, base64_of, form, saved, serving
from sightline.cli.serve import named_models
from sightline.errors import UserError
from sightline.explanation.rollout import flow
from sightline.model import load
from sightline.serving.app import make_app
from sightline.serving.batching import Desk
from sightline.serving.bodies import Room, _from_form, _from_json
from sightline.serving.guard import Guarded
from sightline.serving.metrics import Metrics
from sightline.serving.rejection import Rejection
from sightline.serving.settings import Settings


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

    @pytest.mark.parametrize(
        ("body", "boundary"),
        [
            (b"", b""),
            (b"nothing", b"cut"),
            (b'--cut\r\nContent-Disposition: form-data; name="images"\r\n\r\nx', b"cut"),
            (b'--cut\r\nContent-Disposition: form-data; name="other"\r\n\r\nx\r\n--cut--\r\n', b"cut"),
            (b"--cut\r\n" + b"a: b\r\n" * 99 + b"\r\nx\r\n--cut--\r\n", b"cut"),
            (b"--cut\r\na" + b"b" * 99_999 + b": c\r\n\r\nx\r\n--cut--\r\n", b"cut"),
            (b'--cut\r\nContent-Disposition: form-data; name="images"\r\n\r\nx\r\n' * 5 + b"--cut--\r\n", b"cut"),
        ],
    )
    def test_malformed_forms(self, body, boundary):
        with pytest.raises(Rejection) as no:
            _from_form(body, boundary, 4)
        assert 400 <= no.value.status < 500

    def test_json_of_brackets_is_not_parsed(self):
        with pytest.raises(Rejection, match="too many lists"):
            _from_json(b'{"images":' + b"[" * 500, 4)

    def test_forms_keep_names_and_bytes(self, tmp_path):
        names = ["ünï côdé.jpg", "a b.png", "--cut.gif"]
        for i, name in enumerate(names):
            (tmp_path / name).write_bytes(bytes(range(256)) * i + b"\r\n--cut\r\n--cu"[: 6 * i])
        asked = _from_form(form(*(tmp_path / name for name in names[:2])), b"cut", 4)
        assert asked.names == names[:2]
        assert asked.images == [(tmp_path / name).read_bytes() for name in names[:2]]

    def test_other_methods_and_paths(self, server):
        assert server.ask("GET", "/v1/predict").status == 405
        assert server.ask("GET", "/docs").status == server.ask("GET", "/page/../app.py").status == 404
        assert server.ask("HEAD", "/healthz")[::2] == (200, b"")
        assert server.ask("POST", "/v1/predict", b"x", content_type="text/plain").code == "media_type"


def _leaks_nothing(body: bytes) -> None:
    for secret in (rb"0x[0-9a-f]{6,}", rb"Traceback", rb"/site-packages/", rb"/(home|root|tmp)/", rb"Pillow|torch"):
        assert not re.search(secret, body), body


class TestWhoMayAsk:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"host": "evil.example"}, 421),
            ({"host": "localhost.evil.example"}, 421),
            ({"host": "8.8.8.8"}, 421),
            ({"host": "a@localhost"}, 421),
            ({"host": "LOCALHOST:99"}, 200),
            ({"host": "[::1]:8000"}, 200),
            ({"host": "localhost:80", "origin": "http://localhost:80"}, 200),
            ({"host": "localhost:80", "origin": "http://localhost:81"}, 403),
            ({"host": "localhost", "origin": "null"}, 403),
            ({"host": "localhost", "origin": "https://evil.example"}, 403),
            ({"host": "localhost", "sec_fetch_site": "cross-site"}, 403),
            ({"host": "localhost", "sec_fetch_site": "same-origin"}, 200),
            (
                {
                    "host": "localhost",
                    "sec_fetch_site": "cross-site",
                    "sec_fetch_mode": "navigate",
                    "sec_fetch_dest": "document",
                },
                200,
            ),
            (
                {
                    "host": "localhost",
                    "sec_fetch_site": "cross-site",
                    "sec_fetch_mode": "navigate",
                    "sec_fetch_dest": "iframe",
                },
                403,
            ),
        ],
    )
    def test_hosts_and_origins(self, headers, status):
        gate = make_app({}, Settings(), Metrics())
        assert _asgi(gate, "/v1/models", **headers) == status

    def test_every_route_but_one_needs_the_key(self):
        key = "0123456789abcdef"
        settings = Settings(host="0.0.0.0", api_key=key)
        gate = make_app({}, settings, Metrics())
        assert {"/", "/v1/predict", "/v1/explain", "/v1/models", "/metrics", "/readyz", "/openapi.json"} < gate.routes
        basic = "Basic " + base64.b64encode(f"me:{key}".encode()).decode()
        for path in gate.routes:
            statuses = [_asgi(gate, path), _asgi(gate, path, authorization=f"Bearer {key[:-1]}x")]
            assert statuses == ([200] * 2 if path == "/healthz" else [401] * 2), path
            for headers in ({"authorization": f"Bearer {key}"}, {"authorization": basic}, {"x-api-key": key}):
                assert _asgi(gate, path, **headers) not in (401, 403), path

    def test_other_machines_need_a_key(self, house, monkeypatch):
        monkeypatch.delenv("SIGHTLINE_API_KEY", raising=False)
        assert "SIGHTLINE_API_KEY" in refusal("serve", house / "model", "--host", "0.0.0.0")
        assert "16 characters" in refusal("serve", house / "model", "--api-key", "short")

    def test_names_that_are_allowed(self):
        gate = make_app({}, Settings(allow_hosts=("photos.example",)), Metrics())
        assert _asgi(gate, "/healthz", host="photos.example:8000") == 200
        assert _asgi(gate, "/healthz", host="other.example") == 421

    def test_every_answer_carries_the_protecting_headers(self, server):
        for path in ("/", "/page/main.js", "/v1/models", "/nothing"):
            headers = server.ask("GET", path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "script-src 'self'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert "server" not in headers

    def test_the_page_asks_nobody_else(self):
        folder = Path(make_app.__code__.co_filename).parent / "page"
        assert len(list(folder.iterdir())) > 6
        for file in folder.iterdir():
            text = file.read_text()
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), file
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), file


def _asgi(app, path: str, **headers: str) -> int:
    """The status of one request, without a server."""
    named = {"host": "localhost"} | {name.replace("_", "-"): value for name, value in headers.items()}
    pairs = [(name.encode(), value.encode()) for name, value in named.items()]
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    more = {"headers": pairs, "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("x", 1)}
    asyncio.run(app({**scope, **more}, receive, send))
    return sent[0]["status"]


class TestRequests:
    def test_names_of_models(self, tmp_path):
        (tmp_path / "a=b").mkdir()
        words = ["runs/a", "pets=runs/b", str(tmp_path / "a=b")]
        assert named_models(words) == {"runs/a": "runs/a", "pets": "runs/b", words[2]: words[2]}
        with pytest.raises(UserError, match="two models are called a"):
            named_models(["a", "a=b"])

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("gone",), "no file or folder"),
            (("{model}", "--queue", 0), "--queue has to be at least 1"),
            (("{model}", "--deadline", -1), "--deadline has to be positive"),
            (("{model}", "--port", 99999), "--port has to be at most 65535"),
            (("{model}", "--device", "abacus"), "no device 'abacus'"),
        ],
    )
    def test_refusals(self, house, words, says, monkeypatch):
        monkeypatch.chdir(house)
        words = [str(word).format(model="model") for word in words]
        assert says in refusal("serve", *words, *(() if "--port" in words else ("--port", 0)))

    def test_a_port_that_is_taken(self, house):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            assert "--port chooses another" in refusal("serve", house / "model", "--port", taken.getsockname()[1])


class TestQueue:
    """The queue before a process that is never free, without a process."""

    def run(self, test, **settings) -> None:
        async def whole():
            desk = Desk("m", "nowhere", {}, Settings(**settings), Metrics())
            await test(desk)

        asyncio.run(whole())

    def ask(self, desk: Desk, images: int = 1):
        return asyncio.ensure_future(desk.ask({"kind": "predict", "names": [], "top": 1}, [b"x"] * images))

    def test_it_is_bounded_by_number(self):
        async def test(desk):
            taken = [self.ask(desk, 2), self.ask(desk, 3)]
            await asyncio.sleep(0)
            with pytest.raises(Rejection) as no:
                await desk.ask({"kind": "predict"}, [b"x"] * 2)
            assert (no.value.status, no.value.code) == (503, "busy")
            assert no.value.headers() == {"retry-after": "1"}
            for task in taken:
                task.cancel()
            await asyncio.gather(*taken, return_exceptions=True)
            assert desk.queued == len(desk.waiting) == 0  # whoever leaves takes no place

        self.run(test, queue=6)

    def test_it_is_bounded_by_time(self):
        async def test(desk):
            desk.rates = {"predict": 2.5}
            first = self.ask(desk, 3)
            await asyncio.sleep(0)
            assert desk.wait() == 7.5
            with pytest.raises(Rejection) as no:
                await desk.ask({"kind": "predict"}, [b"x"])
            assert int(no.value.headers()["retry-after"]) == 5  # until half of what may wait is left: 7.5 - 2.5
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

        self.run(test, max_wait=5)

    def test_nobody_waits_for_ever(self):
        async def test(desk):
            with pytest.raises(Rejection) as no:
                await desk.ask({"kind": "predict"}, [b"x"])
            assert (no.value.status, no.value.code) == (503, "deadline")
            assert desk.queued == 0

        self.run(test, deadline=0.05)


def test_requests_share_a_room():
    room = Room(10)
    with room.hold() as take, room.hold() as other:
        take(4)
        other(6)
        with pytest.raises(Rejection) as no:
            take(1)
        assert (no.value.status, no.value.retry_after) == (503, 2)
        assert room.taken == 10
    assert room.taken == 0


class TestSlowClients:
    def test_heads_and_bodies_that_do_not_come(self, server):
        """Both at once, to save time; meanwhile others are answered."""
        head, body = (socket.create_connection(("127.0.0.1", server.port)) for _ in range(2))
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
            told = b""
            try:
                for _ in range(30):
                    client.sendall(b"f4240\r\n" + bytes(1_000_000) + b"\r\n")
            except OSError:
                pass
            client.settimeout(5)
            try:
                told = client.recv(4096)
            except OSError:
                told = b"HTTP/1.1 413 "  # reset, for more was on its way than anybody would read
            assert told.startswith(b"HTTP/1.1 413 ")

    @pytest.mark.parametrize(
        ("phase", "count", "spent", "cut"),
        [
            ("idle", 0, 11.9, None),
            ("idle", 0, 12.1, "idle"),
            ("head", 9999, 5.1, "slow head"),
            ("body", 5900, 6.1, "slow body"),
            ("body", 6200, 6.1, None),
            ("reader", 11_000, 11.9, None),
            ("reader", 11_000, 12.1, "slow reader"),
            ("reader", 13_000, 12.1, None),
            ("answer", 0, 99, None),
        ],
    )
    def test_what_is_too_slow(self, phase, count, spent, cut, monkeypatch):
        """The rule by itself, with a clock that the test sets."""
        reasons = []
        connection = object.__new__(Guarded)
        connection.settings, connection.phase, connection.count, connection.since = Settings(), phase, count, 100.0
        monkeypatch.setattr(connection, "_look", lambda now: None)
        monkeypatch.setattr(connection, "_cut", lambda reason, *_: reasons.append(reason))
        connection.sweep(100.0 + spent)
        assert reasons == ([] if cut is None else [cut])


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
