"""What tests of an application need: see what was published, read a view's stream, a fresh bus.

    from sse_channel.testing import capture, connect, memory_bus

    with capture("news") as published:
        client.post("/articles/", {"headline": "Rain"})
    assert published.messages == [{"headline": "Rain"}]

    with connect(client, "/stream/") as stream:
        sse_channel.publish("x")
        assert stream.next().data == "x"

Nothing here is replaced by a stand-in: events go through the bus. For pytest there are fixtures in
`sse_channel.testing.pytest_plugin`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ..parser import EventStreamParser, ReceivedEvent
from .captured import Captured, PublishedEvent
from .memory import MemoryBus
from .reader import AsyncEventReader, EventReader, check_response

__all__ = [
    "AsyncEventReader",
    "Captured",
    "EventReader",
    "EventStreamParser",
    "PublishedEvent",
    "ReceivedEvent",
    "aconnect",
    "capture",
    "connect",
    "memory_bus",
    "parse",
]


def capture(*channels: Any) -> Captured:
    """Collect what is published to `channels` from now on, until the `with` block ends.

    What this process publishes is there when `publish` has returned. What others publish comes when
    it comes: `Captured.wait` waits for it. An event without data, a comment alone, is left out.

    Args:
        channels: channels or their names; without any, the channel ``"default"``.

    Raises:
        TypeError: something that is neither a channel nor a name.
        BusError: as `SSEChannel.listen`.
    """
    return Captured(channels)


def connect(client: Any, path: str, data: Any = None, **request: Any) -> EventReader:
    """Open the stream of a view, as a browser does: a context manager that reads its events.

    Args:
        client: a `django.test.Client`.
        path, data, request: as for its method `get`; ``Accept: text/event-stream`` is set.

    Raises:
        AssertionError: the view answered anything but 200 and an event stream; it says what.
        TypeError: it answered with a stream that is none of this library's.
    """
    response = client.get(path, data, **_accepting(request))
    check_response(response, path)
    return EventReader(response)


@asynccontextmanager
async def aconnect(
    client: Any, path: str, data: Any = None, **request: Any
) -> AsyncIterator[AsyncEventReader]:
    """`connect` for a `django.test.AsyncClient`: an asynchronous context manager.

    Raises:
        AssertionError, TypeError: as `connect`.
    """
    response = await client.get(path, data, **_accepting(request))
    check_response(response, path)
    async with AsyncEventReader(response) as reader:
        yield reader


def parse(source: Any) -> list[ReceivedEvent]:
    """Parse the events of a stream, as a browser would dispatch them.

    Args:
        source: bytes or text of a stream; or a response: one of a view, of which what is there now
            is read without waiting, and which is closed then; or any that has its body as bytes in
            ``content``.

    Raises:
        TypeError: none of these, or an asynchronous response: `aconnect` reads that.
    """
    if isinstance(source, str):
        source = source.encode(errors="replace")
    if not isinstance(source, (bytes, bytearray, memoryview)):
        if getattr(source, "streaming", False):
            with EventReader(source) as reader:
                return reader.read()
        source = getattr(source, "content", source)
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise TypeError(
            f"a stream's bytes or a response can be parsed, not {type(source).__name__}"
        )
    return EventStreamParser().feed(bytes(source))


def memory_bus() -> MemoryBus:
    """Have an empty ``memory://`` bus within, whatever the settings say: nothing to clean up.

    A context manager, and a decorator: of functions, coroutine functions and generators (a fixture
    of pytest), for as long as they run, and of a `unittest.TestCase`, for each of its tests
    together with `setUp`, `tearDown` and clean-ups. It begins the bus of this process anew, and
    once more at its end: queues and streams that are open then are closed. Other processes do not
    hear it, while all threads and tasks of this one do.

    It comes before Django's settings. Outside of `override_settings(SSE_CHANNEL=...)` or within,
    the bus is this one, and the other options are the override's; one within that names another
    bus raises a ValueError, and nothing of it is applied.
    """
    return MemoryBus()


def _accepting(request: dict[str, Any]) -> dict[str, Any]:
    headers = {"Accept": "text/event-stream", **(request.get("headers") or {})}
    return {**request, "headers": headers}
