"""The extension: mechanism for the classes of `sse_channel`, which are what to use."""

from asyncio import Future
from collections.abc import Awaitable, Callable
from queue import Empty
from typing import Any, Final, Literal, final

from typing_extensions import Self, disjoint_base

from .queue import ClientQueue
from .stream import EventStream, _Opener

__all__ = [
    "ANSWERS_CHANNEL",
    "ANSWERS_FORM",
    "CONTROL_CHANNEL",
    "DELAY_BOUNDS",
    "HEARTBEAT",
    "OWN_CHANNELS",
    "REASONS",
    "RESET_EVENT",
    "BusError",
    "Channel",
    "ChannelClosed",
    "Client",
    "Parking",
    "Queue",
    "Rendering",
    "SourceEvent",
    "Stream",
    "__version__",
    "after_fork",
    "ask",
    "ask_later",
    "before_fork",
    "begin_bus_anew",
    "bus_figures",
    "bus_url",
    "check_bus",
    "close_all",
    "count_refused",
    "encode_frame",
    "end_streams",
    "figures",
    "forked",
    "host_figures",
    "host_view",
    "offload",
    "offload_figures",
    "prepare",
    "presence",
    "register",
    "revocations",
    "unwatch",
    "watch_streams",
]

__version__: Final[str]

ANSWERS_CHANNEL: Final[str]
"""The name of the channel on which processes answer what another one has asked."""

ANSWERS_FORM: Final[int]
"""The form of answers: those of processes of another version may have another one."""

CONTROL_CHANNEL: Final[str]
"""The name of the channel by which processes tell each other of clients."""

DELAY_BOUNDS: Final[list[float]]
"""The upper bounds of the buckets of the delivery delay but the last, in seconds."""

HEARTBEAT: Final[bytes]
"""What an idle stream carries: a comment, which browsers do not dispatch."""

OWN_CHANNELS: Final[str]
"""What the names of the library's own channels begin with."""

REASONS: Final[list[str]]
"""Why clients are disconnected, as `stats` counts them."""

RESET_EVENT: Final[str]
"""The event name that tells a client that it missed events it cannot be given."""

class BusError(OSError):
    """The bus cannot be used, or did not answer in time; the message says why and what to do.

    An ``OSError``. Nothing was sent, unless the message says that it may have been.
    """

class ChannelClosed(Empty):
    """The queue is closed and nothing is left in it.

    A subclass of ``queue.Empty``, for code that catches only that.
    """

@disjoint_base
class Client:
    """A client of a channel, whoever reads it."""

    @property
    def closed(self) -> bool:
        """Whether it gets nothing more; what is left can still be read.

        True in a process that was forked from the one that made it.
        """

    @property
    def dropped(self) -> int:
        """Events that it lost because it had no room for them."""

    @property
    def reset(self) -> str | None:
        """Why it was not given exactly what came after its last event id; None if it was.

        ``"too-old"``: history does not reach back so far, or the bus lost events while it listened.
        ``"future"``: the id is newer than the newest event. ``"unknown"``: it is no id of ours.
        """

    def _park(self, parking: Parking, future: object, timeout: float | None) -> int | None:
        """Have `parking` resume `future` when there is something, or after `timeout` seconds.

        None when there is something already; then nothing is resumed.
        """

    def _unpark(self, parking: Parking, token: int) -> None:
        """Take it back. A wake-up that it had got already is passed on to the next waiter."""

@disjoint_base
class Queue(Client):
    """A client whose messages Python code takes: the reading side of `queue.Queue`."""

    def __new__(cls, capacity: int, overflow: str) -> Self: ...
    def get(self, block: object = True, timeout: float | None = None) -> Any:
        """Take the oldest message, waiting for one if `block`.

        A thread waits with the GIL released, a greenlet lets its hub run others; in the main
        thread, signals (Ctrl-C) interrupt the wait. What raises out of it leaves the message in
        the queue. In a coroutine it would block the loop: `aget` is for there.

        Args:
            block: whether to wait at all.
            timeout: seconds to wait; None waits for ever.

        Raises:
            queue.Empty: nothing came within `timeout`, or there is nothing and `block` is false,
                or it is called from a callback of gevent's hub, which cannot wait.
            ChannelClosed: the queue is closed and nothing is left in it.
            TypeError: a `timeout` that is no number.
            ValueError: a negative `timeout`.
        """

    def _take_event(self) -> tuple[str | None, bytes, Any] | None:
        """Without waiting: the oldest event's id, frame and message, or None. For tests.

        The frame is b"" for an object that has no wire form.
        """

    def get_nowait(self) -> Any:
        """Take the oldest message without waiting.

        Raises:
            queue.Empty: there is none.
            ChannelClosed: the queue is closed and nothing is left in it.
        """

    def put_nowait(self, item: object) -> None:
        """Put `item` into this queue alone.

        Raises:
            queue.Full: it holds `maxsize` messages, whatever the overflow policy.
            ChannelClosed: it is closed.
        """

    def qsize(self) -> int:
        """How many messages wait now."""

    def empty(self) -> bool:
        """Whether no message waits now."""

    def full(self) -> bool:
        """Whether the next message finds no room."""

    @property
    def maxsize(self) -> int:
        """How many messages may wait, not counting those replayed by `listen`."""

    def close(self) -> None:
        """Stop listening, and wake who waits; twice is no error."""

    def _tell_closed(self) -> bool:
        """Whether a reader was told of the close before; from now on one was."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> Any:
        """Take the oldest message, waiting for ever; the iteration ends with the close."""

@disjoint_base
class Stream(Client):
    """A client whose frames a Python server takes."""

    def __new__(
        cls,
        capacity: int,
        overflow: str,
        heartbeat: float | None,
        *,
        most: tuple[int, int, int] | None = (0, 0, 0),
        user: str | None = None,
        address: str | None = None,
        channels: str | None = None,
    ) -> Self:
        """Make one, if the process has less than `most` (0: however many it has).

        Raises:
            queue.Full: it has as many.
        """

    @property
    def heartbeat(self) -> float | None:
        """Seconds of idleness after which a comment is sent; None for never."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> bytes:
        """One or more whole frames, waiting for them in the way of the caller, as `Queue.get`.

        What is raised while it waits, or by the first payload's callable, ends the stream.
        """

    def close(self) -> None:
        """End the stream at once: a waiting step ends, what waits is not sent."""

    def _step(self) -> bytes | Callable[[bool], bytes | Awaitable[bytes]] | None:
        """Without waiting: bytes (b"" for none yet), the first payload's callable, or the end."""

    def _compress(self) -> None:
        """Have it give a gzip stream: to be called before its first step."""

    @property
    def _is_compressed(self) -> bool:
        """Whether it gives a gzip stream."""

    def _coded(self, frames: bytes) -> bytes:
        """Frames from elsewhere as this stream gives them, in their place."""

    def _set_heartbeat(self, heartbeat: float) -> None:
        """Change the seconds of idleness after which a step gives a comment, for tests."""

    def _set_opener(self, opener: _Opener) -> None:
        """Have the first step open the stream by calling `opener`."""

    def _take_opener(self) -> _Opener | None:
        """What opens the stream, given once; None for one that is open, or closed already."""

    def _take_initial(self) -> Callable[[bool], bytes | Awaitable[bytes]] | None:
        """Give the callable of the first payload, once: its argument says whether one can await."""
    def _set_initial(self, initial: Callable[[bool], bytes | Awaitable[bytes]]) -> None:
        """Set the callable that makes the first payload; it is told whether it may be awaited."""

@final
class Channel:
    """A channel by name, or a private one without."""

    def __new__(cls, name: str | None, history: int) -> Self: ...
    @property
    def name(self) -> str | None: ...
    def publish(
        self,
        data: str | None,
        *,
        json: bool,
        event: str | None,
        retry: int | None,
        comment: str | None,
        limit: int,
        timeout: float,
        message: object | None,
    ) -> str:
        """Encode, order and fan out an event; its id."""

    def publish_later(
        self,
        data: str | None,
        *,
        json: bool,
        event: str | None,
        retry: int | None,
        comment: str | None,
        limit: int,
        timeout: float,
    ) -> str | Awaitable[str]:
        """`publish` for asyncio: the id, or an awaitable for it. Not for private channels."""

    def publish_object(self, message: object) -> str | None:
        """Send an object without a wire form to queues; None, and nothing sent, if streams are
        open."""

    def number(self) -> int:
        """What tells it from all other channels of the process."""

    def revoke(self, user: str | None) -> None:
        """Disconnects the streams of this channel, those of `user` alone if one is given; what
        waits for them is not sent. In this process.
        """

    def listener_count(self) -> int: ...
    def listeners(self) -> list[ClientQueue | EventStream]: ...
    def has_listener(self, client: Client) -> bool: ...
    def unlisten(self, client: Client) -> bool: ...
    def figures(self) -> dict[str, Any]: ...

@final
class SourceEvent:
    """An event of a source, to be rendered."""

    @property
    def message(self) -> Any:
        """The message, the same object for every reader of this process."""

    @property
    def has_message(self) -> bool:
        """Whether it has one: a comment or a reconnection time alone is passed on as it is."""

    @property
    def event(self) -> str | None:
        """The event name."""

    @property
    def id(self) -> str | None: ...

@disjoint_base
class Rendering(Client):
    """What the events of some channels are turned into, for all clients that share it. As a client
    of those channels it takes their events.
    """

    def __new__(cls, capacity: int, *_args: object, **_kwargs: object) -> Self: ...
    def begin(self, channels: list[Channel], desk: Queue, timeout: float) -> None:
        """Begins: from now on it is put into `desk` when it has something to take."""

    def take(self) -> SourceEvent | None:
        """The next event of the sources, None when there is none now."""

    def waiting(self) -> int:
        """Events that wait to be taken."""

    def rest(self) -> None:
        """After all that was taken: it is put into the desk again when there is more."""

    def put(
        self,
        source: SourceEvent,
        data: str | None,
        *,
        json: bool,
        event: str | None,
        retry: int | None,
        comment: str | None,
        limit: int,
        back: bool,
    ) -> None:
        """Gives the clients what became of `source`, under its id. With `back`, it is from before
        the beginning, and kept until `read_back`.
        """

    def skip(self, source: SourceEvent, back: bool) -> None:
        """`source` gives the clients nothing."""

    def pass_on(self, source: SourceEvent, back: bool) -> None:
        """Gives the clients `source` as it is."""

    def lose(self, next: SourceEvent) -> None:
        """Tells the clients that events were lost before `next`."""

    def lacks(self, last_event_id: str) -> bool:
        """Whether something must be rendered before a client can resume after `last_event_id`."""

    def prepare(self, channels: list[Channel], last_event_id: str, timeout: float) -> None:
        """Has the bus bring all that came after `last_event_id`."""

    def missing(self, last_event_id: str) -> list[SourceEvent]:
        """What the sources have after `last_event_id` and from before the beginning, oldest
        first.
        """

    def read_back(self) -> None:
        """Puts what was kept since `missing` before all that is there."""

    def register(
        self, listener: Stream, last_event_id: str | None, retry: int
    ) -> Literal[False] | str | None:
        """Registers a stream. False when the rendering is over; otherwise why the stream does not
        get exactly what it missed, if so.
        """

    @property
    def in_use(self) -> bool:
        """Whether it has clients."""

    def end(self, patience: float) -> bool:
        """Ends it, if it had no client for `patience` seconds. Gives whether it is over."""

@final
class Parking:
    """The greenlets or futures of one event loop that wait for a client."""

    def __new__(cls) -> Self: ...
    @property
    def foreign(self) -> bool:
        """Whether a process that this one was forked from made it."""

    @property
    def resumed(self) -> int:
        """How many waiters were resumed so far."""

    def fileno(self) -> int:
        """The descriptor to watch for reading."""

    def resume(self) -> None:
        """Resume those who have something or whose time is up; the loop's reader callback."""

    def ring(self) -> None:
        """Ring the bell, for somebody who watches it in another way."""

    def close(self) -> None:
        """Let go of the waiters: their loop is closed, and will never resume them."""

    def __len__(self) -> int: ...

def after_fork() -> None:
    """Let the bus go on; called in the parent after a fork."""

def before_fork() -> None:
    """Have the bus let go of what a child must not inherit; called before a fork."""

def offload(
    stream: Stream,
    fd: int,
    head: bytes,
    body: bytes,
    *,
    instead: int | None = None,
    chunked: bool,
    policy: str,
    frames: int,
    bytes: int,
    threads: int,
) -> bool:
    """Take over the connection `fd`, which a server holds, and the stream with it.

    The descriptor is duplicated; the number `fd` means what `instead` means from then on, if it is
    not None, so that no two write to the connection. `head` is sent first, then what the stream
    opens with, then `body`, then events: as chunks of HTTP/1.1 if `chunked`, compressed if the
    stream is. The stream gives nothing more. Of what the client does not take, `frames` and `bytes`
    may wait; `policy` says what happens to more, as for a queue. There are `threads` I/O threads at
    the most: the first begins at the first call of a process, another when each has 1,000
    connections.

    Returns:
        False, and nothing was done, for a stream that has ended or given something already.

    Raises:
        OSError: no more descriptors or threads; nothing was done.
        BusError: the process is ending; nothing was done.
    """

def end_streams(wait: bool, retry: int) -> None:
    """End all streams of this process, and those that begin later at once.

    What waits is sent, each client is told when to come back (at a time of its own, around `retry`
    milliseconds), and the body is ended. It takes two seconds at the most for those that left
    Python; with `wait` it returns then, having released the GIL, and streams can begin again.
    Without, it may be called by a handler of signals. Queues go on.
    """

def offload_figures() -> dict[str, int]:
    """Connections that left Python: ``connections`` now, ``taken`` since the process began."""

def unwatch(epoll: int, fd: int) -> None:
    """Take a descriptor out of the epoll set of a loop that has waited for it."""

def bus_figures() -> dict[str, Any] | None:
    """The figures of this process's bus, None while it uses none."""

def bus_url() -> str | None:
    """The URL, without a password, of the bus that this process uses; None while it uses none."""

def check_bus(url: str) -> str | None:
    """Why a bus URL cannot be used, or None."""

def host_view() -> str:
    """What all processes of this host have counted, as JSON: for the monitor.

    ``name`` of the host, ``processes``, each as it would answer, and ``host``: the sums over all
    that live or did.
    """

def ask(question: str, timeout: float) -> int | None:
    """Publish a question to all processes that have streams; they answer on `ANSWERS_CHANNEL`.

    Returns:
        How many processes have it; None where the bus does not know.

    Raises:
        BusError: the bus did not take it within `timeout` seconds.
    """

def ask_later(question: str, timeout: float) -> int | Awaitable[int | None] | None:
    """`ask` for asyncio: what it gives, or an awaitable for it."""

def begin_bus_anew() -> None:
    """End all streams and the bus; the next use of a named channel begins it by new options.

    For tests: it waits for offloaded clients, two seconds at the most.
    """

def close_all() -> None:
    """End every client of this process, and its bus."""

def count_refused(reason: str) -> None:
    """Count a stream that was not offloaded, or not opened, for other processes to see."""

def encode_frame(
    data: str | None,
    *,
    event: str | None,
    retry: int | None,
    comment: str | None,
    limit: int,
) -> bytes:
    """The bytes of an event without an id."""

def revocations() -> int | None:
    """How often streams of named channels were disconnected here; None while nobody would tell of
    it.
    """

def watch_streams(watcher: Queue) -> None:
    """Puts into `watcher` which streams begin and end, as URL-encoded text; the first watcher
    holds.
    """

def figures() -> dict[str, dict[str, Any]]:
    """The figures of every named channel of this process."""

def forked() -> None:
    """Forget the parent's clients, timer and bells; called in a forked child."""

def host_figures() -> dict[str, Any]:
    """The figures of the processes of this host, and of those that are gone; see `host_stats`."""

def presence() -> dict[str, int]:
    """Clients of each channel that has any, in all processes of this host; queues are not among
    them.
    """

def prepare(
    channels: list[Channel], last_event_id: str | None, timeout: float
) -> Future[None] | None:
    """Prepare the registration with channels of one bus: an awaitable, or None when it is done."""

def register(
    listener: Client,
    channels: list[Channel],
    last_event_id: str | None,
    retry: int,
    timeout: float,
) -> str | None:
    """Register with channels of one bus; why it does not get exactly what it missed, if so."""
