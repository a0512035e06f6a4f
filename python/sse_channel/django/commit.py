"""Publishing when a database transaction is committed, and not when it is rolled back."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from asgiref.sync import sync_to_async
from django.db import transaction

from ..channel import SSEChannel
from ..event import Event
from ..prepared import PreparedMessage, unsent

__all__ = ["apublish_on_commit", "publish_on_commit"]

_log = logging.getLogger("sse_channel")


def publish_on_commit(
    channel: SSEChannel | str,
    message: Any | Event,
    *,
    event: str | None = None,
    using: str | None = None,
) -> None:
    """Publish when the transaction that is open now is committed; at once when none is.

    A client that hears of a row can then read it. A rollback publishes nothing, and that of a
    savepoint nothing of what came after its beginning. Within one transaction the order of the
    calls is the order of the events, and other hooks of `transaction.on_commit` run among them in
    theirs.

    The message is checked and encoded here: bad input raises here, and what becomes of a dict or a
    model's fields until the commit does not show in it.

    A subclass with a `publish` of its own is different: that is called at the commit, with the
    message as it is then, and checks it then. What it raises is logged and counted, as below.

    When the bus does not take the event, the data is committed all the same. So nothing is raised
    then, also when no transaction is open: it is logged as an error of the logger
    ``"sse_channel"`` with its traceback and counted in ``stats()["unsent"]``, and the hooks behind
    it run. Who must know uses ``transaction.on_commit`` and `SSEChannel.publish`. While the bus
    is away the commit's caller waits for it, `PUBLISH_TIMEOUT` seconds at the most.

    In a `TestCase` nothing is ever committed:
    ``with self.captureOnCommitCallbacks(execute=True)`` publishes at its end, in synchronous code.

    Args:
        channel: the channel or its name.
        message, event: as for `SSEChannel.publish`. On a private channel too the message must have
            a form as JSON; its queues get the object itself.
        using: the database's alias; None for the default one.

    Raises:
        TypeError, ValueError: as `SSEChannel.publish`, or no channel; nothing will be sent.
        TransactionManagementError: autocommit is off and no `atomic` block is open, as for
            `transaction.on_commit`.
    """
    prepared = _prepare(channel, message, event)
    transaction.on_commit(lambda: _publish(*prepared), using=using)


async def apublish_on_commit(
    channel: SSEChannel | str,
    message: Any | Event,
    *,
    event: str | None = None,
    using: str | None = None,
) -> None:
    """`publish_on_commit`, awaitable.

    Django's transactions belong to the thread in which the request's synchronous code runs, and so
    does this. A coroutine opens none of its own: it publishes at once, unless the code that called
    it by `async_to_sync` holds one open, as a `TestCase` does. A function that uses `atomic` and
    that is called by `sync_to_async` calls `publish_on_commit` inside.

    Raises:
        TypeError, ValueError, TransactionManagementError: as `publish_on_commit`.
    """
    prepared = _prepare(channel, message, event)
    await sync_to_async(transaction.on_commit)(lambda: _publish(*prepared), using=using)


#: That of the library, whose event can be made before it is sent.
_OWN_PUBLISH = SSEChannel.publish


def _prepare(
    channel: SSEChannel | str, message: Any, event: str | None
) -> tuple[SSEChannel, Callable[[], object]]:
    """The channel, and what publishes the message on it."""
    if isinstance(channel, str):
        channel = SSEChannel(channel)
    if not isinstance(channel, SSEChannel):
        raise TypeError(f"channel must be an SSEChannel or its name, not {type(channel).__name__}")
    if getattr(channel.publish, "__func__", None) is _OWN_PUBLISH:
        return channel, PreparedMessage(channel, message, event).publish
    options = {} if event is None else {"event": event}
    return channel, functools.partial(channel.publish, message, **options)


def _publish(channel: SSEChannel, publish: Callable[[], object]) -> None:
    try:
        publish()
    except Exception as error:
        # The data is committed, and the hooks behind this one must not be lost.
        unsent["commit"] += 1
        _log.exception("not published after the commit, on channel %r: %s", channel.name, error)
