"""The parser of an event stream, as browsers have it.

Source: HTML standard, section 9.2.6 "Interpreting an event stream".
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, NamedTuple

__all__ = ["EventStreamParser", "ReceivedEvent"]

#: A reconnection time that is longer is taken for this one, in milliseconds.
_LONGEST = (1 << 63) - 1


class ReceivedEvent(NamedTuple):
    """What a browser would dispatch."""

    type: str
    """The event's name, ``"message"`` when the stream gave none."""

    data: str
    last_event_id: str
    """The newest id of the stream, ``""`` when it gave none yet."""

    def json(self) -> Any:
        """The data, decoded.

        Raises:
            ValueError: it is no JSON, or nested too deeply to be read.
        """
        try:
            return json.loads(self.data)
        except RecursionError as error:
            raise ValueError(f"the data is nested too deeply: {error}") from None


class EventStreamParser:
    """Turns the bytes of one event stream, cut anywhere, into its events.

    An event that is not finished when the stream ends is none. Use it from one thread at a time.
    """

    def __init__(self) -> None:
        self.last_event_id = ""
        """What a client that reconnects now sends as its ``Last-Event-ID``, if not ``""``."""
        self.retry: int | None = None
        """The reconnection time in milliseconds (below 2**63), once the stream has set it."""
        self.comments: list[str] = []
        """The comments in the chunk that was fed last."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_begun = False
        self._is_after_cr = False
        self._rest = ""
        self._type = ""
        self._data: list[str] = []
        self._id = ""

    def feed(self, chunk: bytes) -> list[ReceivedEvent]:
        """Take the next bytes, and give the events that they complete."""
        self.comments = []
        text = self._decoder.decode(chunk)
        if not text:
            return []
        if not self._is_begun:
            self._is_begun = True
            text = text.removeprefix("\ufeff")
        if self._is_after_cr:
            # The second half of a CRLF whose first half has ended the line already.
            text = text.removeprefix("\n")
        self._is_after_cr = text.endswith("\r")
        *lines, self._rest = re.split("\r\n|\n|\r", self._rest + text)
        events = []
        for line in lines:
            if line:
                self._take(line)
            elif event := self._end_event():
                events.append(event)
        return events

    def _take(self, line: str) -> None:
        field, _, value = line.partition(":")
        if not field:
            self.comments.append(value)
            return
        value = value.removeprefix(" ")
        if field == "event":
            self._type = value
        elif field == "data":
            self._data.append(value)
        elif field == "id" and "\0" not in value:
            self._id = value
        elif field == "retry" and re.fullmatch("[0-9]+", value):
            # So many digits that Python would refuse them: a longer time is no time that comes.
            self.retry = min(int(value.lstrip("0")[:20] or "0"), _LONGEST)

    def _end_event(self) -> ReceivedEvent | None:
        self.last_event_id = self._id
        type_, data = self._type or "message", self._data
        self._type, self._data = "", []
        return ReceivedEvent(type_, "\n".join(data), self._id) if data else None
