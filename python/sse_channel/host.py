"""What all processes of this host have counted: how many listen, and what was delivered.

Each process counts in a file of its own, in the directory of `local://` (on the other buses the one
that `local://` would use), where every process of the same project, user and bus can read it at any
time. It costs no thread, nobody is asked, and a process that was killed is seen as gone at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, overload

from . import _sse_channel
from .event import check_text

if TYPE_CHECKING:
    from .channel import SSEChannel

__all__ = ["host_stats", "presence"]

_COUNTS = ("published", "received", "delivered", "dropped", "bytes")


@overload
def presence(channel: SSEChannel | str) -> int: ...
@overload
def presence(channel: None = None) -> dict[str, int]: ...
def presence(channel: SSEChannel | str | None = None) -> int | dict[str, int]:
    """How many clients listen now, in all processes of the project on this host.

    Clients are streams, offloaded or not: browsers, as a rule. Queues (`listen`) are not counted,
    since it is the project's own code that reads them. A stream of several channels is a client of
    each of them. The count is exact: a stream counts from its registration until it is removed,
    and those of a process that was killed count no more as soon as it has ended.

    With `redis://` the clients of other hosts are not counted.

    Args:
        channel: a channel or its name.

    Returns:
        The clients of `channel`; without one, those of each named channel that has any, by name.

    Raises:
        TypeError: a channel that is none.
        ValueError: a private channel, of which other processes know nothing; ask its `stats`.
    """
    if channel is None:
        return _sse_channel.presence()
    name: Any = channel if isinstance(channel, str) else getattr(channel, "name", channel)
    if name is None:
        raise ValueError("a private channel is this process's alone; see its stats()")
    check_text(name, "channel")
    return _sse_channel.presence().get(name, 0)


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
