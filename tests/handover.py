"""Handing connections over to the I/O threads without a server, for tests and their scripts."""

from __future__ import annotations

import socket
from typing import Any

from sse_channel import EventStream, SSEChannel, _sse_channel


def take(
    stream: EventStream, fd: int, head: bytes = b"", body: bytes = b"", **options: Any
) -> bool:
    """Hand the connection `fd` over with a stream, under limits that nothing small meets."""
    usual = {
        "chunked": False,
        "policy": "disconnect",
        "frames": 1000,
        "bytes": 1 << 20,
        "threads": 1,
    }
    return _sse_channel.offload(stream, fd, head, body, **{**usual, **options})


def taken(channel: SSEChannel, **options: Any) -> socket.socket:
    """The client's end of a connection that was handed over with a new stream of `channel`."""
    here, there = socket.socketpair()
    with there:
        assert take(channel.stream(heartbeat=None), there.fileno(), **options)
    return here
