"""The monitor's samples: what all processes do, once a second, for as long as somebody watches.

Each process that has watchers has a thread (a greenlet, where gevent has put them in the place of
threads). One of them asks all processes for what they have counted (`survey`), and tells the others
what happened since the last time; if it falls silent, another one goes on. So a watcher more, or a
process with watchers more, costs the others nothing, and each knows the last minutes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from queue import Empty
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from . import _sse_channel
from .channel import SSEChannel
from .config import bus_shown, options
from .control import tell
from .event import Event
from .queue import ClientQueue
from .survey import Key, Survey, key_of
from .waiting import after_close, close_at_exit

__all__ = ["Monitor", "Sampler"]

#: Seconds between two samples.
_EVERY = 1.0

#: Seconds between the first look, which has nothing to compare with, and the first sample.
_FIRST = 0.2

#: Seconds that the first stream of a monitor may take from its permission to the thread that hears
#: whose right is taken away.
_MEANWHILE = 5.0

#: Seconds that answers are waited for.
_PATIENCE = 0.8

#: Samples that a new watcher gets.
_SAMPLES = 300

#: Seconds without a watcher after which the thread ends.
_LINGER = 15.0

#: Seconds that a process may be late, and is taken for what it was.
_LATE = 2.5

#: Seconds after which a silent process is shown no more.
_GONE = 60.0

#: Seconds that a client has to be behind to be called slow.
_SLOW = 0.1

_CHANNELS = 20
_SLOWEST = 10

#: What is counted, and what the rate of it is called.
_RATES = {
    "published": "events",
    "received": "received",
    "delivered": "deliveries",
    "bytes": "bytes",
    "dropped": "dropped",
}

_logger = logging.getLogger("sse_channel")

_monitors: dict[int, Monitor] = {}


class Monitor:
    """Where the samples of this process's watchers come from; `current` gives it."""

    def __init__(self) -> None:
        #: Each sample is published here, and that the bus is lost, too: so it is not on the bus.
        self.channel = SSEChannel(history=30)
        self._past: deque[dict[str, Any]] = deque(maxlen=_SAMPLES)
        self._thread: threading.Thread | None = None
        # Held to begin the thread, and for its decision to end.
        self._lock = threading.Lock()
        self._wanted_until = 0.0
        self._is_ending = threading.Event()
        after_close(self._end)

    @classmethod
    def current(cls) -> Monitor:
        """That of this process."""
        monitor = _monitors.get(os.getpid())
        # Of two threads that come first at one time, one finds the other's.
        return _monitors.setdefault(os.getpid(), cls()) if monitor is None else monitor

    def watch(self) -> None:
        """See to it that samples come, for some seconds and then while anybody listens."""
        with self._lock:
            self._wanted_until = time.monotonic() + _LINGER
            if self._thread is not None and self._thread.is_alive():
                return
            self._thread = threading.Thread(
                target=self._run, name="sse-channel-monitor", daemon=True
            )
            self._thread.start()

    def history(self) -> Event:
        """The samples up to now, as many as an event may hold, without what is of the moment."""
        samples = list(self._past)
        while samples and len(_text(samples)) > options().max_event_bytes - 1000:
            samples = samples[len(samples) // 4 + 1 :]
        return Event({"samples": samples}, event="history")

    def _end(self) -> None:
        self._is_ending.set()
        if self._thread is not None:
            self._thread.join(_EVERY)

    def _is_wanted(self) -> bool:
        with self._lock:
            if self._is_ending.is_set():
                return False
            if len(self.channel.listeners):
                self._wanted_until = time.monotonic() + _LINGER
            if time.monotonic() < self._wanted_until:
                return True
            self._thread = None
            return False

    def _run(self) -> None:
        while self._is_wanted():
            try:
                with contextlib.closing(_Exchange()) as exchange:
                    self._serve(exchange)
            except Exception as error:
                # A bus that cannot be reached is what the watchers are to see.
                if not isinstance(error, _sse_channel.BusError):
                    _logger.exception("a sample of the monitor failed")
                self._show({**_frame(_EVERY), **_NO_FIGURES, "trouble": str(error)})
                self._is_ending.wait(_EVERY)

    def _serve(self, exchange: _Exchange) -> None:
        self._past.clear()
        self._past.extend(map(_lasting, exchange.past()))
        if self._past:
            # Who watches already was given none.
            self.channel.publish(self.history())
        while self._is_wanted():
            sample = exchange.next_sample()
            for user in exchange.revoked():
                self.channel.disconnect(user=user)
            if sample is not None:
                self._past.append(_lasting(sample))
                self._show(sample)

    def _show(self, sample: dict[str, Any]) -> None:
        tell(self.channel._core, _text(sample), event="sample", json=True)


def _lasting(sample: dict[str, Any]) -> dict[str, Any]:
    """What of a sample is of interest when it is past."""
    return {key: sample[key] for key in ("t", "seconds", "series")}


def _text(message: Any) -> str:
    return json.dumps(message, separators=(",", ":"))


class _Exchange:
    """What the processes with watchers tell each other, and whose turn it is.

    Raises:
        BusError: the bus cannot be reached, or was begun anew; as each method.
    """

    def __init__(self) -> None:
        # The same in no two processes, nor for two of these in one.
        self._own = f"{time.time_ns():x}-{os.getpid()}-{random.getrandbits(64):x}"
        self._channel = _sse_channel.Channel(_sse_channel.OWN_CHANNELS + "monitor", _SAMPLES)
        self._control = _sse_channel.Channel(_sse_channel.CONTROL_CHANNEL, 100)
        self._told = ClientQueue(10 * _SAMPLES, "drop_oldest")
        self._orders = ClientQueue(10_000, "drop_oldest")
        #: Users who were disconnected, and when that is to be done once more.
        self._revoked: list[tuple[str, float]] = []
        #: While it is this one's turn.
        self._asking: tuple[Survey, Sampler] | None = None
        # Of those who miss a sample, one is the first to see to it.
        self._patience = _EVERY + 0.7 + random.random() / 2
        # Nor do all begin that were asked at one time.
        self._due = time.monotonic() + random.random() / 2
        close_at_exit()
        timeout = options().publish_timeout
        try:
            # All of the last minutes; of what was told to end streams, what came meanwhile.
            _sse_channel.register(self._told, [self._channel], "0-0", 0, timeout)
            lately = f"{int((time.time() - _MEANWHILE) * 1000)}-0"
            _sse_channel.register(self._orders, [self._control], lately, 0, timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hear and tell no more."""
        self._channel.unlisten(self._told)
        self._control.unlisten(self._orders)
        self._rest()

    def past(self) -> list[dict[str, Any]]:
        """The samples of the last minutes, oldest first."""
        oldest = (time.time() - _SAMPLES * _EVERY) * 1000
        told = iter(partial(_take, self._told), None)
        past = [sample for sample in told if _is_sample(sample) and sample["t"] > oldest]
        if past and past[-1]["t"] > (time.time() - _EVERY) * 1000:
            # Somebody is at it.
            self._due = time.monotonic() + self._patience
        return past

    def next_sample(self) -> dict[str, Any] | None:
        """Wait for the next sample, anybody's; None for nothing within about a second."""
        left = self._due - time.monotonic()
        sample: dict[str, Any] | None = _take(self._told, max(0.0, min(left, _EVERY)))
        if sample is None and left <= _EVERY:
            self._take_sample()
        if sample is None or not _is_sample(sample):
            return None
        if sample["by"] < self._own:
            self._rest()
        if self._asking is None:
            self._due = time.monotonic() + self._patience
        return sample

    def revoked(self) -> list[str]:
        """Users whose streams are to be ended."""
        now = time.monotonic()
        while (order := _take(self._orders)) is not None:
            named = dict(parse_qsl(order, keep_blank_values=True))
            # What names a channel is about that channel's streams.
            if named.keys() == {"user"}:
                # Once more, for one who was let in before that and listens only now.
                self._revoked += [(named["user"], now), (named["user"], now + 2 * _EVERY)]
        users = [user for user, at in self._revoked if at <= now]
        self._revoked = [(user, at) for user, at in self._revoked if at > now]
        return users

    def _take_sample(self) -> None:
        if self._asking is None:
            self._asking = survey, sampler = Survey(), Sampler()
            # Something to compare with.
            sampler.take(survey)
            time.sleep(_FIRST)
        survey, sampler = self._asking
        sample = sampler.take(survey)
        # In the middle of a second, so that each has one sample, whatever the delays.
        self._due = time.monotonic() + 1.0 - (time.time() + 0.5) % 1.0
        if sample is None:
            return
        if not self._told.empty():
            # Another one was quicker.
            self._rest()
            return
        tell(self._channel, _text({**sample, "by": self._own}), event="sample", json=True)

    def _rest(self) -> None:
        """Leave it to another one."""
        if self._asking is not None:
            self._asking[0].close()
            self._asking = None


def _take(queue: ClientQueue, timeout: float = 0.0) -> Any:
    """The oldest message, or None."""
    try:
        return queue.get(timeout=timeout)
    except _sse_channel.ChannelClosed as closed:
        raise _sse_channel.BusError("the bus was begun anew, or is ending") from closed
    except Empty:
        return None


def _is_sample(told: Any) -> bool:
    """Whether it is one of ours, and of this version."""
    return isinstance(told, dict) and told.get("form") == _sse_channel.ANSWERS_FORM


class _Process(NamedTuple):
    """A process as it was seen last."""

    #: What it has counted.
    facts: dict[str, Any]
    seen_at: float
    #: When it last told of itself, or was not expected to.
    answered_at: float
    rates: dict[str, float]


class Sampler:
    """Turns what processes have counted into what happened between two looks.

    Those of this host count where each can read it, also when they have no streams, or have ended;
    those of other hosts tell when they are asked.
    """

    def __init__(self) -> None:
        self._processes: dict[Key, _Process] = {}
        self._host: dict[str, Any] | None = None
        self._taken_at: float | None = None
        self._due: dict[str, _Due] = {}

    def take(self, survey: Survey) -> dict[str, Any] | None:
        """Ask all processes, and give a sample of what happened since the last look.

        None for the first look.

        Raises:
            BusError: the bus cannot be reached.
        """
        answers = survey.ask("figures", patience=_PATIENCE, known=self._expected())
        view = json.loads(_sse_channel.host_view())
        return self.digest(view, answers.given, answers.missing, time.monotonic())

    def digest(
        self,
        view: dict[str, Any],
        answers: Sequence[dict[str, Any]],
        missing: int | None,
        now: float,
    ) -> dict[str, Any] | None:
        """A sample; None for the first look.

        Args:
            view: what the processes of this host have counted (`_sse_channel.host_view`).
            answers: those of processes of any host.
            missing: how many did not answer; None where that is not known.
            now: seconds of a clock that never jumps.
        """
        is_first = self._taken_at is None
        elapsed = _EVERY if self._taken_at is None else max(now - self._taken_at, 0.001)
        here: str = view["name"]
        told = {key_of(answer["host"], answer): answer for answer in answers}
        facts: dict[Key, dict[str, Any]] = dict(told)
        own = set()
        for its in view["processes"]:
            key = key_of(here, its)
            own.add(key)
            # Counted now and not when it answered; what it alone knows stands in its answer.
            answer = told.get(key, {"memory": None, "bus": {}})
            bus = {**answer["bus"], **its["bus"]}
            facts[key] = {**its, "memory": answer["memory"], "bus": bus}
        elsewhere = [key for key in facts if key not in own]
        happened = [_happened(self._host or view["host"], view["host"], elapsed)]
        received: dict[str, float] = {}
        processes: dict[Key, _Process] = {}
        for key, its in facts.items():
            before = self._processes.get(key)
            change = _happened(*self._since(before, its, now, elapsed))
            if key in elsewhere:
                happened.append(change)
            for channel in change.channels:
                name = channel["name"]
                received[name] = max(received.get(name, 0.0), channel["received"])
            has_told = key in told or not _holds_streams(its)
            answered_at = now if has_told or before is None else before.answered_at
            processes[key] = _Process(its, now, answered_at, change.rates)
        processes |= self._silent(facts, missing, now)
        self._processes, self._host, self._taken_at = processes, view["host"], now
        if is_first:
            return None
        present = [its for its in processes.values() if now - its.seen_at < _LATE]
        channels = _channels(happened)
        self._due = {
            its["name"]: _count_once(
                its,
                received.get(its["name"], 0.0),
                self._due.get(its["name"], _Due(0.0, 0.0)),
                elapsed,
            )
            for its in channels
        }
        channels.sort(key=_size)
        rates = {rate: sum(part.rates[rate] for part in happened) for rate in _RATES.values()}
        # What other hosts published by processes without streams is seen where it arrives.
        rates["events"] += sum(its["events"] for its in channels) - sum(
            channel["events"] for part in happened for channel in part.channels
        )
        series: dict[str, Any] = {
            "processes": len(present),
            "clients": _sums([_NOBODY, *(its.facts["totals"]["clients"] for its in present)]),
            **rates,
            "delay": _percentiles(
                [sum(counts) for counts in zip(*(part.delays for part in happened), strict=True)]
            ),
            "disconnected": _sums(part.disconnected for part in happened),
            "refused": _sums(part.refused for part in happened),
            "lag": max((its.facts["bus"]["lag"] for its in present), default=0.0),
        }
        more = [view["host"]["more_channels"], *(facts[key]["more_channels"] for key in elsewhere)]
        return {
            **_frame(elapsed),
            "series": series,
            "processes": self._told(now),
            "channels": channels[:_CHANNELS],
            "more_channels": len(channels[_CHANNELS:]) + max(more),
            "slowest": _slowest(answers),
            "trouble": None,
        }

    def _expected(self) -> set[Key]:
        """Those that are going to answer, as far as that is known."""
        return {key for key, its in self._processes.items() if _holds_streams(its.facts)}

    def _since(
        self, before: _Process | None, facts: dict[str, Any], now: float, elapsed: float
    ) -> tuple[dict[str, Any] | None, dict[str, Any], float]:
        if before is not None:
            since = now - before.seen_at
            if "seconds" in facts and "seconds" in before.facts:
                # By its own clock: answers come when they come.
                since = facts["seconds"] - before.facts["seconds"]
            return before.facts, facts, max(since, 0.001)
        # Of one that has begun since the last look, all is new; of another nothing is known yet.
        is_new = self._taken_at is not None and facts.get("seconds", 0.0) <= 2 * elapsed
        return (None if is_new else facts), facts, elapsed

    def _silent(
        self, facts: Mapping[Key, object], missing: int | None, now: float
    ) -> dict[Key, _Process]:
        """Those that are known by their answers, did not answer, and may not have ended."""
        return {
            key: its
            for key, its in self._processes.items()
            if key not in facts
            and "seconds" in its.facts
            and missing != 0
            and _holds_streams(its.facts)
            and now - its.seen_at < _GONE
        }

    def _told(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "host": host,
                "process": process,
                "clients": its.facts["totals"]["clients"],
                **its.rates,
                "memory": its.facts.get("memory"),
                "bus": {"waiting": None, **its.facts["bus"]},
                # An answer that was late is no silence.
                "silent": silence if (silence := now - its.answered_at) >= _LATE else 0.0,
            }
            for (host, process, _), its in sorted(self._processes.items())
        ]


def _holds_streams(facts: dict[str, Any]) -> bool:
    clients = facts["totals"]["clients"]
    return bool(clients["stream"] + clients["socket"])


_NOBODY = {"queue": 0, "stream": 0, "socket": 0}

_NO_FIGURES: dict[str, Any] = {
    "series": None,
    "processes": [],
    "channels": [],
    "more_channels": 0,
    "slowest": [],
}


def _frame(seconds: float) -> dict[str, Any]:
    return {
        "form": _sse_channel.ANSWERS_FORM,
        "t": time.time_ns() // 1_000_000,
        "seconds": seconds,
        "bus": bus_shown(),
    }


class _Happened(NamedTuple):
    """What happened between two looks at the same counts."""

    rates: dict[str, float]
    delays: list[int]
    disconnected: dict[str, float]
    refused: dict[str, float]
    channels: list[dict[str, Any]]


_NOTHING: dict[str, Any] = {"totals": {}, "refused": {}, "channels": [], "more_channels": 0}


def _happened(before: dict[str, Any] | None, after: dict[str, Any], seconds: float) -> _Happened:
    old = _NOTHING if before is None else before
    totals, old_totals = after["totals"], old["totals"]
    known = {its["name"]: its for its in old["channels"]}
    channels = [
        {
            "name": its["name"],
            "clients": its["clients"],
            # One that is not among the largest any more, or was not, is not a new one.
            **_rates(known.get(its["name"], its if old["more_channels"] else {}), its, seconds),
        }
        for its in after["channels"]
    ]
    old_delays = old_totals.get("delays") or [0] * len(totals["delays"])
    delays = zip(totals["delays"], old_delays, strict=True)
    return _Happened(
        _rates(old_totals, totals, seconds),
        [max(0, new - count) for new, count in delays],
        _changes(old_totals.get("disconnected", {}), totals["disconnected"], seconds),
        _changes(old["refused"], after["refused"], seconds),
        channels,
    )


#: The upper bounds of the delay's buckets, in seconds.
_BOUNDS: list[float] = _sse_channel.DELAY_BOUNDS


def _rates(before: dict[str, Any], after: dict[str, Any], seconds: float) -> dict[str, float]:
    return {
        rate: max(0, after[count] - before.get(count, 0)) / seconds
        for count, rate in _RATES.items()
    }


def _changes(before: dict[str, int], after: dict[str, int], seconds: float) -> dict[str, float]:
    changed = {key: count - before.get(key, 0) for key, count in after.items()}
    return {key: change / seconds for key, change in changed.items() if change > 0}


def _sums(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    sums: dict[str, Any] = {}
    for part in parts:
        for key, count in part.items():
            sums[key] = sums.get(key, 0) + count
    return sums


def _channels(happened: Iterable[_Happened]) -> list[dict[str, Any]]:
    channels: dict[str, dict[str, Any]] = {}
    for its in (channel for part in happened for channel in part.channels):
        known = channels.get(its["name"])
        if known is None:
            channels[its["name"]] = dict(its)
            continue
        known["clients"] = _sums((known["clients"], its["clients"]))
        for rate in _RATES.values():
            known[rate] += its[rate]
    return list(channels.values())


class _Due(NamedTuple):
    """Events of a channel that a sample has, and that one of two counts has yet to show."""

    published: float
    received: float


def _count_once(its: dict[str, Any], received: float, due: _Due, seconds: float) -> _Due:
    """Set a channel's rate of events to what was published, or arrived from elsewhere.

    An event is counted where it is published and where it arrives, and a look may fall between the
    two: it is then in this sample by one count, and must not be in the next by the other. What is
    due is not due for longer, since events of other hosts never show where they were published.
    """
    shown = _Due(
        its["events"] * seconds - due.published,
        received * seconds - due.received,
    )
    count = max(0.0, *shown)
    its["events"] = count / seconds
    return _Due(*(min(count - each, count) for each in shown))


def _size(channel: dict[str, Any]) -> tuple[Any, ...]:
    return (-sum(channel["clients"].values()), -channel["deliveries"], channel["name"])


def _slowest(answers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    slow = [
        {**client, "host": answer["host"]}
        for answer in answers
        for client in answer["slowest"]
        if client["behind"] >= _SLOW
    ]
    return sorted(slow, key=lambda client: -client["behind"])[:_SLOWEST]


def _percentiles(counts: Sequence[int]) -> dict[str, float] | None:
    """The delays that 50, 90 and 99 of 100 deliveries did not exceed, in seconds."""
    if not any(counts):
        return None
    return {f"p{percent}": _quantile(counts, percent / 100) for percent in (50, 90, 99)}


def _quantile(counts: Sequence[int], share: float) -> float:
    rank = share * sum(counts)
    below, lower = 0, 0.0
    for count, upper in zip(counts, _BOUNDS, strict=False):
        if count and below + count >= rank:
            # As if those of one bucket were spread evenly over it.
            return lower + (upper - lower) * (rank - below) / count
        below, lower = below + count, upper
    # Beyond the last bound nothing more is known.
    return lower
