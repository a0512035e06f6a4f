"""ASGI: let streams leave Python under uvicorn.

# asgi.py
from django.core.asgi import get_asgi_application
from sse_channel.asgi import offload

application = offload(get_asgi_application())
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .offload import Backlog, Refused, check_coding, hand_over
from .server_stop import end_streams
from .stream import EventStream

__all__ = ["offload"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Where the wrapper leaves what a response needs, in the scope.
KEY = "sse_channel.offload"
#: Where it leaves what stands between it and the server, which it does not know.
BEHIND = "sse_channel.offload_behind"


def offload(application: Application) -> Application:
    """Wrap an ASGI application, so that its `EventStreamResponse` can be offloaded under uvicorn.

    It must be the outermost wrapper: it has to meet uvicorn's own `send`. Under any other server,
    and for all other responses, it passes everything on as it is.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(application, scope, receive, send)
            return
        if scope["type"] != "http":
            await application(scope, receive, send)
            return
        cycle = _cycle_of(send)
        if not _is_uvicorns(cycle):
            behind = f"{getattr(send, '__module__', None)}.{getattr(send, '__qualname__', send)}"
            await application({**scope, BEHIND: behind}, receive, send)
            return
        exchange = Exchange(scope, cycle, send)
        try:
            await application({**scope, KEY: exchange}, receive, exchange.send)
        finally:
            exchange.end()

    return wrapped


async def _live(application: Application, scope: Scope, receive: Receive, send: Send) -> None:
    """The server's start and end: at its end the streams are told when to come back.

    uvicorn ends by a signal to itself, so that nothing that Python does at its own end is done.
    """
    is_spoken = False

    async def heard(message: Message) -> None:
        nonlocal is_spoken
        is_spoken = True
        await send(message)

    async def received() -> Message:
        nonlocal is_spoken
        message = await receive()
        is_spoken = True
        if message["type"] == "lifespan.shutdown":
            await asyncio.get_running_loop().run_in_executor(None, end_streams, True)
        return message

    try:
        await application(scope, received, heard)
    except Exception:
        if is_spoken:
            # It knows the lifespan, and fails in it.
            raise
        # It knows no lifespan, as Django's does not.
        if (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
            await received()
        await send({"type": "lifespan.shutdown.complete"})


def _cycle_of(send: Any) -> object:
    """What `send` belongs to, also behind uvicorn's own log of messages (``--log-level trace``)."""
    if getattr(send, "__module__", None) == "uvicorn.middleware.message_logger":
        send = inspect.getclosurevars(send).nonlocals.get("send")
    return getattr(send, "__self__", None)


def _is_uvicorns(cycle: object) -> bool:
    return type(cycle).__module__.startswith("uvicorn.protocols.http.") and all(
        hasattr(cycle, name) for name in ("transport", "response_started", "on_response")
    )


class Exchange:
    """One request and its response, whose head is held back until its body begins."""

    def __init__(self, scope: Scope, cycle: Any, send: Send) -> None:
        self._scope = scope
        self._cycle = cycle
        self._send = send
        self._head: Message | None = None
        self._transport: Any = None
        #: Whether the head is held back: set by a response that would be taken over.
        self.is_held = False

    async def send(self, message: Message) -> None:
        """What the application calls to send."""
        if message["type"] == "http.response.start" and self.is_held:
            # uvicorn would write it at once.
            self._head = message
            return
        await self._send_head()
        if self._transport is not None:
            # Closed before uvicorn hears that the response is complete: no next request is read.
            self._transport.abort()
        await self._send(message)

    async def _send_head(self) -> None:
        head, self._head = self._head, None
        if head is not None:
            await self._send(head)

    async def take_over(self, stream: EventStream, backlog: Backlog) -> None:
        """Take a stream and its connection away from uvicorn.

        Raises:
            Refused: the stream stays with it.
            Exception: whatever opening the stream, or its first payload's callable, raises.
        """
        transport = self._cycle.transport
        connection = self._check(transport, stream)
        opener = stream._take_opener()
        if opener is not None:
            await opener.open()
        first = stream._take_initial()
        body = b""
        if first is not None:
            given = first(True)
            body = await given if inspect.isawaitable(given) else given
        # uvicorn itself makes the head of the response, and logs it, but does not write it.
        recorder = _Recorder()
        try:
            # Once more: who has left meanwhile has no socket.
            self._check(transport, stream)
            head, self._head = self._head, None
            assert head is not None
            headers = [each for each in head["headers"] if bytes(each[0]).lower() != b"connection"]
            self._cycle.transport = recorder
            await self._send({**head, "headers": [*headers, (b"connection", b"close")]})
            is_chunked = b"\r\ntransfer-encoding: chunked\r\n" in recorder.written.lower()
            if is_chunked != (self._scope["http_version"] == "1.1"):
                raise Refused("protocol")
            hand_over(
                stream,
                connection.fileno(),
                bytes(recorder.written),
                body,
                is_chunked=is_chunked,
                backlog=backlog,
            )
        except BaseException as error:
            self._cycle.transport = transport
            if recorder.written:
                transport.write(bytes(recorder.written))
            if first is not None and isinstance(error, Refused):
                stream._set_initial(lambda _: body)
            raise
        # The end of the client is not uvicorn's to notice any more.
        transport.pause_reading()
        self._transport = transport

    def _check(self, transport: Any, stream: EventStream) -> Any:
        """The transport's socket, if the response can still be taken away."""
        if self._head is None or self._cycle.response_started:
            raise Refused("begun")
        headers = [(bytes(name).lower(), bytes(value)) for name, value in self._head["headers"]]
        codings = [
            value.decode("latin-1") for name, value in headers if name == b"content-encoding"
        ]
        check_coding(stream, codings)
        if transport.get_extra_info("sslcontext") is not None:
            raise Refused("tls")
        connection = transport.get_extra_info("socket")
        if connection is None or self._scope["http_version"] not in ("1.0", "1.1"):
            raise Refused("protocol")
        if transport.is_closing() or transport.get_write_buffer_size() > 0:
            raise Refused("ended")
        return connection

    def end(self) -> None:
        """The application has returned, in one way or the other."""
        if self._transport is not None:
            self._transport.abort()


class _Recorder:
    """Takes what uvicorn writes instead of a transport."""

    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        """Nothing is open."""

    def is_closing(self) -> bool:
        """It never is: what uvicorn has to say goes nowhere."""
        return False
