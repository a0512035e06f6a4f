"""Publishers, workers and the bus's server, killed (-9) at random: what was acknowledged arrives.

The long form, a minute for each kind of worker and each bus:

    .venv/bin/python -m pytest tests/test_kill.py -m soak -s
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPException
from itertools import pairwise
from json import JSONDecodeError
from pathlib import Path

import pytest

from buses import BUSES, SharedBus, bus_of
from servers import WORKERS_KINDS, Event, Follower, Server, follow, until, worker_options

FOLLOWERS = 30
PUBLISHERS = 3

PUBLISH = """
import os, sys, time
from sse_channel import sse_channel

name = sys.argv[1]
acknowledged = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
n = 0
while True:
    event_id = sse_channel.publish({"publisher": name, "n": n})
    # In one write, so that a kill leaves no half of it.
    os.write(acknowledged, f"{event_id} {time.monotonic()} {n}\\n".encode())
    n += 1
    time.sleep(0.01)
"""


class Publishers:
    """Processes that publish as fast as they may, and say what was acknowledged to them.

    One that is killed is followed by the next, under a name of its own.
    """

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        self._environment = environment
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._started = 0

    def start(self) -> None:
        name = f"publisher {self._started}"
        self._started += 1
        self._running[name] = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PUBLISH, name, self._directory / name],
            cwd=self._directory,
            env=self._environment,
        )

    def kill_one(self, chance: random.Random) -> bool:
        """Kill one that has published; whether there was any."""
        names = [name for name in self._running if self._lines_of(name)]
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

    def _lines_of(self, name: str) -> list[str]:
        path = self._directory / name
        return path.read_text().splitlines() if path.exists() else []

    def acknowledged(self) -> dict[str, list[tuple[str, float, int]]]:
        """By publisher: the id, the time, and the number of each acknowledged event."""
        found = {}
        for number in range(self._started):
            lines = [line.split() for line in self._lines_of(f"publisher {number}")]
            found[f"publisher {number}"] = [(id_, float(at), int(n)) for id_, at, n in lines]
        return found


class Submitter:
    """A thread that submits articles to the workers and keeps the ids of those with a 201."""

    def __init__(self, server: Server) -> None:
        self.accepted: list[int] = []
        self._server = server
        self._ended = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._run_ = self._thread.submit(self._run)

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            try:
                answer = self._server.request("POST", "/news/submit/", {"headline": "Article"})
                accepted = answer.json()["id"]
            except (OSError, HTTPException, JSONDecodeError):
                continue  # its worker was killed, maybe within the answer: it may appear or not
            assert answer.status == 201, answer
            self.accepted.append(accepted)

    def stop(self) -> None:
        self._ended.set()
        self._thread.shutdown()
        self._run_.result()


@dataclass
class Form:
    """How long, and what may pass."""

    seconds: float
    longest_wait: float  # seconds; nobody is to wait longer than one, on a machine that is idle


FORMS = [
    pytest.param(Form(seconds=8, longest_wait=5), id="short"),
    pytest.param(
        Form(seconds=60, longest_wait=1),
        id="long",
        marks=[pytest.mark.soak, pytest.mark.timeout(300)],
    ),
]


@pytest.fixture(params=BUSES)
def bus(request: pytest.FixtureRequest) -> Iterator[SharedBus]:
    with bus_of(request.param) as bus:
        yield bus


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", WORKERS_KINDS)
def test_what_was_acknowledged_reaches_every_follower_once_and_in_order(
    kind: str, form: Form, bus: SharedBus, tmp_path: Path
) -> None:
    seed = int(os.environ.get("SSE_TEST_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}")
    chance = random.Random(seed)
    with ExitStack() as stack:
        server = stack.enter_context(Server(kind, tmp_path, bus=bus.url, **worker_options(kind)))
        until(lambda: len(server.workers) == 3, "three workers")
        followers = stack.enter_context(follow(server, FOLLOWERS))
        directory = tmp_path / "acknowledged"
        directory.mkdir()
        publishers = Publishers(directory, server.environment)
        stack.callback(publishers.stop)
        for _ in range(PUBLISHERS):
            publishers.start()
        submitter = Submitter(server)
        stack.callback(submitter.stop)

        def kill_worker() -> bool:
            workers = server.workers
            if len(workers) < 3:
                return False
            chance.choice(workers).kill()
            return True

        # What can be killed; false when there is none just now.
        kills = {"publishers": lambda: publishers.kill_one(chance), "workers": kill_worker}
        if bus.kill is not None:
            kills["bus"] = lambda: bus.kill() is None
        killed: Counter[str] = Counter()
        deadline = time.monotonic() + form.seconds

        def is_enough() -> bool:
            # Also that it has hit a worker with followers.
            hit = any(len(follower.streams) > 1 for follower in followers)
            return hit and min(killed[what] for what in kills) >= 2

        while time.monotonic() < deadline or not is_enough():
            time.sleep(chance.uniform(0.05, 0.6))
            what = chance.choice(list(kills))
            killed[what] += kills[what]()
        publishers.stop()
        submitter.stop()
        last = final_article(server)
        until(
            lambda: all(follower.count and has_article(follower, last) for follower in followers),
            "the last article for each follower",
        )

        acknowledged = publishers.acknowledged()
        check(followers, acknowledged, [*submitter.accepted, last])
        times = {id_: at for each in acknowledged.values() for id_, at, _ in each}
        longest = max(follower.longest_wait(times) for follower in followers)
        print(
            f"{kind}: killed {dict(killed)}; "
            f"{len(times)} + {len(submitter.accepted)} events acknowledged, "
            f"{followers[0].count} received by each of {FOLLOWERS} followers "
            f"over {sum(len(follower.streams) for follower in followers)} connections; "
            f"longest wait {longest:.3f} s"
        )
        assert longest <= form.longest_wait


def final_article(server: Server) -> int:
    """The id of an article that comes after everything else."""
    while True:
        try:
            return server.publish("The last article")["id"]
        except (OSError, HTTPException, JSONDecodeError):
            continue  # to a worker that has just been killed


def has_article(follower: Follower, article: int) -> bool:
    return any(f'"id":{article},' in event.data for event in follower.streams[-1].events[-2:])


def position(event: Event) -> tuple[int, int]:
    ms, n = event.last_event_id.split("-")
    return int(ms), int(n)


def check(
    followers: Sequence[Follower],
    acknowledged: dict[str, list[tuple[str, float, int]]],
    articles: list[int],
) -> None:
    assert [follower.failures for follower in followers] == [[]] * len(followers)
    # All have received the same, in one order: also what was never acknowledged.
    orders = {tuple(follower.events) for follower in followers}
    assert len(orders) == 1, Counter(follower.count for follower in followers)
    (order,) = orders
    assert {event.type for event in order} == {"message"}
    positions = [position(event) for event in order]
    assert all(one < other for one, other in pairwise(positions))

    received = {event.last_event_id: event.json() for event in order}
    for name, events in acknowledged.items():
        for id_, _, n in events:
            assert received[id_] == {"publisher": name, "n": n}
        numbers = [each["n"] for each in received.values() if each.get("publisher") == name]
        # Each once, in its order; the last one may not have been acknowledged.
        assert numbers == list(range(len(numbers)))
        assert len(numbers) - len(events) in (0, 1)
    counts = Counter(each["id"] for each in received.values() if "id" in each)
    assert set(counts.values()) == {1}
    assert counts.keys() >= set(articles)
