"""Who may ask: the first thing that a request meets.

A server on loopback can be reached by every page that a browser shows. So a request has to name this server as its host
(or a page elsewhere could call it under a name of its own, which it points to 127.0.0.1), and may not come from a page
of another origin. With a key, everything but `/healthz` asks for it.
"""

import base64
import binascii
import hmac
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from sightline.serving.metrics import Metrics
from sightline.serving.rejection import ClientGone, Rejection
from sightline.serving.settings import Settings, is_loopback

App = Callable[[Any, Any, Any], Awaitable[None]]

_ALWAYS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
}
_OPEN = ("/healthz",)


class Gate:
    """Lets requests through to `app`, or answers them itself; counts both; adds the headers that protect the page.

    While `draining`, connections end with their answer.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics, routes: Iterable[str]):
        self.app, self.settings, self.metrics, self.routes = app, settings, metrics, frozenset(routes)
        self.draining = False
        self.names = {name.lower() for name in (*settings.allow_hosts, "localhost", settings.host)}
        if not is_loopback(settings.host):
            self.names.add(socket.gethostname().lower())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Takes one request."""
        assert scope["type"] == "http", "there are no websockets and no lifespan here"
        route = scope["path"] if scope["path"] in self.routes else "other"
        began = time.monotonic()
        status = 0

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                more = [(n.encode(), v.encode()) for n, v in _ALWAYS.items() if n.encode() not in present]
                if self.draining or (status >= 400 and self._endless(scope)):
                    more.append((b"connection", b"close"))
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        self.metrics.received.labels(route).inc()
        self.metrics.flying.inc()
        outcome = "failed"
        try:
            try:
                self._check(scope)
            except Rejection as no:
                await respond(sending, no)
            else:
                # What may be asked with GET may be asked with HEAD; the server leaves the body out.
                await self.app({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope, receive, sending)
            outcome = "failed" if status in (0, 500) else "answered" if status < 400 else "refused"
        except ClientGone:
            outcome = "cancelled"
        finally:
            self.metrics.flying.dec()
            self.metrics.requests.labels(route, outcome).inc()
            if outcome == "answered":
                self.metrics.seconds.labels(route).observe(time.monotonic() - began)

    def _check(self, scope: Any) -> None:
        headers = {}
        for name, value in scope["headers"]:
            if name in headers and name in (b"host", b"origin", b"authorization", b"x-api-key"):
                raise Rejection(400, "header", f"the header '{name.decode()}' stands there twice")
            headers[name] = value.decode("latin-1")
        host = headers.get(b"host", "")
        if not self._own(_name(host)):
            raise Rejection(421, "host", "this server does not answer under this name; --allow-host adds one")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise Rejection(403, "origin", "pages of other origins may not ask this server")
        site, mode = headers.get(b"sec-fetch-site", "none"), headers.get(b"sec-fetch-mode", "")
        followed = scope["method"] == "GET" and mode == "navigate" and headers.get(b"sec-fetch-dest") == "document"
        if site not in ("none", "same-origin") and not followed:
            raise Rejection(403, "origin", "pages of other origins may not ask this server")
        if self.settings.api_key is not None and scope["path"] not in _OPEN and not self._has_key(headers):
            raise Rejection(401, "key", "this needs the key: 'Authorization: Bearer KEY', or as a password")

    def _endless(self, scope: Any) -> bool:
        """Whether what is left of a refused request might go on and on, and is not worth waiting for its end."""
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        much = not declared.isdigit() or len(declared) > 18 or int(declared) > 10 * self.settings.max_bytes
        return much or b"transfer-encoding" in headers

    def _own(self, name: str) -> bool:
        if name in self.names:
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        # An address cannot be made to point elsewhere, as a name can.
        return address.is_loopback or not is_loopback(self.settings.host)

    def _has_key(self, headers: dict[bytes, str]) -> bool:
        given = headers.get(b"x-api-key", "")
        scheme, _, rest = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = rest.strip()
        elif scheme.lower() == "basic":  # what a browser asks its user for
            try:
                given = base64.b64decode(rest, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        return hmac.compare_digest(given.encode(), (self.settings.api_key or "").encode())


def _name(host: str) -> str:
    """The name in a Host header, without its port; empty where it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or "") if parts.netloc == host and "@" not in host and parts.port != 0 else ""
    except ValueError:
        return ""


async def respond(send: Any, no: Rejection) -> None:
    """Sends a rejection."""
    body = no.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **no.headers()}
    if no.status == 401:
        headers["www-authenticate"] = 'Basic realm="sightline", charset="UTF-8"'
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": no.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
