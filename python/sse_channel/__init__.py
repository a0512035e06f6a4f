"""Live streams (Server-Sent Events) that cost almost nothing to hold open.

    from sse_channel import sse_channel

    sse_channel.publish({"headline": "..."})    # from anywhere in the process
    q = sse_channel.listen()                    # a queue of what is published from now on
    article = q.get(timeout=10)                 # queue.Empty after 10 s
    sse_channel.unlisten(q)

Importing starts nothing: no thread, no descriptor, neither Django nor gevent.
"""

from typing import TYPE_CHECKING, NoReturn

# First: nothing of the extension is to be loaded where it is refused.
from . import interpreter  # noqa: F401
from ._sse_channel import BusError, ChannelClosed, __version__
from .channel import SSEChannel, sse_channel, stats
from .clients import ClientInfo, on_client
from .config import configure
from .control import disconnect
from .event import Event
from .host import apresence, host_stats, presence
from .queue import ClientQueue
from .stream import EventStream

__all__ = [
    "BusError",
    "ChannelClosed",
    "ClientInfo",
    "ClientQueue",
    "Event",
    "EventStream",
    "SSEChannel",
    "__version__",
    "apresence",
    "configure",
    "disconnect",
    "host_stats",
    "on_client",
    "presence",
    "sse_channel",
    "stats",
]


if not TYPE_CHECKING:
    # Type checkers would take every name for one that is here.
    def __getattr__(name: str) -> NoReturn:
        hint = ""
        if hasattr(SSEChannel, name):
            hint = f"; the channel has it: from sse_channel import sse_channel; sse_channel.{name}"
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
