"""Channels: publish to them, listen to them, stream them."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from . import _sse_channel, rendering
from .config import bus_shown, options, shown
from .control import disconnect, user_key
from .event import Event, check_text, encode_frame, envelope, text_of, to_fields, to_json
from .offload import refused
from .prepared import unsent
from .queue import ClientQueue
from .stream import EventStream, open_stream
from .waiting import close_at_exit

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Overflow", "SSEChannel", "sse_channel", "stats"]

#: What happens to an event for which a client has no room.
Overflow = Literal["drop_oldest", "drop_newest", "disconnect"]


class SSEChannel:
    """A channel: what is published to it reaches every client that listens.

    With a name it is the same channel in every process on the bus; messages travel as JSON and are
    decoded at most once a process, so that all its queues get one shared object: treat it as
    read-only. Without a name it is private to this object and process, and queues get the very
    object that was published. History keeps those objects alive (``history=0`` keeps none), and the
    garbage collector does not see into it. When the last reference to a private channel is gone,
    its clients are closed.

    Safe to use from any thread, greenlet or asyncio loop at any time. Publishing races with
    `listen` and `unlisten` so: a client gets exactly the events ordered after it was registered
    and before it was removed, in one order that is the same for all clients of all processes. (On
    `redis://` a new client may also get events of other processes that were under way to this one.)

    A copy of it (`copy`, `deepcopy`) is itself. One with a name can be pickled: it is the channel
    of that name, on the bus of the process that loads it.

    A subclass may have a `publish` of its own, which `publish_on_commit` calls too. `apublish` does
    not call it, since it could hold up the loop: such a subclass has both.

    A forked child may use the same object. It begins with no clients, and on `memory://` and for a
    private channel with an empty history.

    Args:
        name: the channel's name, 1 to 255 bytes of UTF-8; None for a private channel.
        capacity: events that wait for one client at the most; a queue costs that memory only
            when used.
        overflow: what happens to an event for which a client has no room: ``"drop_oldest"``,
            ``"drop_newest"``, or ``"disconnect"``, which ends the client after what is left.
            Each drop is counted.
        history: events remembered for clients that come back, within `HISTORY_AGE` and
            `HISTORY_BYTES` (64 MiB for a private channel); of several objects for one name, the
            largest holds.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument that cannot be.
    """

    __slots__ = ("__weakref__", "_capacity", "_core", "_history", "_is_named", "_overflow")

    def __init__(
        self,
        name: str | None = None,
        *,
        capacity: int = 1000,
        overflow: Overflow = "drop_oldest",
        history: int = 1000,
    ) -> None:
        if name is not None:
            if not isinstance(name, str):
                raise TypeError(f"name must be a str or None, not {type(name).__name__}")
            if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= 255:
                raise ValueError(f"name must have 1 to 255 bytes, not {name!r}")
            if name.startswith(_sse_channel.OWN_CHANNELS):
                raise ValueError(f"the channel {name!r} is the library's own; choose another name")
        self._capacity = _count(capacity, "capacity", 1)
        self._history = _count(history, "history", 0)
        check_overflow(overflow)
        self._overflow = overflow
        self._is_named = name is not None
        self._core = _sse_channel.Channel(name, self._history)

    @property
    def name(self) -> str | None:
        """The name, None for a private channel."""
        return self._core.name

    def __repr__(self) -> str:
        return f"<SSEChannel {self.name!r}, {len(self.listeners)} listeners>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Its name and what it was made with; of a subclass what its ``__dict__`` has, too.

        Raises:
            TypeError: a private channel.
        """
        if self.name is None:
            raise TypeError(
                "a private channel is this process's alone and cannot be pickled; give it a name"
            )
        made_with = (self.name, self._capacity, self._overflow, self._history)
        return _again, (type(self), *made_with), getattr(self, "__dict__", None) or None

    def publish(self, message: Any | Event, *, event: str | None = None) -> str:
        """Send `message` to every client that listens now, and remember it.

        A `str` goes as it is, and one of Django's lazy ones (`gettext_lazy`) as what it is now, in
        the language of the caller. Anything else goes as JSON, by Django's encoder when Django is
        configured (datetime, Decimal, UUID). `Event` gives control of the other fields. On a
        private channel an object that JSON cannot carry is sent too, to queues, as long as no
        stream is open on it.

        Returns when the bus has ordered and stored the event, and this process's own clients have
        it: what follows, the end of the process included, loses nothing. Where that takes time, a
        thread waits with the GIL released and a greenlet lets its hub run others; in a coroutine,
        `apublish` is the one to await. It never waits for a client: an event for which one has no
        room meets its overflow policy.

        Args:
            message: what to send.
            event: the event name that browsers dispatch; ``"message"`` when None.

        Returns:
            The event's id, ``"ms-n"``: milliseconds since the epoch, then a counter.

        Raises:
            TypeError: a message that JSON cannot carry, or an event name that is no `str`.
            ValueError: text that UTF-8 cannot carry (a lone surrogate), NaN or an infinity, an
                event name with CR, LF or NUL or one that is the browser's own (``"error"``,
                ``"open"``), or an event over `MAX_EVENT_BYTES`. Nothing was sent then.
            BusError: the bus cannot order and store the event, or did not within
                `PUBLISH_TIMEOUT`; nothing was sent, unless it says that it may have been.
        """
        if self._is_named and not isinstance(message, Event):
            # The usual case, and the shortest way.
            check_text(event, "event")
            text = text_of(message)
            in_force = options()
            return self._core.publish(
                to_json(message) if text is None else text,
                json=text is None,
                event=event,
                retry=None,
                comment=None,
                limit=in_force.max_event_bytes,
                timeout=in_force.publish_timeout,
                message=None,
            )
        sent = envelope(message, event)
        try:
            fields = to_fields(sent)
        except (TypeError, ValueError):
            if self.name is not None:
                raise
            # The object itself may have no wire form; its other fields still must be right.
            encode_frame(type(sent)("", event=sent.event, retry=sent.retry, comment=sent.comment))
            event_id = self._core.publish_object(sent.data)
            if event_id is None:
                raise
            return event_id
        return self._core.publish(
            fields.data,
            json=fields.json,
            event=fields.event,
            retry=fields.retry,
            comment=fields.comment,
            limit=options().max_event_bytes,
            timeout=options().publish_timeout,
            message=sent.data if self.name is None and fields.data is not None else None,
        )

    async def apublish(self, message: Any | Event, *, event: str | None = None) -> str:
        """`publish`, awaitable: while the bus is waited for, the loop runs others.

        Cancelled before the bus has begun with the event, nothing is sent; after that it is, like
        any other.

        Raises:
            TypeError, ValueError, BusError: as `publish`.
        """
        if self.name is None:
            return self.publish(message, event=event)
        fields = to_fields(envelope(message, event))
        published = self._core.publish_later(
            fields.data,
            json=fields.json,
            event=fields.event,
            retry=fields.retry,
            comment=fields.comment,
            limit=options().max_event_bytes,
            timeout=options().publish_timeout,
        )
        if isinstance(published, str):
            return published
        close_at_exit()
        return await published

    def listen(self, *, last_event_id: str | None = None) -> ClientQueue:
        """Listen from now on: a queue of what is published, until `unlisten` or its `close`.

        The channel holds the queue, even when nobody else does.

        Args:
            last_event_id: go on after this event. What was missed waits in the queue, beyond
                its capacity if need be. When it cannot be given exactly, ``queue.reset`` says
                why: ``"too-old"`` (what history still has waits in the queue), ``"future"`` or
                ``"unknown"`` (nothing of history does).

        Raises:
            TypeError: a `last_event_id` that is no `str`.
            BusError: the bus cannot be reached, or its history not be read.
        """
        check_text(last_event_id, "last_event_id")
        queue = ClientQueue(self._capacity, self._overflow)
        close_at_exit()
        _sse_channel.register(queue, [self._core], last_event_id, 0, options().publish_timeout)
        return queue

    async def alisten(self, *, last_event_id: str | None = None) -> ClientQueue:
        """`listen`, awaitable: a channel's first client of a process may have to wait for the bus.

        Raises:
            TypeError, BusError: as `listen`.
        """
        check_text(last_event_id, "last_event_id")
        pending = _sse_channel.prepare([self._core], last_event_id, options().publish_timeout)
        if pending is not None:
            close_at_exit()
            await pending
        return self.listen(last_event_id=last_event_id)

    def unlisten(self, queue: object) -> None:
        """Remove a client that `listen` or `stream` gave, and close it.

        What is left in a queue can still be read; then `ChannelClosed` follows, which is a
        `queue.Empty`. Waiting readers are woken. Twice, or with a stranger's queue, it does
        nothing.
        """
        if isinstance(queue, _sse_channel.Client):
            self._core.unlisten(queue)

    def disconnect(self, *, user: object = None) -> None:
        """End the streams of this channel, in every process: for a right that was taken away.

        See the function `disconnect` of the package.

        Args:
            user: those of this user alone.

        Raises:
            ValueError: a user without a primary key.
            BusError: the bus cannot be reached.
        """
        if self.name is None:
            self._core.revoke(None if user is None else user_key(user))
        else:
            disconnect(user=user, channel=self.name)

    @property
    def listeners(self) -> Listeners:
        """The clients that listen now, as a read-only sequence that follows the changes."""
        return Listeners(self._core)

    def stream(
        self,
        *,
        last_event_id: str | None = None,
        heartbeat: float | None = 10.0,
        initial: Any = None,
        render: Callable[[Any], Any] | None = None,
        key: Hashable | None = None,
    ) -> EventStream:
        """Open a stream of frames, as bytes for a server, from now on.

        Args:
            last_event_id: go on after this event: what was missed comes first. When it cannot
                be given exactly, an ``event: stream-reset`` does, whose data says why:
                ``"too-old"`` (then what history still has), ``"future"`` (the id is newer than
                the newest event) or ``"unknown"`` (it is no id of ours): then what is live.
            heartbeat: seconds of idleness after which a comment is sent; None for never.
            initial: the first payload, sent to a client that begins (not to one that resumes
                exactly): a message as for `publish`, or a callable that gives one, called once
                when the opening has been sent. It may give None for nothing, and may be
                asynchronous where the stream is iterated so. Events that come meanwhile follow.
            render: turns a message into what is sent in its place: a message as for `publish`
                (which keeps the event name of its source), an `Event`, or None for nothing. It is
                called once for each event and `key`, however many clients there are, in a thread
                of the process (a greenlet under gevent); in the order of the events, and for what
                a client missed, too, if nobody in this process has rendered that yet. It knows
                nothing of the request, and may be asynchronous, on asyncio and in threads that
                gevent has not patched. When it raises, the error is logged and counted, and the
                clients get an ``event: stream-error`` in the event's place.
            key: which clients share what `render` makes: those that open a stream of the same
                channels with an equal `key` and the same function. Of a partial, a closure or a
                method, which may differ from client to client, it must be given.

        Raises:
            TypeError: a `last_event_id` that is no `str`; a `render` that cannot be called, or is
                asynchronous where it cannot be; a `key` that cannot be hashed, or one without a
                `render`.
            ValueError: a partial, a closure or a method as `render` without a `key`.
            TypeError, ValueError: an `initial` message (not a callable) that `publish` would
                refuse.
            ValueError: a `heartbeat` that is not more than 0 seconds.
            BusError: the bus cannot be reached, or its history not be read. On a running asyncio
                loop, where the bus has to be waited for, it is the first step that opens the
                stream, and raises this.
        """
        return open_stream(
            [self._core],
            capacity=self._capacity,
            overflow=self._overflow,
            last_event_id=last_event_id,
            heartbeat=heartbeat,
            initial=initial,
            render=render,
            key=key,
        )

    def stats(self) -> dict[str, Any]:
        """What happened on this channel in this process; the same keys as one of `stats`."""
        return self._core.figures()


class Listeners(Sequence[ClientQueue | EventStream]):
    """The clients of a channel: a read-only view. Iterating takes a snapshot.

    Offloaded connections are counted by `len` (and so by truth), but have no object to iterate.
    """

    __slots__ = ("_core",)

    def __init__(self, core: _sse_channel.Channel) -> None:
        self._core = core

    def __len__(self) -> int:
        return self._core.listener_count()

    def __contains__(self, client: object) -> bool:
        return isinstance(client, _sse_channel.Client) and self._core.has_listener(client)

    def __iter__(self) -> Iterator[ClientQueue | EventStream]:
        return iter(self._core.listeners())

    def __reversed__(self) -> Iterator[ClientQueue | EventStream]:
        return reversed(self._core.listeners())

    @overload
    def __getitem__(self, index: int) -> ClientQueue | EventStream: ...
    @overload
    def __getitem__(self, index: slice) -> list[ClientQueue | EventStream]: ...
    def __getitem__(
        self, index: int | slice
    ) -> ClientQueue | EventStream | list[ClientQueue | EventStream]:
        return self._core.listeners()[index]

    def __repr__(self) -> str:
        return f"<Listeners {self._core.listeners()!r}>"


def stats() -> dict[str, Any]:
    """A snapshot of this process.

    Returns:
        ``process``: the process id. ``bus``: its ``url`` (without a password), its ``lag`` (seconds
        between the ordering of the newest event that came from another process and its delivery
        here), publishes ``waiting`` for it, whether it is ``connected``, and its ``reconnects``.
        ``unsent``: events of `publish_on_commit` that it did not take.
        ``render``: ``renderings`` now, events ``rendered``, and ``errors`` raised by `render=`.
        ``clients``, ``published``, ``received``, ``delivered``, ``dropped``, ``bytes``,
        ``disconnected``: sums over all named channels. ``channels``: for each name, ``clients`` now
        by kind (``queue``, ``stream``), events ``published`` by this process, ``received`` from the
        bus for its clients (its own too), ``delivered`` (taken by a reader or a server) and
        ``dropped``, ``bytes`` of the frames taken by servers (compressed ones as they went out,
        without HTTP's chunks), clients ``disconnected`` by reason (``closed``, ``overflow``,
        ``abandoned``, ``exit``, ``revoked``, and for offloaded ones ``left``, ``timeout``,
        ``flood``), ``delay``, and ``history``: the ``events`` and ``bytes`` of it in this
        process's memory. Counts run from the start of the process.

        ``delay`` is a histogram of the time from an event's ordering (the milliseconds of its id)
        to its delivery: ``le``, the bounds of the buckets in seconds; ``counts``, for each bound
        the deliveries that took as long at the most and longer than the bound before, and at last
        those that took longer than all; ``sum``, seconds of all together. What a client missed and
        was given when it came back is not in it. With `redis://` it is measured between two
        machines' clocks.
    """
    channels = _sse_channel.figures()
    total: dict[str, Any] = {
        "process": os.getpid(),
        "bus": _sse_channel.bus_figures()
        or {
            "url": bus_shown(),
            "lag": 0.0,
            "waiting": 0,
            "connected": False,
            "reconnects": 0,
        },
        "unsent": sum(unsent.values()),
        "offload": {**_sse_channel.offload_figures(), "refused": dict(refused)},
        "render": rendering.figures(),
        "clients": {"queue": 0, "stream": 0, "socket": 0},
        "published": 0,
        "received": 0,
        "delivered": 0,
        "dropped": 0,
        "bytes": 0,
        "disconnected": dict.fromkeys(_sse_channel.REASONS, 0),
    }
    for figures in channels.values():
        for key, value in figures.items():
            if key in ("history", "delay"):
                continue
            if isinstance(value, dict):
                for part, count in value.items():
                    total[key][part] += count
            else:
                total[key] += value
    return {**total, "channels": channels}


def _again(
    made: type[SSEChannel], name: str, capacity: int, overflow: Overflow, history: int
) -> SSEChannel:
    """A channel out of a pickle, whatever arguments a subclass has."""
    channel = made.__new__(made)
    SSEChannel.__init__(channel, name, capacity=capacity, overflow=overflow, history=history)
    return channel


def check_overflow(overflow: object) -> None:
    """Refuse what names no overflow policy.

    Raises:
        TypeError: it is no text.
        ValueError: it is another text.
    """
    if not isinstance(overflow, str):
        raise TypeError(f"overflow must be a str, not {type(overflow).__name__}")
    if overflow not in ("drop_oldest", "drop_newest", "disconnect"):
        raise ValueError(
            f'overflow must be "drop_oldest", "drop_newest" or "disconnect", not {overflow!r}'
        )


def _count(value: object, name: str, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not smallest <= value < 1 << 63:
        raise ValueError(f"{name} must be at least {smallest} and below 2**63, not {shown(value)}")
    return value


#: The channel named ``"default"``.
sse_channel = SSEChannel("default")
