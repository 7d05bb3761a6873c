"""What a client is told when it does not get what it asked for."""

import json
import math
from http import HTTPStatus


class Rejection(Exception):  # noqa: N818  (most of them are no errors of this program)
    """A request that is not answered, with its HTTP status, a code for programs and a message for people.

    The message is a text of this project, never that of a foreign exception. `retry_after` is in seconds.
    """

    def __init__(self, status: HTTPStatus | int, code: str, message: str, *, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.code, self.message = int(status), code, message
        self.retry_after = None if retry_after is None else min(max(math.ceil(retry_after), 1), 600)

    def body(self) -> bytes:
        """The answer as JSON."""
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode() + b"\n"

    def headers(self) -> dict[str, str]:
        """The headers that belong to it."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


class ClientGone(Exception):  # noqa: N818
    """The client has left before its answer was ready."""
