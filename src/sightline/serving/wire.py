"""Messages between the server and the process that computes: JSON and bytes, never pickles.

A message is the length of its header (4 bytes, big-endian), the header, an object whose `sizes` are those of the parts
that follow, and these parts.
"""

import asyncio
import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

Message = tuple[dict[str, Any], list[bytes]]


def packed(header: dict[str, Any], parts: Sequence[bytes] = ()) -> list[bytes]:
    """A message as pieces to be written one after the other."""
    text = json.dumps({**header, "sizes": [len(part) for part in parts]}).encode()
    return [struct.pack(">I", len(text)) + text, *parts]


def send(line: socket.socket, header: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
    """Sends a message. Raises OSError where nobody listens any more."""
    for piece in packed(header, parts):
        line.sendall(piece)


def receive(line: socket.socket) -> Message | None:
    """The next message; None where the other side has gone."""
    try:
        (length,) = struct.unpack(">I", _exactly(line, 4))
        header = json.loads(_exactly(line, length))
        return header, [_exactly(line, size) for size in header.pop("sizes")]
    except (EOFError, OSError):
        return None


def _exactly(line: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = line.recv_into(view[at:])
        if not count:
            raise EOFError
        at += count
    return bytes(data)


async def receive_soon(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None where the other side has gone."""
    try:
        (length,) = struct.unpack(">I", await reader.readexactly(4))
        header = json.loads(await reader.readexactly(length))
        return header, [await reader.readexactly(size) for size in header.pop("sizes")]
    except (asyncio.IncompleteReadError, OSError):
        return None
