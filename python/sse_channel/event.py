"""Events with full control, and messages as text."""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

from . import _sse_channel
from .config import options, shown

__all__ = ["Event", "encode_frame", "envelope", "text_of", "to_fields"]


class _NoData:
    """There is one of it, in copies and pickles too: it is told by what it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Event.NO_DATA"

    # Where it is found; copies are itself.
    __reduce__ = __repr__


class Event:
    """A message with the other fields of the wire.

    ``publish(Event(data, event="article", retry=5000))`` sends all of it; queues get `data`. An
    event without data reaches no queue and no listener in the browser: it carries a comment or a
    reconnection time.

    Source: HTML standard, section 9.2.5 "Parsing an event stream".

    Args:
        data: the message, as for `publish`; left out, there is none.
        event: the event name that the browser dispatches; ``"message"`` when None.
        retry: milliseconds that the browser waits before it reconnects.
        comment: text that reaches the wire and no listener.

    Raises:
        TypeError: a name or a comment that is not a `str`, or nothing to send at all.
        ValueError: a `retry` that is not a whole number of milliseconds from 0 up.
    """

    __slots__ = ("comment", "data", "event", "retry")

    #: Stands for "no data": None is a message like any other (JSON's ``null``).
    NO_DATA: Any = _NoData()

    def __init__(
        self,
        data: Any = NO_DATA,
        *,
        event: str | None = None,
        retry: int | None = None,
        comment: str | None = None,
    ) -> None:
        check_text(event, "event")
        check_text(comment, "comment")
        if retry is not None and (
            isinstance(retry, bool) or not isinstance(retry, int) or not 0 <= retry < 1 << 64
        ):
            raise ValueError(
                f"retry must be a whole number of milliseconds from 0 up, not {shown(retry)}"
            )
        if data is self.NO_DATA and retry is None and comment is None:
            raise TypeError("an Event needs data, a retry or a comment")
        self.data = data
        self.event = event
        self.retry = retry
        self.comment = comment

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}={value!r}"
            for name in ("data", "event", "retry", "comment")
            if (value := getattr(self, name)) is not None and value is not self.NO_DATA
        )
        return f"Event({fields})"


def check_text(value: object, name: str) -> None:
    """Raise TypeError unless `value` is a str or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")


def text_of(message: object) -> str | None:
    """The text that a message is, by itself or as one of Django's lazy ones; None for no text."""
    if isinstance(message, str):
        # What a SimpleLazyObject has in it says to be one, and is none for the extension.
        return message if issubclass(type(message), str) else str(message)
    functional = sys.modules.get("django.utils.functional")
    if functional is not None and isinstance(message, functional.Promise):
        # As DjangoJSONEncoder takes it, without the quotes.
        return str(message)
    return None


_plain: json.JSONEncoder | None = None
_django: json.JSONEncoder | None = None


def to_json(message: object) -> str:
    """JSON on one line, as UTF-8 carries it, by Django's encoder when Django is configured.

    Raises:
        TypeError: an object that JSON cannot carry.
        ValueError: a circular reference, or NaN and infinities, which browsers cannot parse.
    """
    try:
        return _encoder().encode(message)
    except TypeError as error:
        raise TypeError(
            f"the message cannot be sent as JSON: {error}; publish a dict, list, str, number, "
            "bool or None of such values"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the message cannot be sent as JSON: {error}; JSON has neither NaN and infinities "
            "nor values that contain themselves"
        ) from None


def _encoder() -> json.JSONEncoder:
    global _plain, _django
    conf = sys.modules.get("django.conf")
    if conf is not None and conf.settings.configured:
        if _django is None:
            from django.core.serializers.json import DjangoJSONEncoder

            _django = _make(DjangoJSONEncoder)
        return _django
    if _plain is None:
        _plain = _make(json.JSONEncoder)
    return _plain


def _make(encoder: type[json.JSONEncoder]) -> json.JSONEncoder:
    return encoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Fields(NamedTuple):
    """A message as the extension takes it."""

    data: str | None
    json: bool
    event: str | None
    retry: int | None
    comment: str | None


def envelope(message: Any, event: str | None = None) -> Event:
    """`message` as an `Event`, whatever was published.

    Raises:
        TypeError: an event name that is no `str`, or that is given twice.
    """
    if not isinstance(message, Event):
        return Event(message, event=event)
    if event is not None:
        raise TypeError("the event name is given twice: by event= and by the Event itself")
    return message


def to_fields(event: Event) -> Fields:
    """Turn an event's message into text: text as it is, anything else as JSON.

    Raises:
        TypeError, ValueError: as `to_json`.
    """
    data, is_json = None, False
    if event.data is not Event.NO_DATA:
        data = text_of(event.data)
        if data is None:
            data, is_json = to_json(event.data), True
    return Fields(data, is_json, event.event, event.retry, event.comment)


def encode_frame(message: Any) -> bytes:
    """The bytes of a message that has no id: only this client gets it.

    Raises:
        TypeError, ValueError: as `SSEChannel.publish`.
    """
    fields = to_fields(envelope(message))
    return _sse_channel.encode_frame(
        fields.data,
        event=fields.event,
        retry=fields.retry,
        comment=fields.comment,
        limit=options().max_event_bytes,
    )
