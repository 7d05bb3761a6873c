"""The server from its first breath to its last: listening, loading, answering, draining."""

import asyncio
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import uvicorn

from sightline.errors import UserError, printable
from sightline.serving.app import make_app
from sightline.serving.batching import Desk
from sightline.serving.gate import Gate
from sightline.serving.guard import HEAD_BYTES, Guarded, sweep
from sightline.serving.metrics import Metrics
from sightline.serving.settings import Settings

GRACE = 0.5
"""Seconds in which new connections are still taken after a signal to end, so that whoever sends them can notice."""
_AT_ONCE = 16
"""Connections fetched in one turn of the loop. asyncio fetches as many as the system may hold ready; a thousand that
come together would keep all others waiting until each of them is set up."""
_READY = 2048
"""Connections that the system may hold ready."""


def serve(
    models: Mapping[str, str],
    settings: Settings,
    options: Mapping[str, Any],
    started: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves models, {name: source}, until SIGTERM or SIGINT; what was accepted is answered first.

    `options` are `architecture`, `device` and `precision`. `started` is told the address once the models are loaded.
    SIGHUP loads the models anew. Raises UserError where the address cannot be had, or a model cannot be loaded.
    """
    listener = _listen(settings)
    with suppress(ValueError, OSError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = settings.connections + 512
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    with listener:
        asyncio.run(_serve(models, settings, options, started, listener))


def _listen(settings: Settings) -> socket.socket:
    where = f"{settings.host}:{settings.port}"
    listener: socket.socket | None = None
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_READY)
        listener.setblocking(False)
    except OSError as fault:
        if listener is not None:
            listener.close()
        raise UserError(f"cannot listen on {printable(where)}: {fault.strerror}; --port chooses another") from fault
    return listener


def _config(gate: Gate, settings: Settings, http: Any) -> uvicorn.Config:
    return uvicorn.Config(
        gate,
        http=http,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        backlog=_AT_ONCE,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=int(settings.idle_seconds),
        timeout_graceful_shutdown=int(settings.deadline) + 5,
    )


async def _serve(
    models: Mapping[str, str],
    settings: Settings,
    options: Mapping[str, Any],
    started: Callable[[str], None],
    listener: socket.socket,
) -> None:
    metrics = Metrics()
    desks = {name: Desk(name, source, options, settings, metrics) for name, source in models.items()}
    gate = make_app(desks, settings, metrics)
    server = Server(_config(gate, settings, Guarded.made(settings, metrics)), gate, listener)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    loop.add_signal_handler(signal.SIGHUP, lambda: [desk.reload_now.set() for desk in desks.values()])
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    answering = loop.create_task(server._serve([listener]))
    sweeping = loop.create_task(sweep(server.server_state.connections))
    loading = loop.create_task(_load(list(desks.values())))
    try:
        await asyncio.wait({loading, answering}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            started(f"http://{host}:{listener.getsockname()[1]}/")
        await answering
    finally:
        for task in (loading, sweeping):
            task.cancel()
        server.should_exit = server.force_exit = True
        await asyncio.gather(loading, sweeping, answering, return_exceptions=True)
        await asyncio.gather(*(desk.end() for desk in desks.values()))


async def _load(desks: Sequence[Desk]) -> None:
    await asyncio.gather(*(desk.start() for desk in desks))


class Server(uvicorn.Server):
    """uvicorn's server, which loses nothing that it has accepted when it is told to end.

    It says on `/readyz` at once that it ends. For `GRACE` seconds it goes on taking connections, each of which ends
    with its answer; then it takes those that wait in the system's queue, stops listening, and answers what it has.
    """

    def __init__(self, config: uvicorn.Config, gate: Gate, listener: socket.socket):
        super().__init__(config)
        self.gate, self.listener = gate, listener

    def stop(self) -> None:
        """Begins to end; asked a second time, ends at once."""
        if self.gate.draining:
            self.force_exit = True
            print("sightline: ended at once; what was not answered is lost", file=sys.stderr, flush=True)
        self.gate.draining = self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen; the number that asyncio fetches at once is not the number that may wait."""
        await super().startup(sockets)
        self.listener.listen(_READY)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends as the class says."""
        if not self.force_exit:
            await asyncio.sleep(GRACE)
        late = self._waiting()
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for client in late:
            with suppress(OSError):
                await loop.connect_accepted_socket(self._protocol, client)
        await asyncio.sleep(0 if self.force_exit else 0.1)  # in which those that came late send what they have sent
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state={})

    def _waiting(self) -> list[socket.socket]:
        """The connections that the system has taken for us, and nobody has fetched."""
        found = []
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                client.setblocking(False)
                found.append(client)
        return found
