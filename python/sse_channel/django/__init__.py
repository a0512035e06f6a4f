"""The Django response for a stream, on WSGI and ASGI.

from sse_channel import sse_channel
from sse_channel.django import EventStreamResponse

def stream(request):
    return EventStreamResponse(request, sse_channel)
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import queue
import weakref
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

from asgiref.sync import (
    SyncToAsync,
    ThreadSensitiveContext,
    iscoroutinefunction,
    sync_to_async,
)
from django.apps import apps
from django.conf import settings
from django.core.handlers.asgi import ASGIRequest
from django.db import connections
from django.http import HttpRequest, StreamingHttpResponse
from django.utils.cache import patch_vary_headers

from ..asgi import BEHIND, KEY, Exchange
from ..channel import Overflow, SSEChannel, check_overflow
from ..compression import accepts_gzip
from ..config import options
from ..control import user_key
from ..offload import COME_BACK_LATER, Backlog, Refused, refuse, take_over_wsgi
from ..rendering import render_within
from ..server_stop import watch_server
from ..stream import EventStream, open_stream
from ..traps import note_plain_asgi
from .commit import apublish_on_commit, publish_on_commit
from .identity import address_of, allow_origin, user_of

__all__ = [
    "EventStreamResponse",
    "EventStreamView",
    "apublish_on_commit",
    "everybody",
    "last_event_id_of",
    "publish_on_commit",
]

if settings.configured and (apps.apps_ready or not apps.loading):
    # A mistake in the settings is told when the project starts, not at its first request. While
    # Django loads the apps, the app itself sees to it.
    options()


if TYPE_CHECKING:
    # As `__getattr__` gives them.
    from . import monitor as monitor
    from .scrape import metrics as metrics
    from .views import EventStreamView, everybody
else:
    # Type checkers would take every name for one that is here.
    def __getattr__(name: str) -> Any:
        # It needs this module, and is needed by few.
        if name in ("EventStreamView", "everybody"):
            from . import views

            return getattr(views, name)
        if name == "monitor":
            return importlib.import_module(f"{__name__}.monitor")
        if name == "metrics":
            # It needs an optional package.
            from .scrape import metrics

            return metrics
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class EventStreamResponse(StreamingHttpResponse):
    """A stream of what is published to `channels`, from the moment it is made.

    Works in synchronous and asynchronous views, under WSGI and ASGI. The stream ends, and stops
    listening, when the client leaves, when the server closes the response, when gunicorn or uvicorn
    begins to stop, and at the interpreter's exit. No database connection stays open while it waits:
    those that the request opened are closed when the streaming begins (not inside `atomic`, as in a
    `TestCase`), and so are those that `initial` opens.

    A HEAD request gets the headers and no stream.

    Args:
        request: the request that is answered. Its ``Last-Event-ID`` header, or
            ``?last_event_id=`` or ``?lastEventId=`` in the URL (browsers cannot set headers on a
            first connect), tells where the client goes on.
        channels: one or more channels, or their names. Several share one stream and one order.
        last_event_id: instead of what the request says.
        heartbeat: seconds of idleness after which a comment is sent; None for never.
        initial: the first payload; see `SSEChannel.stream`. A synchronous callable may use the
            ORM under ASGI too.
        render, key: what is sent in place of each message, made once for all clients of an equal
            `key`; see `SSEChannel.stream`. It knows nothing of the request, and may use the ORM:
            its database connections are closed when nothing was published for a second, and each
            second else.
        overflow: what happens to an event for which a client that does not read has no room, as
            for `SSEChannel`. None: an offloaded client is disconnected (its browser comes back and
            history gives it what it missed), any other has its channel's policy.
        compress: whether it is compressed for a client that takes gzip; None for what the option
            `COMPRESS` says. A response with a ``Content-Encoding`` of its own is left as it is.
        user: whose stream it is, for `disconnect` and `MAX_CLIENTS_PER_USER`: a user of Django, or
            any text. None: the user that is logged in; in an asynchronous view, if it has asked for
            that (``await request.auser()``).
        status, headers: as for any response. The stream's own headers can be overridden, except
            for the content type.

    Raises:
        TypeError: no channel, or something that is none; a `render` or `key` that cannot be; a
            `compress` that is no bool; an `overflow` that is no text.
        ValueError: another `overflow`, a `heartbeat` that is not more than 0 seconds, a private
            channel (one without a name) together with others, or a `render` that needs a `key`.
    """

    #: Whether it is one of the project's: within the limits, and for pages of `CORS_ORIGINS`.
    _is_of_the_project = True

    def __init__(
        self,
        request: HttpRequest,
        *channels: SSEChannel | str,
        last_event_id: str | None = None,
        heartbeat: float | None = 10.0,
        initial: Any = None,
        render: Callable[[Any], Any] | None = None,
        key: Hashable | None = None,
        overflow: Overflow | None = None,
        compress: bool | None = None,
        user: object = None,
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        # Django REST framework's request holds Django's.
        its_request = getattr(request, "_request", request)
        if not isinstance(its_request, HttpRequest):
            raise TypeError(
                "the first argument of EventStreamResponse must be the request, "
                f"not {type(request).__name__}"
            )
        opened = [_channel(channel) for channel in channels]
        if not opened:
            raise TypeError("EventStreamResponse needs at least one channel after the request")
        if not isinstance(compress, bool | None):
            raise TypeError(f"compress must be True, False or None, not {type(compress).__name__}")
        if overflow is not None:
            check_overflow(overflow)
        is_asgi = isinstance(its_request, ASGIRequest)
        if callable(initial):
            initial = _without_connections(initial, is_asgi)
        self._stream: EventStream | None = None
        rest: list[bytes] = []
        if request.method != "HEAD":
            if last_event_id is None:
                last_event_id = last_event_id_of(request)
            try:
                self._stream = open_stream(
                    [channel._core for channel in opened],
                    capacity=opened[0]._capacity,
                    overflow=overflow or opened[0]._overflow,
                    last_event_id=last_event_id,
                    heartbeat=heartbeat,
                    initial=initial,
                    render=render,
                    key=key,
                    most=_limits() if self._is_of_the_project else None,
                    user=user_of(its_request) if user is None else user_key(user),
                    address=address_of(its_request),
                )
            except queue.Full as full:
                refuse(str(full))
                # Not a 503, after which a browser never comes back.
                rest = [COME_BACK_LATER]
            else:
                _end_with_the_answer(its_request, self._stream)
        try:
            self._make(its_request, opened[0], rest, overflow, compress, status, headers)
        except BaseException:
            # Somebody may hold the error, and with it what was opened.
            if self._stream is not None:
                self._stream.close()
            raise

    def _make(
        self,
        request: HttpRequest,
        first: SSEChannel,
        rest: list[bytes],
        overflow: Overflow | None,
        compress: bool | None,
        status: int,
        headers: dict[str, str] | None,
    ) -> None:
        """The response around the stream that was opened, or around `rest`."""
        is_asgi = isinstance(request, ASGIRequest)
        self._environ: dict[str, Any] = request.META
        self._other_end: Any = None
        scope: dict[str, Any] = getattr(request, "scope", {})
        self._exchange: Exchange | None = scope.get(KEY)
        self._behind: str | None = scope.get(BEHIND)
        if self._exchange is not None:
            self._exchange.is_held = self._stream is not None
        self._backlog = Backlog(overflow or "disconnect", first._capacity)
        self._content: Any = (
            _AsyncContent(self._stream, rest) if is_asgi else (self._stream or iter(rest))
        )
        super().__init__(
            self._content,
            status=status,
            headers=headers,
            content_type="text/event-stream; charset=utf-8",
        )
        # no-transform: proxies must not compress, which would hold frames back.
        self.headers.setdefault("Cache-Control", "no-cache, no-transform")
        # nginx passes each frame on at once.
        self.headers.setdefault("X-Accel-Buffering", "no")
        if self._is_of_the_project:
            allow_origin(request, self)
        # GZipMiddleware asks the request, and its compressor would hold frames back.
        accepted = request.META.pop("HTTP_ACCEPT_ENCODING", None)
        if options().compress if compress is None else compress:
            self._compress(accepted, is_head=request.method == "HEAD")

    def _compress(self, accept_encoding: str | None, *, is_head: bool) -> None:
        """Have the stream compressed, if the client takes it so."""
        # Also for the others: a cache must know what the answer depends on.
        patch_vary_headers(self, ["Accept-Encoding"])
        if self.has_header("Content-Encoding") or not accepts_gzip(accept_encoding):
            return
        if self._stream is not None:
            self._stream._compress()
        elif not is_head:
            # What a client gets for whom there is no place is too short.
            return
        self.headers["Content-Encoding"] = "gzip"

    def __iter__(self) -> Iterator[bytes]:
        watch_server()
        if self._stream is not None and self._is_taken_over(self._stream):
            return iter(())
        _close_connections()
        if self._is_wrapped:
            return super().__iter__()
        # The server pulls from the stream itself, without a layer of Python for each frame.
        content: Iterator[bytes] = self._content
        return content

    def _is_taken_over(self, stream: EventStream) -> bool:
        """Whether the stream and its connection have left Python."""
        if not options().offload:
            return False
        try:
            if self._is_wrapped:
                raise Refused("wrapped")
            other_end = take_over_wsgi(stream, self._environ, self._backlog)
        except Refused as reason:
            refuse(str(reason), getattr(self, "_iterator", None))
            return False
        # Closed with the response, when the server has written to it what it had to.
        self._other_end = other_end
        return True

    def close(self) -> None:
        """As the server does it at the end of the response."""
        if self._other_end is not None:
            self._other_end.close()
        super().close()

    async def _is_taken_over_on_asgi(self, stream: EventStream) -> bool:
        if not options().offload:
            return False
        try:
            if self._is_wrapped:
                raise Refused("wrapped")
            if self._exchange is None:
                note_plain_asgi(self._behind)
                raise Refused("server")
            await self._exchange.take_over(stream, self._backlog)
        except Refused as reason:
            refuse(str(reason), getattr(self, "_iterator", None))
            return False
        return True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._stream is not None:
            try:
                if await self._is_taken_over_on_asgi(self._stream):
                    return
            except BaseException:
                # Nobody iterates what could not be opened, and somebody may hold the error.
                self._stream.close()
                raise
        await _release_thread()
        content: Any = super().__aiter__() if self._is_wrapped else self._content
        async with aclosing(content):
            async for chunk in content:
                yield chunk

    @property
    def _is_wrapped(self) -> bool:
        """Whether a middleware put its own iterator around the stream."""
        return getattr(self, "_iterator", None) is not self._content


class _AsyncContent:
    """The stream as an asynchronous iterator only, so that Django takes it for one."""

    def __init__(self, stream: EventStream | None, rest: list[bytes]) -> None:
        self._stream = stream
        self._rest = rest

    def __aiter__(self) -> _AsyncContent:
        return self

    async def __anext__(self) -> bytes:
        if self._stream is None:
            if not self._rest:
                raise StopAsyncIteration
            return self._rest.pop()
        return await self._stream.__anext__()

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class _Closing:
    """In place of a request's `close`: it ends the streams that were opened for the request, too.

    Django closes the request with whatever it answers, an error for one. Copies of the request
    share it; a pickled one has no streams.
    """

    def __init__(
        self, request: HttpRequest | None = None, before: Callable[[], object] | None = None
    ) -> None:
        # Not in a circle, which would keep the request until garbage is collected.
        self._request = None if request is None else weakref.ref(request)
        self._before = before
        self.opened: list[weakref.ref[EventStream]] = []

    def __call__(self) -> None:
        request = None if self._request is None else self._request()
        if self._before is not None:
            self._before()
        elif request is not None:
            type(request).close(request)
        for each in self.opened:
            stream = each()
            if stream is not None:
                stream.close()

    def __reduce__(self) -> tuple[type[_Closing], tuple[()]]:
        return _Closing, ()


def _end_with_the_answer(request: HttpRequest, stream: EventStream) -> None:
    """End `stream` when the answer to its request is over, be that an error or another's."""
    attributes = vars(request)
    closing = attributes.get("close")
    if not isinstance(closing, _Closing):
        attributes["close"] = closing = _Closing(request, closing)
    closing.opened.append(weakref.ref(stream))


def last_event_id_of(request: HttpRequest) -> str | None:
    """Where a request says that its client goes on, None when it begins.

    The ``Last-Event-ID`` header first, then ``last_event_id`` and ``lastEventId`` of the URL. An
    id from the header is newer: a browser that reconnects repeats the URL it was given.
    """
    return (
        request.headers.get("Last-Event-ID")
        or request.GET.get("last_event_id")
        or request.GET.get("lastEventId")
        or None
    )


def _limits() -> tuple[int, int, int]:
    most = options()
    return (most.max_clients, most.max_clients_per_user, most.max_clients_per_address)


def _channel(channel: SSEChannel | str) -> SSEChannel:
    if isinstance(channel, str):
        return SSEChannel(channel)
    if isinstance(channel, SSEChannel):
        return channel
    raise TypeError(f"each channel must be an SSEChannel or its name, not {type(channel).__name__}")


def _close_connections() -> None:
    """Close this thread's database connections, which the waiting stream would keep."""
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:
            connection.close()


def _without_connections(initial: Callable[[], Any], is_asgi: bool) -> Callable[[], Any]:
    """`initial`, and no database connection after it."""
    if iscoroutinefunction(initial):

        async def awaited() -> Any:
            try:
                return await initial()
            finally:
                await _release_thread()

        return awaited

    def called() -> Any:
        try:
            return initial()
        finally:
            _close_connections()

    if not is_asgi:
        return called

    async def called_in_thread() -> Any:
        try:
            message = await sync_to_async(called)()
            # A plain callable may give something to await all the same.
            return await message if inspect.isawaitable(message) else message
        finally:
            await _release_thread()

    return called_in_thread


async def _release_thread() -> None:
    """Close the request's connections, in the thread that has them, and end that thread.

    Django keeps one thread per ASGI request for synchronous code, with its connections, until the
    request ends: for a stream, one idle thread per client. The next synchronous call of the
    request starts another.
    """
    context_of = getattr(SyncToAsync, "thread_sensitive_context", None)
    executors = getattr(SyncToAsync, "context_to_thread_executor", None)
    context = context_of.get(None) if context_of is not None else None
    if context is None or executors is None:
        await sync_to_async(_close_connections)()
    elif context in executors:
        await sync_to_async(_close_connections)()
        executor = executors.pop(context, None)
        if executor is not None:
            executor.shutdown(wait=False)


@contextmanager
def _rendering() -> Iterator[None]:
    """What a thread renders within: no database connection of it stays open.

    What an asynchronous `render` does synchronously, the ORM for one, has a thread of its own
    meanwhile. Else it would be that of all coroutines outside of requests, one of which may just
    wait for the rendering, and nobody would close its connections.
    """
    context = ThreadSensitiveContext()
    token = SyncToAsync.thread_sensitive_context.set(context)
    try:
        yield
    finally:
        try:
            if context in SyncToAsync.context_to_thread_executor:
                asyncio.run(_release_thread())
        finally:
            SyncToAsync.thread_sensitive_context.reset(token)
            _close_connections()


render_within(_rendering)
