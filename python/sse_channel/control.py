"""Control: telling all processes what to do with their streams."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from . import _sse_channel
from .config import options
from .event import check_text

if TYPE_CHECKING:
    from .channel import SSEChannel

__all__ = ["disconnect", "tell", "user_key"]


def disconnect(*, user: object = None, channel: SSEChannel | str | None = None) -> None:
    """End streams in every process: those of `user`, those of `channel`, or those that are both.

    For a right that was taken away: what waits for them is not sent, and a browser that comes back
    is asked again (`EventStreamView` does) whether it may listen. Take the right away first, and
    commit it. Queues (`listen`) stay.

    Returns when the bus has it: this process's streams are ended then, those of others within
    moments, and before they are given anything that is published after it returned. A stream whose
    permission is checked at the same time is checked again by `EventStreamView`.

    Args:
        user: a user of Django, or what was given as `user=` to the streams; compared as text. The
            key of one who will be deleted or logged out is to be taken before: ``key = user.pk``.
            After it that is None, which with `channel` means everybody.
        channel: a channel or its name; its streams end, also if they listen to others as well.

    Raises:
        TypeError: neither of them is given, or a channel that is none.
        ValueError: a private channel; its own `disconnect` ends its streams. A user without a
            primary key: deleted, not saved, or nobody who is logged in.
        BusError: the bus cannot be reached.
    """
    if user is None and channel is None:
        raise TypeError("disconnect() needs user=, channel=, or both: whose streams are to end?")
    name = channel if isinstance(channel, str) else getattr(channel, "name", channel)
    if channel is not None and name is None:
        raise ValueError("a private channel is this process's alone; call its own disconnect()")
    check_text(name, "channel")
    of = {"user": None if user is None else user_key(user), "channel": name}
    text = urlencode({part: text for part, text in of.items() if text is not None})
    tell(_sse_channel.Channel(_sse_channel.CONTROL_CHANNEL, 100), text, event="disconnect")


def tell(channel: _sse_channel.Channel, text: str, *, event: str, json: bool = False) -> None:
    """Publish on a channel of the library's own, whatever the project's events are limited to."""
    channel.publish(
        text,
        json=json,
        event=event,
        retry=None,
        comment=None,
        limit=sys.maxsize,
        timeout=options().publish_timeout,
        message=None,
    )


def user_key(user: object) -> str:
    """Name a user: by the primary key of a model, or by anything else's text.

    Raises:
        TypeError: something nested so deep that it has no text.
        ValueError: a model without a primary key: deleted, not saved, or that of nobody who is
            logged in.
    """
    key = getattr(user, "pk", user)
    if key is None:
        raise ValueError(
            f"{user!r} has no primary key: deleted, not saved, or not logged in; give a user that "
            "is saved, or the key, taken before delete() or logout(): key = user.pk"
        )
    try:
        return str(key)
    except RecursionError:
        raise TypeError(
            f"user must be a user of Django, or its key, not a {type(user).__name__} nested so deep"
        ) from None
