"""Offload: handing a stream's connection over to the extension's I/O threads.

A WSGI server calls the application, and then iterates what it returned. gunicorn has sent nothing
by then and tells which socket it is about. So, when the iteration begins, the head of the response
is built as gunicorn would have, the connection is duplicated and given to the extension with that
head, and a dead socket takes its place under gunicorn's number. What gunicorn still writes goes
there; it logs the request, closes, and is free for the next one, while the connection lives on.
"""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from . import _sse_channel
from .config import options
from .traps import note_refused

if TYPE_CHECKING:
    from .stream import EventStream

__all__ = [
    "COME_BACK_LATER",
    "Backlog",
    "Refused",
    "check_coding",
    "hand_over",
    "refuse",
    "take_over_wsgi",
]

#: All that a client gets for whom there is no place: in half a minute it asks again.
COME_BACK_LATER = b"retry: 30000\n\n"

#: Bytes of a request's body, which the view did not read, that are read away at the most.
_LARGEST_BODY = 1 << 20

#: Why streams were not offloaded in this process, and how often.
refused: Counter[str] = Counter()


class Refused(Exception):
    """The stream stays with the server; the argument says why, in a word."""


def refuse(reason: str, content: object = None) -> None:
    """Count a stream that was not offloaded; `content` is what the server iterates instead."""
    refused[reason] += 1
    _sse_channel.count_refused(reason)
    note_refused(reason, content)


class Backlog(NamedTuple):
    """What may wait for a client that does not read."""

    policy: str
    frames: int


def take_over_wsgi(stream: EventStream, environ: Mapping[str, Any], backlog: Backlog) -> Any:
    """Take a stream and its connection away from the server that is about to iterate it.

    Returns:
        The other end of the socket that the server has instead, to be closed when the server has
        closed the response.

    Raises:
        Refused: the server iterates the stream itself, as it is.
        Exception: whatever the first payload's callable raises.
    """
    response = _gunicorns_response(environ)
    connection = response.sock
    is_chunked = _is_chunked(response, stream)
    _check_connection(connection)
    _read_away(environ)
    opener = stream._take_opener()
    if opener is not None:
        opener()
    first = stream._take_initial()
    try:
        # Told that nobody awaits it here, it gives bytes.
        body = b"" if first is None else cast(bytes, first(False))
    except StopIteration as error:
        # It must not look like the end of the response.
        raise RuntimeError("initial raised StopIteration") from error
    response.force_close()
    head = "".join(
        [*response.default_headers(), *(f"{k}: {v}\r\n" for k, v in response.headers), "\r\n"]
    )
    try:
        here, there = _dead_pair()
        try:
            _forget_in_loop(connection)
            # After it the connection is not the server's any more.
            hand_over(
                stream,
                connection.fileno(),
                head.encode("latin-1"),
                body,
                instead=here.fileno(),
                is_chunked=is_chunked,
                backlog=backlog,
            )
        except BaseException:
            there.close()
            raise
        finally:
            here.close()
    except Refused:
        if first is not None:
            stream._set_initial(lambda _: body)
        raise
    response.headers_sent = True
    return there


def hand_over(
    stream: EventStream,
    fd: int,
    head: bytes,
    body: bytes,
    *,
    instead: int | None = None,
    is_chunked: bool,
    backlog: Backlog,
) -> None:
    """Give the extension a duplicate of the connection `fd`, and the stream with it.

    `head` is sent first, then what the stream opens with, then `body`, compressed if the stream is.
    The number `fd` means what `instead` means from then on.

    Raises:
        Refused: nothing was done.
    """
    try:
        is_taken = _sse_channel.offload(
            stream,
            fd,
            head,
            body,
            instead=instead,
            chunked=is_chunked,
            policy=backlog.policy,
            frames=backlog.frames,
            bytes=options().backlog_bytes,
            threads=options().io_threads,
        )
    except _sse_channel.BusError as error:
        # The process is at its end.
        raise Refused("ended") from error
    except OSError as error:
        raise Refused("descriptors") from error
    if not is_taken:
        raise Refused("ended")


def _gunicorns_response(environ: Mapping[str, Any]) -> Any:
    """Find gunicorn's own response: it has what other WSGI middleware made of the head.

    It is a local of the function that iterates the application's response, below whatever other
    iterators are in between.
    """
    connection: Any = environ.get("gunicorn.socket")
    module = sys.modules.get("gunicorn.http.wsgi")
    if connection is None or module is None:
        raise Refused("server")
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("gunicorn.workers."):
            found: Any = frame.f_locals.get("resp")
            if type(found) is module.Response and found.sock is connection:
                return found
            if found is not None:
                # HTTP/2's: there one connection has many streams.
                raise Refused("protocol")
        frame = frame.f_back
    raise Refused("server")


def check_coding(stream: EventStream, codings: Iterable[str]) -> None:
    """Refuse a response whose ``Content-Encoding`` is not the stream's own: it was compressed."""
    if [coding.lower() for coding in codings] != ["gzip"] * stream._is_compressed:
        raise Refused("wrapped")


def _is_chunked(response: Any, stream: EventStream) -> bool:
    """Whether the body goes in chunks, or to the end of the connection; refuse any other."""
    if response.headers_sent or response.status is None:
        raise Refused("begun")
    check_coding(stream, (v for k, v in response.headers if k.lower() == "content-encoding"))
    if not response.chunked and (
        response.req.version > (1, 0) or response.response_length is not None
    ):
        raise Refused("protocol")
    return bool(response.chunked)


def _read_away(environ: Mapping[str, Any]) -> None:
    """Read what the view left of the request's body: nobody reads it after the handover."""
    if environ.get("CONTENT_LENGTH") or environ.get("HTTP_TRANSFER_ENCODING"):
        left = _LARGEST_BODY
        while left > 0 and (data := environ["wsgi.input"].read(min(left, 1 << 16))):
            left -= len(data)
        if left <= 0:
            raise Refused("body")


def _check_connection(connection: Any) -> None:
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(connection, ssl.SSLSocket):
        raise Refused("tls")
    if type(connection).__module__ not in ("socket", "gevent._socket3"):
        raise Refused("server")


def _forget_in_loop(connection: Any) -> None:
    """Take the connection out of the loop of gevent's hub, which may have waited for it."""
    if type(connection).__module__.startswith("gevent"):
        epoll = sys.modules["gevent"].get_hub().loop.fileno()
        if epoll is not None and epoll >= 0:
            _sse_channel.unwatch(epoll, connection.fileno())


def _dead_pair() -> tuple[Any, Any]:
    """Make a socket from which nothing comes but the end, and its other end.

    What is written to it is taken as long as the other end is open.
    """
    # The system's, also where gevent has put its own in its place: nobody waits for it.
    import _socket

    try:
        here, there = _socket.socketpair()
    except OSError as error:
        raise Refused("descriptors") from error
    there.shutdown(socket.SHUT_WR)
    return here, there
