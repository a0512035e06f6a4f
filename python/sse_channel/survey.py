"""Surveys: what all processes of the bus answer when one of them asks.

Each process that has streams answers for itself, from the extension: it needs no interpreter, so
that a worker that computes, or waits for its next request, answers as well. `redis://` tells how
many have the question, so that nobody waits longer than for the last answer.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Collection
from itertools import count
from queue import Empty
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode

from . import _sse_channel
from .config import options
from .queue import ClientQueue
from .waiting import close_at_exit

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PATIENCE", "Answers", "Key", "Survey", "key_of"]

#: Seconds that answers are waited for at the most.
PATIENCE = 1.0

#: Answers that wait to be read at the most; those to other processes' questions come as well.
_CAPACITY = 10_000

_numbers = count()


class Answers(NamedTuple):
    """What was answered in time."""

    #: One for each process that answered.
    given: list[dict[str, Any]]
    #: Processes that did not; None where it is not known how many were asked.
    missing: int | None


#: What tells a process from all others: its host, its id there, and a number of chance, since two
#: containers may have the same of both.
Key = tuple[str, int, int]


def key_of(host: str, facts: dict[str, Any]) -> Key:
    """Name the process that has told `facts`."""
    return (host, facts["process"], facts["instance"])


class Survey:
    """Where answers arrive: a context manager, or `close` it.

    Raises:
        BusError: the bus cannot be reached.
    """

    def __init__(self) -> None:
        self._channel = _answers()
        self._queue = ClientQueue(_CAPACITY, "drop_oldest")
        close_at_exit()
        timeout = options().publish_timeout
        _sse_channel.register(self._queue, [self._channel], None, 0, timeout)

    @classmethod
    async def begin(cls) -> Self:
        """Make one on asyncio."""
        pending = _sse_channel.prepare([_answers()], None, options().publish_timeout)
        if pending is not None:
            close_at_exit()
            await pending
        return cls()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hear no more answers."""
        self._channel.unlisten(self._queue)

    def ask(
        self,
        about: str,
        channel: str | None = None,
        *,
        patience: float = PATIENCE,
        known: Collection[Key] | None = None,
    ) -> Answers:
        """Ask all processes, and wait for their answers.

        Args:
            about: ``"clients"``, or ``"figures"``.
            channel: the channel whose clients are asked for.
            patience: seconds to wait at the most.
            known: those to wait for, where the bus does not tell how many there are.

        Raises:
            BusError: the bus cannot be reached, or was begun anew meanwhile.
        """
        token, question = _question(about, channel)
        asked = _sse_channel.ask(question, options().publish_timeout)
        gathering = _Gathering(token, asked, patience, known)
        while (left := gathering.left) > 0:
            try:
                gathering.take(self._queue.get(timeout=left))
            except Empty as empty:
                _raise_if_closed(empty)
                break
        return gathering.answers

    async def aask(self, about: str, channel: str | None = None) -> Answers:
        """`ask`, awaitable.

        Raises:
            BusError: as `ask`.
        """
        token, question = _question(about, channel)
        asked: Any = _sse_channel.ask_later(question, options().publish_timeout)
        if inspect.isawaitable(asked):
            asked = await asked
        gathering = _Gathering(token, asked, PATIENCE, None)
        while (left := gathering.left) > 0:
            try:
                gathering.take(await self._queue.aget(timeout=left))
            except Empty as empty:
                _raise_if_closed(empty)
                break
        return gathering.answers


class _Gathering:
    """Answers to one question."""

    def __init__(
        self,
        token: str,
        asked: int | None,
        patience: float,
        known: Collection[Key] | None,
    ) -> None:
        self._token = token
        self._asked = asked
        self._awaited = None if known is None else set(known)
        self._deadline = time.monotonic() + patience
        self._given: dict[Key, dict[str, Any]] = {}

    @property
    def left(self) -> float:
        """Seconds to wait for more; 0 when there is nothing to wait for."""
        if self._asked is not None and len(self._given) >= self._asked:
            return 0.0
        if self._asked is None and self._awaited is not None and not self._awaited:
            return 0.0
        return max(0.0, self._deadline - time.monotonic())

    def take(self, answer: Any) -> None:
        # Of another version, or nobody's of ours: everybody can publish on the bus.
        if not isinstance(answer, dict) or answer.get("form") != _sse_channel.ANSWERS_FORM:
            return
        if answer["token"] != self._token:
            return
        its = key_of(answer["host"], answer)
        self._given[its] = answer
        if self._awaited is not None:
            self._awaited.discard(its)

    @property
    def answers(self) -> Answers:
        missing = None if self._asked is None else max(0, self._asked - len(self._given))
        return Answers(list(self._given.values()), missing)


def _raise_if_closed(empty: Empty) -> None:
    if isinstance(empty, _sse_channel.ChannelClosed):
        raise _sse_channel.BusError("the bus was begun anew, or is ending") from empty


def _answers() -> _sse_channel.Channel:
    return _sse_channel.Channel(_sse_channel.ANSWERS_CHANNEL, 0)


def _question(about: str, channel: str | None) -> tuple[str, str]:
    # Unguessable is not needed: those who can answer can also publish.
    token = f"{os.uname().nodename}-{os.getpid()}-{time.time_ns()}-{next(_numbers)}"
    parts = {"token": token, "about": about}
    if channel is not None:
        parts["channel"] = channel
    return token, urlencode(parts)
