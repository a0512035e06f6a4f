"""What was published while a test ran."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from .. import _sse_channel
from ..channel import SSEChannel, sse_channel
from ..config import options
from ..parser import EventStreamParser
from ..queue import ClientQueue
from ..waiting import close_at_exit

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Captured", "PublishedEvent"]

#: Nothing that a test publishes is dropped; a queue costs memory only when used.
_CAPACITY = 1 << 30


class PublishedEvent(NamedTuple):
    """One event as it went out."""

    channel: str | None
    """The channel's name, None for a private one."""

    message: Any
    """What was published, as a queue gets it."""

    event: str
    """The event's name, ``"message"`` when it was published without one."""

    id: str


class Captured(Sequence[PublishedEvent]):
    """What was published to some channels, oldest first; made by `capture`.

    A sequence that grows as long as the ``with`` block lasts, and keeps what it has after it. It
    listens as a queue does, and so is one of the channel's `listeners` until then.
    """

    def __init__(self, channels: Iterable[SSEChannel | str]) -> None:
        chosen = [_channel(each) for each in channels] or [sse_channel]
        self._taken: list[PublishedEvent] = []
        self._queues: list[tuple[str | None, ClientQueue]] = []
        close_at_exit()
        for channel in chosen:
            queue = ClientQueue(_CAPACITY, "drop_oldest")
            timeout = options().publish_timeout
            _sse_channel.register(queue, [channel._core], None, 0, timeout)
            self._queues.append((channel.name, queue))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; what it has stays."""
        for _, queue in self._queues:
            queue.close()
        self._take()

    @property
    def messages(self) -> list[Any]:
        """The messages alone."""
        return [event.message for event in self._take()]

    @property
    def events(self) -> list[str]:
        """The events' names alone, ``"message"`` for each without one."""
        return [event.event for event in self._take()]

    @property
    def ids(self) -> list[str]:
        """The events' ids alone, as `publish` returned them."""
        return [event.id for event in self._take()]

    def clear(self) -> None:
        """Forget what it has."""
        self._take().clear()

    def wait(self, count: int = 1, timeout: float = 5.0) -> list[PublishedEvent]:
        """Wait until `count` events are there, for those that other processes publish.

        Raises:
            TimeoutError: they were not within `timeout` seconds; it says what was.
        """
        deadline = time.monotonic() + timeout
        while len(self._take()) < count:
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"{len(self._taken)} of {count} events within {timeout:g} s: {self._taken}"
                )
            time.sleep(0.005)
        return list(self._taken)

    def _take(self) -> list[PublishedEvent]:
        before = len(self._taken)
        for name, queue in self._queues:
            while (taken := queue._take_event()) is not None:
                event_id, frame, message = taken
                parsed = EventStreamParser().feed(frame)
                event = parsed[0].type if parsed else "message"
                self._taken.append(PublishedEvent(name, message, event, event_id or ""))
        if len(self._taken) > before and len(self._queues) > 1:
            # Ids rise over all channels.
            self._taken.sort(key=_place)
        return self._taken

    def __len__(self) -> int:
        return len(self._take())

    @overload
    def __getitem__(self, index: int) -> PublishedEvent: ...
    @overload
    def __getitem__(self, index: slice) -> list[PublishedEvent]: ...
    def __getitem__(self, index: int | slice) -> PublishedEvent | list[PublishedEvent]:
        return self._take()[index]

    def __repr__(self) -> str:
        return f"<Captured {self._take()!r}>"


def _channel(channel: object) -> SSEChannel:
    if isinstance(channel, str):
        return SSEChannel(channel)
    if isinstance(channel, SSEChannel):
        return channel
    raise TypeError(f"capture takes channels or their names, not {type(channel).__name__}")


def _place(event: PublishedEvent) -> tuple[int, ...]:
    return tuple(int(part) for part in event.id.split("-") if part)
