"""Connections that cost more than they give: slow heads, slow bodies, slow readers, and too many."""

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sightline.serving.metrics import Metrics
from sightline.serving.settings import Settings

HEAD_BYTES = 16_384
"""The longest head of a request: its first line and its headers."""


class Guarded(H11Protocol):
    """One connection, which a sweep looks at now and then; `made` makes the class that a server uses.

    A head has to be there `header_seconds` after its first byte; a connection on which nothing is going on is closed
    after `idle_seconds`, as is one that sends or takes fewer than `bytes_per_second` over that time.
    """

    settings: Settings
    metrics: Metrics

    @classmethod
    def made(cls, settings: Settings, metrics: Metrics) -> type["Guarded"]:
        """The protocol class for these settings."""
        return type("GuardedConnection", (cls,), {"settings": settings, "metrics": metrics})

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        super().connection_made(transport)
        self.since = time.monotonic()  # when what is going on now began
        self.phase = "idle"
        self.count = 0  # bytes that have moved since
        self.left = 0  # bytes that had not been taken when the client was last seen to be slow
        self.metrics.connections.inc()
        if len(self.connections) > self.settings.connections:
            self._cut("too many", 503, "there are too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or was sent away."""
        self.metrics.connections.dec()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        self.count += len(data)
        super().data_received(data)
        self._look(time.monotonic())

    def on_response_complete(self) -> None:
        """An answer has been written."""
        super().on_response_complete()
        self._look(time.monotonic())

    def shutdown(self) -> None:
        """The server is about to end: idle connections close, others after their answer."""
        if self.phase == "head":
            return  # a request is coming, and there is a limit to how long it may take
        super().shutdown()

    def sweep(self, now: float) -> None:
        """Cuts the connection off where it is too slow."""
        self._look(now)
        settings, spent = self.settings, now - self.since
        slow = spent > settings.idle_seconds / 2 and self.count < spent * settings.bytes_per_second
        if self.phase == "head" and spent > settings.header_seconds:
            self._cut("slow head", 408, "the head of the request did not come in time")
        elif self.phase == "idle" and spent > settings.idle_seconds:
            self._cut("idle", None, "")
        elif self.phase == "body" and slow:
            self._cut("slow body", 408, "the body of the request comes too slowly")
        elif self.phase == "reader" and slow and spent > settings.idle_seconds:
            self._cut("slow reader", None, "")

    def _look(self, now: float) -> None:
        """Notes what is going on, and since when."""
        waiting = self.transport.get_write_buffer_size()
        if waiting:
            phase = "reader"
        elif self.conn.their_state is h11.SEND_BODY:
            phase = "body"
        elif self.conn.their_state is h11.IDLE:
            phase = "head" if self.conn.trailing_data[0] else "idle"
        else:
            phase = "answer"
        if phase != self.phase:
            self.phase, self.since, self.count, self.left = phase, now, 0, waiting
        if phase == "reader":
            # More may be written meanwhile, which must not look as if less had been taken.
            self.count += max(self.left - waiting, 0)
            self.left = waiting

    def _cut(self, reason: str, status: int | None, words: str) -> None:
        self.metrics.cut.labels(reason).inc()
        if status is not None and (self.cycle is None or not self.cycle.response_started or self.phase == "head"):
            self.transport.write(_answer(status, reason.replace(" ", "_"), words))
            self.transport.close()
            self.loop.call_later(1, self.transport.abort)
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What cannot be read as HTTP, or is too long."""
        self.transport.write(_answer(400, "http", f"this is not a request, or its head has over {HEAD_BYTES} bytes"))
        self.transport.close()


def _answer(status: int, code: str, words: str) -> bytes:
    body = json.dumps({"error": {"code": code, "message": words}}).encode() + b"\n"
    phrase = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}[status]
    retry = "retry-after: 5\r\n" if status == 503 else ""
    head = (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{retry}"
        "x-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


async def sweep(connections: set[Any], every: float = 0.5) -> None:
    """Looks at all connections, for ever."""
    while True:
        await asyncio.sleep(every)
        now = time.monotonic()
        for connection in list(connections):
            if not connection.transport.is_closing():
                connection.sweep(now)
