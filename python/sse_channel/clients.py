"""The streams of this process as they come and go: hooks, and a line in the log for each.

The extension notes which stream begins and which ends, wherever that is; a thread (a greenlet,
where gevent has put them in the place of threads) tells of it. It begins with the first stream that
somebody wants to be told of.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from queue import Empty
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode

from . import _sse_channel
from .queue import ClientQueue
from .waiting import after_close, close_at_exit

__all__ = ["ClientInfo", "on_client", "watch_clients"]

#: Each stream that begins, and each that ends, at the level INFO.
logger = logging.getLogger("sse_channel.clients")

#: Seconds that the end of the process waits for hooks to be told of it.
_LAST_WORDS = 1.0

#: Streams that begin and end faster than they are told of, until one is not told.
_CAPACITY = 100_000


class ClientInfo(NamedTuple):
    """A stream that has begun, or ended."""

    #: What tells the client from all others: the process id, and a number in it.
    id: str
    #: Whose it is, as text; None for nobody's.
    user: str | None
    #: The address that it came from, None where it is not known.
    address: str | None
    #: The names of the channels that it listens to; that of a private one is empty.
    channels: tuple[str, ...]
    #: Whether it has begun; otherwise it has ended.
    connected: bool
    #: Why it ended, as `stats` counts it; None for one that has begun.
    reason: str | None = None
    #: Seconds from its begin to its end.
    seconds: float | None = None


Hook = Callable[[ClientInfo], object]

_hooks: list[tuple[Hook, Callable[[], bool]]] = []
_watching: int | None = None


def on_client(hook: Hook, is_wanted: Callable[[], bool] = lambda: True) -> None:
    """Have `hook` called with a `ClientInfo` for each stream of this process that begins or ends.

    Streams that are open already are not told of. All calls come from one thread, in the order of
    what happened, shortly after it. What `hook` raises is logged. A process that is killed tells
    nothing. `is_wanted` is asked when a stream is opened; as long as nobody wants it, there is no
    thread.
    """
    _hooks.append((hook, is_wanted))


def watch_clients() -> bool:
    """Whether anybody wants to be told of the stream that is about to be opened."""
    global _watching
    if not logger.isEnabledFor(logging.INFO) and not any(wanted() for _, wanted in _hooks):
        return _watching == os.getpid()
    if _watching != os.getpid():
        channel = _sse_channel.Channel(None, 0)
        told = ClientQueue(_CAPACITY, "drop_newest")
        _sse_channel.register(told, [channel], None, 0, 0.0)
        close_at_exit()
        _sse_channel.watch_streams(told)
        _watching = os.getpid()
        teller = threading.Thread(
            target=_tell, args=(channel, told), name="sse-channel-clients", daemon=True
        )
        teller.start()
        # The end of the process ends all streams: it is to be told, too.
        after_close(lambda: teller.join(_LAST_WORDS))
    return True


def names_of(channels: Sequence[_sse_channel.Channel]) -> str:
    """The names of a stream's channels, as the extension passes them on."""
    return urlencode([("", channel.name or "") for channel in channels])


def _tell(_: _sse_channel.Channel, told: ClientQueue) -> None:
    # The channel lives as long as this: with it, the queue would be closed.
    while True:
        try:
            text = told.get(timeout=60)
        except _sse_channel.ChannelClosed:
            return
        except Empty:
            continue
        client = _client(dict(parse_qsl(text, keep_blank_values=True)))
        _log(client)
        for hook, _wanted in _hooks:
            try:
                hook(client)
            except Exception:
                logger.exception("the hook %r failed for client %s", hook, client.id)


def _client(told: dict[str, str]) -> ClientInfo:
    connected = told["told"] == "connected"
    return ClientInfo(
        id=f"{os.getpid()}-{told['number']}",
        user=told.get("user"),
        address=told.get("address"),
        channels=tuple(name for _, name in parse_qsl(told["channels"], keep_blank_values=True)),
        connected=connected,
        reason=None if connected else told["reason"],
        seconds=None if connected else float(told["seconds"]),
    )


def _log(client: ClientInfo) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    # As fields, for formatters that write JSON.
    fields: dict[str, object] = {
        "sse_client": client.id,
        "sse_user": client.user,
        "sse_address": client.address,
        "sse_channels": list(client.channels),
    }
    shown = (client.id, client.user, client.address, list(client.channels))
    if client.connected:
        logger.info("connected client=%s user=%r address=%r channels=%r", *shown, extra=fields)
    else:
        fields |= {"sse_reason": client.reason, "sse_seconds": client.seconds}
        logger.info(
            "disconnected client=%s user=%r address=%r channels=%r reason=%s seconds=%.3f",
            *shown,
            client.reason,
            client.seconds,
            extra=fields,
        )
