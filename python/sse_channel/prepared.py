"""A message that is checked and encoded now, and published later."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from . import _sse_channel
from .config import options
from .event import Event, check_text, envelope, to_fields

if TYPE_CHECKING:
    from .channel import SSEChannel

__all__ = ["PreparedMessage", "unsent"]

#: Publications after a commit that the bus did not take, by what held them up.
unsent: Counter[str] = Counter()


class PreparedMessage:
    """What `SSEChannel.publish` would send now: later changes of the message do not show in it.

    Raises:
        TypeError, ValueError: as `SSEChannel.publish`, for what it would refuse.
    """

    __slots__ = ("_fields", "_message", "channel")

    def __init__(self, channel: SSEChannel, message: Any | Event, event: str | None) -> None:
        check_text(event, "event")
        sent = envelope(message, event)
        fields = to_fields(sent)
        # Its bytes are made again when it has an id; this is for what cannot be.
        _sse_channel.encode_frame(
            fields.data,
            event=fields.event,
            retry=fields.retry,
            comment=fields.comment,
            limit=options().max_event_bytes,
        )
        self.channel = channel
        self._fields = fields
        # A private channel's queues get the object itself.
        self._message = sent.data if channel.name is None and fields.data is not None else None

    def publish(self) -> str:
        """Publish it.

        Raises:
            BusError: as `SSEChannel.publish`.
        """
        return self.channel._core.publish(
            self._fields.data,
            json=self._fields.json,
            event=self._fields.event,
            retry=self._fields.retry,
            comment=self._fields.comment,
            limit=options().max_event_bytes,
            timeout=options().publish_timeout,
            message=self._message,
        )
