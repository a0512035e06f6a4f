"""The stream that a Python server iterates, with or without asyncio."""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import _sse_channel
from .clients import names_of, watch_clients
from .config import options
from .event import check_text, encode_frame
from .rendering import Renderer, Rendering, on_threads
from .server_stop import watch_server
from .waiting import close_at_exit, wait

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EventStream", "open_stream"]


class EventStream(_sse_channel.Stream):
    """The bytes of an event stream for one client: an iterator, and an async iterator.

    Each step gives one or more whole frames: first the opening (``retry:`` and the cursor as an
    ``id:`` without data), a ``stream-reset`` event if the client cannot be given exactly what it
    missed, the `initial` payload, then what is missed and what is published. A comment follows
    whenever nothing was for `heartbeat` seconds.

    It listens from the moment it is made and ends, unlistening, at the first of: `close`, an
    exception raised through a waiting step (`CancelledError`, `GreenletExit`, `KeyboardInterrupt`:
    as a generator ends), the last reference gone, the stop of gunicorn or uvicorn, the
    interpreter's exit. At the last two it gives what waits, and then ``retry:`` with a time of its
    own. Use it from one task or thread at a time; `close` may come from anywhere and ends a waiting
    step.

    Made by `SSEChannel.stream`, not by hand.
    """

    __slots__ = ()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._next_chunk()
        except StopAsyncIteration:
            raise
        except BaseException:
            self.close()
            raise

    async def _next_chunk(self) -> bytes:
        waited = False
        opener = self._take_opener()
        if opener is not None:
            await opener.open()
        while True:
            step = self._step()
            if step is None:
                raise StopAsyncIteration
            if callable(step):
                try:
                    first = step(True)
                    if inspect.isawaitable(first):
                        first = await first
                except (StopIteration, StopAsyncIteration) as error:
                    # As in a generator: it must not look like the end of the stream.
                    raise RuntimeError(f"initial raised {type(error).__name__}") from error
                if first:
                    return self._coded(first)
            elif step:
                return step
            elif waited:
                return self._coded(_sse_channel.HEARTBEAT)
            else:
                await wait(self, self.heartbeat)
                waited = True

    async def aclose(self) -> None:
        """Close it; `contextlib.aclosing` calls this."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()


def open_stream(
    channels: Sequence[_sse_channel.Channel],
    *,
    capacity: int,
    overflow: str,
    last_event_id: str | None,
    heartbeat: float | None,
    initial: Any,
    render: Any = None,
    key: Any = None,
    most: tuple[int, int, int] | None = (0, 0, 0),
    user: str | None = None,
    address: str | None = None,
) -> EventStream:
    """Make a stream and register it with `channels`, which must be of one bus.

    Args:
        most: streams of the process, of one user and of one address; 0 for no limit. None for one
            that is none of those that are counted.
        user: whose it is.
        address: where it came from.

    Raises:
        queue.Full: there are so many already; its argument says of what: ``"full"`` (the process),
            ``"user"`` or ``"address"``.
    """
    check_text(last_event_id, "last_event_id")
    if render is None and key is not None:
        raise TypeError("key= says which clients share what render= makes; give render= as well")
    renderer = None if render is None else Renderer(channels, render, key)
    watch_server()
    first = None if initial is None else _first_payload(initial)
    stream = EventStream(
        capacity,
        overflow,
        heartbeat,
        most=most,
        user=user,
        address=address,
        channels=names_of(channels) if watch_clients() else None,
    )
    close_at_exit()
    timeout = options().publish_timeout
    weak = weakref.ref(stream)

    def begin(opened: EventStream, gap: str | None) -> None:
        resumed = bool(last_event_id) and gap is None
        if first is not None and not resumed:
            opened._set_initial(first)

    def register() -> None:
        opened = weak()
        if opened is None or opened.closed:
            return
        retry = options().retry
        if renderer is None:
            gap = _sse_channel.register(opened, list(channels), last_event_id, retry, timeout)
        else:
            gap = renderer.register(opened, last_event_id, retry, timeout)
        begin(opened, gap)

    def registering(renderer: Renderer) -> Iterator[Rendering]:
        opened = weak()
        if opened is None or opened.closed:
            return
        retry = options().retry
        begin(opened, (yield from renderer.registering(opened, last_event_id, retry, timeout)))

    try:
        if asyncio._get_running_loop() is not None and not stream.closed:
            # Waiting for the bus here would hold up the loop.
            pending = _sse_channel.prepare(list(channels), last_event_id, timeout)
            if pending is not None:
                pending.add_done_callback(_look_at)
            # To render what was missed would hold up the loop as well.
            steps = registering(renderer) if renderer is not None and last_event_id else None
            if pending is not None or steps is not None:
                stream._set_opener(_Opener(weak, pending, register, steps))
                return stream
        register()
    except BaseException:
        # Somebody may hold the error, and with it the stream's place among those that are counted.
        stream.close()
        raise
    return stream


def _look_at(pending: asyncio.Future[None]) -> None:
    """Take note of an exception that nobody may ever ask for: that of a stream never iterated."""
    if not pending.cancelled():
        pending.exception()


class _Opener:
    """Opens a stream at its first step, when the bus has prepared it."""

    __slots__ = ("pending", "register", "steps", "stream")

    def __init__(
        self,
        stream: weakref.ref[EventStream],
        pending: asyncio.Future[None] | None,
        register: Callable[[], None],
        steps: Iterator[Rendering] | None,
    ) -> None:
        self.stream = stream
        self.pending = pending
        self.register = register
        # In place of `register`, when that takes its time.
        self.steps = steps

    def __call__(self) -> None:
        """Open it from a thread, waiting there."""
        self.register()

    async def open(self) -> None:
        """Open it on the loop."""
        if self.pending is not None:
            await self.pending
        stream = self.stream()
        if self.steps is None or stream is None:
            self.register()
            return
        done = on_threads(self.steps)
        # It may be closed meanwhile, by the stop of the server for one.
        closed = asyncio.ensure_future(wait(stream, None))
        try:
            await asyncio.wait([done, closed], return_when=asyncio.FIRST_COMPLETED)
            if done.done() or not stream.closed:
                await done
        finally:
            closed.cancel()
            done.cancel()


def _first_payload(initial: Any) -> Callable[[bool], bytes | Awaitable[bytes]]:
    """Make the callable that gives the first payload's bytes, b"" for none.

    Its argument says whether somebody can await it.
    """

    def frame(message: Any) -> bytes:
        return b"" if message is None else encode_frame(message)

    async def awaited(pending: Awaitable[Any]) -> bytes:
        return frame(await pending)

    if not callable(initial):
        # At once: what cannot be sent is told before the response has begun.
        ready = frame(initial)
        return lambda _: ready

    def first(is_async: bool) -> bytes | Awaitable[bytes]:
        message = initial()
        if not inspect.isawaitable(message):
            return frame(message)
        if is_async:
            return awaited(message)
        if inspect.iscoroutine(message):
            message.close()
        raise TypeError(
            "initial is asynchronous, but the stream is iterated synchronously; "
            "make initial a plain function, or iterate with 'async for'"
        )

    return first
