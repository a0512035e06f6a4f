"""What all processes have counted: how many listen, and what was delivered.

Each process counts in a file of its own, in the directory of `local://` (on the other buses the one
that `local://` would use), where every process of the same project, user and bus can read it at any
time. It costs no thread, nobody is asked, and a process that was killed is seen as gone at once.
Processes of other hosts, on `redis://`, are asked (`survey`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, overload

from . import _sse_channel
from .config import options
from .event import check_text
from .survey import PATIENCE, Answers, Survey

if TYPE_CHECKING:
    from .channel import SSEChannel

__all__ = ["apresence", "host_stats", "presence"]

_logger = logging.getLogger("sse_channel")

#: Seconds between two warnings of processes that do not answer.
_SAY_EVERY = 60.0

_said_at = -_SAY_EVERY

_COUNTS = ("published", "received", "delivered", "dropped", "bytes")


@overload
def presence(channel: SSEChannel | str) -> int: ...
@overload
def presence(channel: None = None) -> dict[str, int]: ...
def presence(channel: SSEChannel | str | None = None) -> int | dict[str, int]:
    """How many clients listen now, in all processes of the project.

    Clients are streams, offloaded or not: browsers, as a rule. Queues (`listen`) are not counted,
    since it is the project's own code that reads them. A stream of several channels is a client of
    each of them. The count is exact: a stream counts from its registration until it is removed,
    and those of a process that was killed count no more as soon as it has ended.

    On `memory://` and `local://` it reads files and waits for nobody. On `redis://` the processes
    of all hosts are asked, each answers for itself, and that takes about as long as two publishes.
    A process that does not answer within a second (it is stopped, or its host is cut off) is not
    counted, which is logged as a warning. For five seconds after Redis was lost and found again,
    not all may be back: those that answer within a second are counted then.

    Args:
        channel: a channel or its name.

    Returns:
        The clients of `channel`; without one, those of each named channel that has any, by name.

    Raises:
        TypeError: a channel that is none.
        ValueError: a private channel, of which other processes know nothing; ask its `stats`.
        BusError: Redis cannot be reached, or the bus is begun anew meanwhile.
    """
    name = _name(channel)
    if not _spans_hosts():
        return _of(name, _sse_channel.presence())
    with Survey() as survey:
        return _of(name, _counted(survey.ask("clients", name)))


@overload
async def apresence(channel: SSEChannel | str) -> int: ...
@overload
async def apresence(channel: None = None) -> dict[str, int]: ...
async def apresence(channel: SSEChannel | str | None = None) -> int | dict[str, int]:
    """`presence`, awaitable: for an asyncio loop, which must not wait for Redis.

    Raises:
        TypeError, ValueError, BusError: as `presence`.
    """
    name = _name(channel)
    if not _spans_hosts():
        return _of(name, _sse_channel.presence())
    with await Survey.begin() as survey:
        return _of(name, _counted(await survey.aask("clients", name)))


def _name(channel: SSEChannel | str | None) -> str | None:
    if channel is None:
        return None
    name: Any = channel if isinstance(channel, str) else getattr(channel, "name", channel)
    if name is None:
        raise ValueError("a private channel is this process's alone; see its stats()")
    check_text(name, "channel")
    return str(name)


def _of(name: str | None, clients: dict[str, int]) -> int | dict[str, int]:
    return clients if name is None else clients.get(name, 0)


def _spans_hosts() -> bool:
    return (_sse_channel.bus_url() or options().bus).startswith(("redis://", "rediss://"))


def _counted(answers: Answers) -> dict[str, int]:
    global _said_at
    now = time.monotonic()
    if answers.missing and now - _said_at > _SAY_EVERY:
        _said_at = now
        _logger.warning(
            "%d of %d processes did not tell within %s s how many clients they have: are they "
            "stopped, or cut off from the bus? The others' clients are counted.",
            answers.missing,
            answers.missing + len(answers.given),
            PATIENCE,
        )
    counted: dict[str, int] = {}
    for answer in answers.given:
        _add_counts(counted, answer["clients"].items())
    return counted


def host_stats() -> dict[str, Any]:
    """What `stats` tells, for all processes of the project on this host.

    Counts never run backwards when a process ends: what it has counted stays in the sums. They end
    with the directory of the figures, as a rule with the next start of the machine. Of processes
    that begin and end all the time nothing piles up but their sums, for each of up to 16,384
    channels; of more, the sums are in the totals and not in ``channels``.

    With `redis://` the processes of other hosts are not seen.

    Returns:
        ``processes``: for each that has used a named channel and lives, its id (``process``), its
        ``bus`` (``lag`` in seconds, and ``connected``: None while it has not used the bus),
        streams ``refused`` by reason, ``channels`` as in `stats` but without ``history``, and
        ``unshared``: how many further channels it counts where no other process sees it (beyond
        16,384, or when the file system was full). ``departed``: ``refused`` and ``channels`` of
        those that live no more. ``channels``: the sums for each channel. ``clients``,
        ``published``, ``received``, ``delivered``, ``dropped``, ``bytes``, ``disconnected``,
        ``refused``: the sums of all. ``trouble``: why no other process sees what this one counts,
        and what to do; None if they do.
    """
    figures = sums(lambda name: name)
    total = _nothing()
    for its in figures["channels"].values():
        _add(total, its)
    del total["delay"]
    # The sum of the channels for which there was no room by name.
    figures["channels"].pop("", None)
    figures["departed"]["channels"].pop("", None)
    return {**figures, **total}


def sums(group: Callable[[str], str]) -> dict[str, Any]:
    """What all processes have counted, with the sums of the channels that are one group."""
    figures = _sse_channel.host_figures()
    channels: dict[str, dict[str, Any]] = {}
    refused: dict[str, int] = {}
    for part in (*figures["processes"], figures["departed"]):
        for name, its in part["channels"].items():
            _add(channels.setdefault(group(name), _nothing()), its)
        _add_counts(refused, part["refused"].items())
    return {**figures, "refused": refused, "channels": channels}


def _nothing() -> dict[str, Any]:
    return {
        "clients": {"queue": 0, "stream": 0, "socket": 0},
        **dict.fromkeys(_COUNTS, 0),
        "disconnected": dict.fromkeys(_sse_channel.REASONS, 0),
        "delay": {"le": [], "counts": [], "sum": 0.0},
    }


def _add(sums: dict[str, Any], more: dict[str, Any]) -> None:
    for key in _COUNTS:
        sums[key] += more[key]
    for key in ("clients", "disconnected"):
        _add_counts(sums[key], more[key].items())
    delay, further = sums["delay"], more["delay"]
    delay["le"] = further["le"]
    before = delay["counts"] or [0] * len(further["counts"])
    delay["counts"] = [one + other for one, other in zip(before, further["counts"], strict=True)]
    delay["sum"] += further["sum"]


def _add_counts(sums: dict[str, int], more: Iterable[tuple[str, int]]) -> None:
    for key, count in more:
        sums[key] = sums.get(key, 0) + count
