"""The parts of the server by themselves: who may ask, what a body holds, how the queue is bounded, who is too slow."""

import asyncio
import base64
import re
import socket
from pathlib import Path

import pytest

from command import refusal
from served import form, saved
from sightline.cli.serve import named_models
from sightline.errors import UserError
from sightline.serving import server
from sightline.serving.app import make_app
from sightline.serving.batching import Desk
from sightline.serving.bodies import Room, _from_form, _from_json
from sightline.serving.guard import Guarded
from sightline.serving.metrics import Metrics
from sightline.serving.rejection import Rejection
from sightline.serving.settings import Settings


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    saved(folder / "model")
    return folder


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


class TestBodies:
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


class TestSlowness:
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


def test_connections_are_fetched_few_at_a_time_and_answers_leave_at_once():
    """asyncio switches Nagle's algorithm off only on sockets that name their protocol."""

    async def run() -> tuple[int, int, int]:
        listener = server._listen(Settings(port=0))
        came = []

        class Noted(asyncio.Protocol):
            def connection_made(self, transport):
                came.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        with listener:
            config = server._config(lambda: None, Settings(port=0), lambda **_: Noted())
            config.load()
            own = server.Server(config, None, listener)
            own.lifespan = config.lifespan_class(config)
            await own.startup([listener])
            clients = [socket.create_connection(listener.getsockname(), 5) for _ in range(100)]
            most = 0
            while len(came) < len(clients):
                before = len(came)
                await asyncio.sleep(0)
                most = max(most, len(came) - before)
            for client in clients:
                client.close()
            for listening in own.servers:
                listening.close()
        return len(came), most, min(came)

    came, most, without_delay = asyncio.run(asyncio.wait_for(run(), 20))
    assert came == 100
    assert most <= server._AT_ONCE + 1
    assert without_delay == 1
