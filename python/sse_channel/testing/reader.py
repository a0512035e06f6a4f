"""Reading the stream of a view in a test, with an end to each wait."""

from __future__ import annotations

import inspect
import time
import zlib
from collections import deque
from typing import TYPE_CHECKING, Any

from ..parser import EventStreamParser, ReceivedEvent
from ..stream import EventStream

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AsyncEventReader", "EventReader", "check_response"]

#: Seconds between looks at the clock. The stream wakes for an event at once: this is its heartbeat.
_TURN = 0.05
_AT_ONCE = 0.001


def check_response(response: Any, path: str) -> None:
    """Raise AssertionError unless it is an event stream, as a browser wants it."""
    content_type = response.headers.get("Content-Type", "")
    if response.status_code == 200 and content_type.startswith("text/event-stream"):
        return
    body = b"(a stream)" if response.streaming else response.content[:2000]
    response.close()
    raise AssertionError(
        f"{path} answered {response.status_code} with {content_type or 'no content type'}, "
        f"not 200 with text/event-stream: {body.decode(errors='replace')}"
    )


class _Reader:
    """What both kinds of readers have."""

    def __init__(self, response: Any) -> None:
        self.response = response
        """The view's response."""
        self.events: list[ReceivedEvent] = []
        """All events that were received, those that `next` and `read` gave included."""
        self.is_ended = False
        """Whether the stream was read to its end."""
        if not getattr(response, "streaming", False):
            raise TypeError(f"a reader needs a streaming response, not {response!r}")
        self._iterator: Any = response._iterator
        self._stream = _stream_of(response)
        self._parser = EventStreamParser()
        is_compressed = response.headers.get("Content-Encoding") == "gzip"
        self._unzip = zlib.decompressobj(zlib.MAX_WBITS + 16) if is_compressed else None
        self._ahead: deque[ReceivedEvent] = deque()

    @property
    def last_event_id(self) -> str:
        """What a browser that reconnects now sends as its ``Last-Event-ID``."""
        return self._parser.last_event_id

    @property
    def retry(self) -> int | None:
        """The milliseconds after which a browser reconnects, as the stream has set them."""
        return self._parser.retry

    def _turn(self, seconds: float) -> None:
        if self._stream is not None:
            self._stream._set_heartbeat(max(min(seconds, _TURN), _AT_ONCE))

    def _feed(self, chunk: bytes) -> bool:
        """Take a chunk; whether it says that nothing waits."""
        if self._unzip is not None:
            chunk = self._unzip.decompress(chunk)
        events = self._parser.feed(chunk)
        self.events += events
        self._ahead += events
        return not events and self._parser.comments == [" heartbeat"]

    def _none_within(self, timeout: float) -> Exception:
        so_far = f"received so far: {self.events}"
        if self.is_ended:
            return EOFError(f"the stream has ended; {so_far}")
        return TimeoutError(f"no event within {timeout:g} s; {so_far}")

    def _take_all(self) -> list[ReceivedEvent]:
        taken = list(self._ahead)
        self._ahead.clear()
        return taken


class EventReader(_Reader):
    """Reads the events of a view's response, and closes it as the ``with`` block ends.

    ``with EventReader(view(request)) as stream: ...``; `connect` makes one of a test client's. All
    is done in the calling thread, so that a first payload of the ORM sees the test's transaction.

    Raises:
        TypeError: a response that does not stream, is asynchronous (`AsyncEventReader` reads it),
            or whose stream is none of this library's: its waits could not have an end.
    """

    def __init__(self, response: Any) -> None:
        super().__init__(response)
        if response.is_async:
            raise TypeError("the response is asynchronous: read it with aconnect, AsyncEventReader")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def next(self, timeout: float = 5.0) -> ReceivedEvent:
        """Wait for the next event.

        Raises:
            TimeoutError: none came within `timeout` seconds; the stream can be read on.
            EOFError: the stream has ended, and all its events were given.
        """
        deadline = time.monotonic() + timeout
        while not self._ahead:
            left = deadline - time.monotonic()
            if left <= 0 or self._step(left) is None:
                raise self._none_within(timeout)
        return self._ahead.popleft()

    def read(self, count: int | None = None, timeout: float = 5.0) -> list[ReceivedEvent]:
        """Read `count` events, or without a count all that are there, without waiting.

        Raises:
            TimeoutError: not all came within `timeout` seconds. None of them is lost: they are
                what is read next.
            EOFError: the stream ended before.
        """
        if count is None:
            while self._step(0) is False:
                pass
            return self._take_all()
        deadline = time.monotonic() + timeout
        while len(self._ahead) < count:
            left = deadline - time.monotonic()
            if left <= 0 or self._step(left) is None:
                raise self._none_within(timeout)
        return [self._ahead.popleft() for _ in range(count)]

    def close(self) -> None:
        """Close the response, as a server does when its client has left."""
        if inspect.isgenerator(self._iterator):
            # The test client's, which closes the response if it was begun.
            self._iterator.close()
            if self._stream is not None and self._stream.closed:
                return
        _close(self.response)

    def _step(self, seconds: float) -> bool | None:
        """Read one chunk; whether nothing waits, None at the end."""
        self._turn(seconds)
        for chunk in self._iterator:
            return self._feed(chunk)
        self.is_ended = True
        return None


class AsyncEventReader(_Reader):
    """`EventReader` for an asynchronous response; `aconnect` makes one of a test client's."""

    def __init__(self, response: Any) -> None:
        super().__init__(response)
        if not response.is_async:
            raise TypeError("the response is synchronous: read it with connect, EventReader")
        self._chunks = aiter(self._iterator)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def next(self, timeout: float = 5.0) -> ReceivedEvent:
        """Wait for the next event.

        Raises:
            TimeoutError, EOFError: as `EventReader.next`.
        """
        deadline = time.monotonic() + timeout
        while not self._ahead:
            left = deadline - time.monotonic()
            if left <= 0 or await self._step(left) is None:
                raise self._none_within(timeout)
        return self._ahead.popleft()

    async def read(self, count: int | None = None, timeout: float = 5.0) -> list[ReceivedEvent]:
        """Read `count` events, or without a count all that are there, without waiting.

        Raises:
            TimeoutError, EOFError: as `EventReader.read`.
        """
        if count is None:
            while await self._step(0) is False:
                pass
            return self._take_all()
        deadline = time.monotonic() + timeout
        while len(self._ahead) < count:
            left = deadline - time.monotonic()
            if left <= 0 or await self._step(left) is None:
                raise self._none_within(timeout)
        return [self._ahead.popleft() for _ in range(count)]

    async def aclose(self) -> None:
        """Close the response, as a server does when its client has left."""
        if inspect.isasyncgen(self._iterator):
            await self._iterator.aclose()
            if self._stream is not None and self._stream.closed:
                return
        _close(self.response)

    async def _step(self, seconds: float) -> bool | None:
        self._turn(seconds)
        async for chunk in self._chunks:
            return self._feed(chunk)
        self.is_ended = True
        return None


def _stream_of(response: Any) -> EventStream | None:
    """The stream behind a response, whatever middleware and the test client put around it."""
    if hasattr(response, "_stream"):
        # None for one that had no place, and tells just that.
        found: EventStream | None = response._stream
        return found
    for closer in response._resource_closers:
        owner = getattr(closer, "__self__", None)
        if isinstance(owner, EventStream):
            return owner
    raise TypeError(
        "the response streams, but is neither an EventStreamResponse nor made of channel.stream()"
    )


def _close(response: Any) -> None:
    from django.core.signals import request_finished
    from django.db import close_old_connections

    # As the test client does it: a test's connections stay open.
    request_finished.disconnect(close_old_connections)
    try:
        response.close()
    finally:
        request_finished.connect(close_old_connections)
