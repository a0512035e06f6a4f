"""What was published and acknowledged, what each follower received of it, and what that says."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import pairwise
from json import JSONDecodeError
from pathlib import Path
from typing import NamedTuple

from servers import Event, Follower, Server

_PUBLISH = """
import os, sys, time
from sse_channel import BusError, sse_channel

name, path, padding = sys.argv[1:]
told = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
more = {"padding": "x" * int(padding)} if int(padding) else {}
n = 0
while True:
    try:
        answer = sse_channel.publish({"publisher": name, "n": n, **more})
    except BusError as error:
        answer = f"refused {type(error).__name__}"
    # In one write, so that a kill leaves no half of it.
    os.write(told, f"{n} {time.monotonic()} {answer}\\n".encode())
    n += 1
    time.sleep(0.01)
"""


class Acknowledged(NamedTuple):
    """An event that a publisher was given an id for."""

    n: int
    at: float  # of `time.monotonic`
    id: str


class Published(NamedTuple):
    """What one publisher did."""

    acknowledged: list[Acknowledged]
    #: The numbers of the events whose publish raised BusError: each may appear, or not.
    refused: list[int]

    @property
    def count(self) -> int:
        return len(self.acknowledged) + len(self.refused)


class Publishers:
    """Processes that publish a hundred events a second, and say what was acknowledged to them.

    One that is killed is followed by the next, under a name of its own. `padding` is the length of
    a text in each event. Their figures lie in `directory`.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str], *, padding: int = 0):
        self._directory = directory
        self._environment = environment
        self._padding = padding
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._started = 0
        directory.mkdir()

    def start(self) -> None:
        name = f"publisher {self._started}"
        self._started += 1
        self._running[name] = subprocess.Popen(
            [
                *(sys.executable, "-W", "error", "-c", _PUBLISH),
                *(name, self._directory / name, str(self._padding)),
            ],
            cwd=self._directory,
            env=self._environment,
        )

    def kill_one(self, chance: random.Random) -> bool:
        """Kill (-9) one that has published, and start the next; whether there was any."""
        names = [name for name in self._running if self._published_by(name).count]
        if not names:
            return False
        self._kill(chance.choice(names))
        self.start()
        return True

    def _kill(self, name: str) -> None:
        process = self._running.pop(name)
        process.kill()
        # Killed, and not ended by an error of its own.
        assert process.wait() == -signal.SIGKILL, name

    def stop(self) -> None:
        for name in list(self._running):
            self._kill(name)

    def _published_by(self, name: str) -> Published:
        published = Published([], [])
        path = self._directory / name
        for line in path.read_text().splitlines() if path.exists() else []:
            n, at, answer = line.split(maxsplit=2)
            if answer.startswith("refused"):
                published.refused.append(int(n))
            else:
                published.acknowledged.append(Acknowledged(int(n), float(at), answer))
        return published

    def published(self) -> dict[str, Published]:
        """By publisher."""
        names = [f"publisher {number}" for number in range(self._started)]
        return {name: self._published_by(name) for name in names}


class Submitter:
    """A thread that submits articles to the workers and keeps the ids of those with a 201.

    One that was not answered, because its worker was killed, or that was answered by an error,
    because its bus was away, may appear or not.
    """

    def __init__(self, server: Server) -> None:
        self.accepted: list[int] = []
        self.refused = 0
        self._server = server
        self._ended = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._run_ = self._thread.submit(self._run)

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            try:
                answer = self._server.request("POST", "/news/submit/", {"headline": "Article"})
                if answer.status >= 500:
                    self.refused += 1
                    continue
                accepted = answer.json()["id"]
            except (OSError, HTTPException, JSONDecodeError):
                self.refused += 1
                continue
            assert answer.status == 201, answer
            self.accepted.append(accepted)

    def stop(self) -> None:
        self._ended.set()
        self._thread.shutdown()
        self._run_.result()


# --- What that says -----------------------------------------------------------------------------


class Tally(NamedTuple):
    """How delivery went: the sums over all followers, and the worst of the waits."""

    acknowledged: int
    #: Publishes and requests that ended with an error: the application knows, and may try again.
    refused: int
    #: Events that a follower has not received, and was not told of.
    lost: int
    #: Events that a follower has not received, where it was told so by a `stream-reset`.
    told: int
    #: Events that a follower has received twice, or under two ids, or that are not what was sent.
    doubled: int
    #: Events that came after one that was ordered after them.
    disordered: int
    resets: int
    connections: int
    #: Answers that no client of a server that is merely disturbed should get.
    failures: list[str]
    #: The longest time in seconds that a follower was connected and without an acknowledged event.
    longest_wait: float
    #: The longest time in seconds between two events of a follower, connected or not.
    longest_silence: float

    @property
    def is_perfect(self) -> bool:
        return not (self.lost or self.doubled or self.disordered)


def tally(
    followers: Sequence[Follower], published: Mapping[str, Published], submitter: Submitter
) -> Tally:
    """Hold what `followers` received against what was acknowledged.

    What was never acknowledged, because its publisher was killed or told of an error, counts
    where at least one of them has it: then all must.
    """
    received = [follower.events for follower in followers]
    contents = {
        event.last_event_id: event.json()
        for events in received
        for event in events
        if event.type == "message"
    }
    due = set(contents)
    due.update(one.id for each in published.values() for one in each.acknowledged)
    articles = Counter(each["id"] for each in contents.values() if "id" in each)
    # Nobody knows its place: who was told of a gap may have been told of this one.
    nowhere = sum(1 for article in submitter.accepted if article not in articles)
    lost, told, doubled, disordered, resets = 0, 0, 0, 0, 0
    for events in received:
        each = _hold(events, due)
        if each.resets:
            told += nowhere
        else:
            lost += nowhere
        lost, told = lost + each.lost, told + each.told
        doubled, disordered = doubled + each.doubled, disordered + each.disordered
        resets += each.resets
    times = {one.id: one.at for each in published.values() for one in each.acknowledged}
    return Tally(
        acknowledged=len(times) + len(submitter.accepted),
        refused=sum(len(each.refused) for each in published.values()) + submitter.refused,
        lost=lost,
        told=told,
        doubled=doubled + _twice(contents, articles, published),
        disordered=disordered,
        resets=resets,
        connections=sum(len(follower.streams) for follower in followers),
        failures=[failure for follower in followers for failure in follower.failures],
        longest_wait=max(follower.longest_wait(times) for follower in followers),
        longest_silence=max(map(_longest_silence, followers)),
    )


class _Held(NamedTuple):
    lost: int
    told: int
    doubled: int
    disordered: int
    resets: int


def _hold(events: Sequence[Event], due: set[str]) -> _Held:
    """What one follower received, against all there was to receive."""
    messages = [event for event in events if event.type == "message"]
    positions = [_position(event.last_event_id) for event in messages]
    missing = sorted(map(_position, due - {event.last_event_id for event in messages}))
    gaps = _told_gaps(events)
    told = sum(any(after < one < before for after, before in gaps) for one in missing)
    return _Held(
        lost=len(missing) - told,
        told=told,
        doubled=len(positions) - len(set(positions)),
        disordered=sum(one > other for one, other in pairwise(positions)),
        resets=sum(event.type == "stream-reset" for event in events),
    )


_Position = tuple[int, int]


def _position(event_id: str) -> _Position:
    ms, n = event_id.split("-")
    return int(ms), int(n)


def _told_gaps(events: Sequence[Event]) -> list[tuple[_Position, _Position]]:
    """Between which positions a follower was told that something is missing."""
    gaps = []
    after: _Position = (0, 0)
    is_told = False
    for event in events:
        if event.type == "stream-reset":
            is_told = True
            continue
        here = _position(event.last_event_id)
        if is_told:
            gaps.append((after, here))
            is_told = False
        after = here
    return gaps


def _twice(
    contents: Mapping[str, Mapping[str, object]],
    articles: Counter[object],
    published: Mapping[str, Published],
) -> int:
    """Publications that the bus has ordered twice, or ordered as something else."""
    wrong = sum(count - 1 for count in articles.values())
    numbers = Counter(
        (each["publisher"], each["n"]) for each in contents.values() if "publisher" in each
    )
    wrong += sum(count - 1 for count in numbers.values())
    for name, each in published.items():
        expected = {one.id: one.n for one in each.acknowledged}
        wrong += sum(
            (contents[id_].get("publisher"), contents[id_].get("n")) != (name, n)
            for id_, n in expected.items()
            if id_ in contents
        )
        # The last one's acknowledgement may have been killed with its publisher.
        known = {*expected.values(), *each.refused, each.count}
        wrong += sum(who == name and n not in known for who, n in numbers)
    return wrong


def _longest_silence(follower: Follower) -> float:
    times = [at for stream in follower.streams for at in stream.times]
    return max((later - one for one, later in pairwise(times)), default=0.0)
