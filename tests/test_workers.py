"""One channel over several workers of gunicorn, and over processes beside them."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path

import pytest

from buses import BUSES, bus_of
from servers import (
    EXAMPLE,
    WORKERS_KINDS,
    Event,
    Follower,
    Server,
    follow,
    open_stream,
    open_streams,
    quiet,
    run_python,
    spread_streams,
    until,
    worker_options,
)

STREAMS = 300
ARTICLES = 200
PATH = "/news/events/"


@pytest.fixture(scope="module", params=BUSES)
def bus(request: pytest.FixtureRequest) -> Iterator[str]:
    with bus_of(request.param) as bus:
        yield bus.url


@pytest.fixture(scope="module", params=WORKERS_KINDS)
def running(
    request: pytest.FixtureRequest, bus: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    directory, options = tmp_path_factory.mktemp("workers"), worker_options(request.param)
    with Server(request.param, directory, bus=bus, **options) as server:
        until(lambda: len(server.workers) == 3, "three workers")
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    with complaints_of(running):
        yield running


def complaints_of(server: Server) -> AbstractContextManager[None]:
    """A server that must have nothing to complain about meanwhile."""
    return quiet(server, ("Traceback", "Warning"))


def position(event_id: str) -> tuple[int, int]:
    found = re.fullmatch("([0-9]+)-([0-9]+)", event_id)
    assert found, event_id
    return int(found[1]), int(found[2])


def the_one_order(received: Sequence[Sequence[Event]]) -> Sequence[Event]:
    """What each of several clients has received, which must be the same, each event once."""
    orders = {tuple(events) for events in received}
    assert len(orders) == 1, [len(events) for events in received]
    (order,) = orders
    assert {event.type for event in order} <= {"message"}
    positions = [position(event.last_event_id) for event in order]
    assert all(one < other for one, other in pairwise(positions))
    return order


# --- Many streams ---------------------------------------------------------------------------


def test_streams_of_all_workers_get_what_all_workers_publish(server: Server) -> None:
    with spread_streams(server, PATH, STREAMS // 3) as streams:
        spread = Counter(stream.worker for stream in streams)
        assert spread == {process.pid: STREAMS // 3 for process in server.workers}
        clients = {pid: sum(each["clients"].values()) for pid, each in server.figures().items()}
        assert clients == spread

        publishers = set()

        def submit(n: int) -> int:
            answer = server.request("POST", "/news/submit/", {"headline": f"Article {n}"})
            assert answer.status == 201, answer
            publishers.add(answer.headers["x-worker"])
            return answer.json()["id"]

        with ThreadPoolExecutor(8) as threads:
            articles = list(threads.map(submit, range(ARTICLES)))
            deadline = time.monotonic() + 60
            while len(publishers) < 3:
                assert time.monotonic() < deadline, publishers
                articles += threads.map(submit, range(8))
        # Comes after all the others, and after anything that should not have come.
        articles.append(server.publish("The last article")["id"])

        until(
            lambda: all(len(stream.events) >= len(articles) for stream in streams),
            "each article in each stream",
            within=100,
        )
        order = the_one_order([stream.events for stream in streams])
        received = [event.json()["id"] for event in order]
        assert sorted(received) == sorted(articles)
        assert received[-1] == articles[-1]
        assert not any(stream.is_ended for stream in streams)


PUBLISH = """
import sys
from sse_channel import sse_channel

for n in range(50):
    print(sse_channel.publish({"by": sys.argv[1], "n": n}), flush=True)
"""


def test_streams_get_what_processes_outside_of_gunicorn_publish(server: Server) -> None:
    with open_streams(server, PATH, 30) as streams:
        arguments = [[sys.executable, "-c", PUBLISH, str(number)] for number in range(4)]
        arguments += [
            [sys.executable, "manage.py", "sse_publish", "default", f'{{"by": "{name}", "n": 0}}']
            for name in ("first shell", "second shell")
        ]
        processes = [
            subprocess.Popen(
                each, cwd=EXAMPLE, env=server.environment, stdout=subprocess.PIPE, text=True
            )
            for each in arguments
        ]
        with ThreadPoolExecutor(1) as thread:
            inside = thread.submit(lambda: [server.publish(f"Inside {n}")["id"] for n in range(20)])
            outputs = [process.communicate(timeout=60)[0].split() for process in processes]
            articles = inside.result()
        assert [process.returncode for process in processes] == [0] * 6
        acknowledged = [event_id for output in outputs for event_id in output]
        assert len(acknowledged) == 4 * 50 + 2
        last = server.publish("The last article")["id"]

        count = len(acknowledged) + len(articles) + 1
        until(lambda: all(len(s.events) >= count for s in streams), "each event in each stream")
        order = the_one_order([stream.events for stream in streams])
        messages = [event.json() for event in order]
        assert [each["id"] for each in messages if "id" in each] == [*articles, last]
        ids = [event.last_event_id for event in order if "by" in event.json()]
        assert sorted(ids) == sorted(acknowledged)
        for by in range(4):
            assert [each["n"] for each in messages if each.get("by") == str(by)] == [*range(50)]


def test_a_client_resumes_on_whichever_worker_it_meets(server: Server) -> None:
    with open_stream(server, PATH) as stream:
        server.publish("Seen")
        until(lambda: stream.events, "an event")
        seen = stream.events[0].last_event_id
    missed = [server.publish(f"Missed {n}")["id"] for n in range(5)]
    with spread_streams(server, PATH, 30, Last_Event_ID=seen) as streams:
        assert len({stream.worker for stream in streams}) == 3
        then = server.publish("Then")["id"]
        until(lambda: all(len(stream.events) >= 6 for stream in streams), "missed, and more")
        order = the_one_order([stream.events for stream in streams])
        assert [event.json()["id"] for event in order] == [*missed, then]


def test_processes_that_only_publish_need_no_django(server: Server, tmp_path: Path) -> None:
    environment = {**server.environment, "PYTHONPATH": ""}
    del environment["DJANGO_SETTINGS_MODULE"]
    with open_stream(server, PATH) as stream:
        done = subprocess.run(
            [sys.executable, "-m", "sse_channel", "publish", "default", '{"from": "a shell"}'],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        until(lambda: stream.events, "the event")
        assert stream.events[0].json() == {"from": "a shell"}
        assert stream.events[0].last_event_id == done.stdout.strip()


def test_the_apps_own_stream_goes_on_after_what_is_no_article(server: Server) -> None:
    others = ["text", 7, None, ["a", "list"], {"headline": "No article"}, {"id": 3}]
    with open_stream(server, "/news/stream/") as stream:
        for message in others:
            # Not by the server's workers alone: all of it comes over the bus.
            run_python(
                *("manage.py", "sse_publish", "default", json.dumps(message)),
                environment=server.environment,
            )
        article = server.publish("An article")
        until(lambda: len(stream.events) >= 8, "all of them")
        payloads = [event.json() for event in stream.events]
    assert payloads[0]["worker"] == stream.worker
    worker = stream.worker
    assert payloads[1:7] == [{"announcement": message, "worker": worker} for message in others]
    assert payloads[7]["article"] == article


# --- Workers that come and go ----------------------------------------------------------------


class Submitters:
    """Threads that submit articles to a server until they are stopped.

    `accepted` holds the ids of those that were answered with 201. A request that a worker breaks
    off by its end was not answered: its article may appear or not.
    """

    def __init__(self, server: Server, count: int = 3) -> None:
        self.accepted: list[int] = []
        self.broken_off = 0
        self._server = server
        self._numbers = itertools.count()
        self._ended = threading.Event()
        self._threads = ThreadPoolExecutor(count)
        self._runs = [self._threads.submit(self._run) for _ in range(count)]

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            body = {"headline": f"Article {next(self._numbers)}"}
            try:
                answer = self._server.request("POST", "/news/submit/", body)
            except (OSError, HTTPException):
                self.broken_off += 1
                continue
            assert answer.status == 201, answer
            self.accepted.append(answer.json()["id"])

    def wait_for(self, count: int) -> None:
        """Wait until `count` more are accepted."""
        before = len(self.accepted)
        until(lambda: len(self.accepted) >= before + count, f"{count} more accepted articles")

    def stop(self) -> None:
        self._ended.set()
        self._threads.shutdown()
        for run in self._runs:
            run.result()


def check_that_followers_miss_nothing(
    server: Server, followers: Sequence[Follower], disturb: Callable[[], None]
) -> None:
    """Submit articles while `disturb` runs: each accepted one must reach each follower once."""
    submitters = Submitters(server)
    try:
        submitters.wait_for(20)
        disturb()
        submitters.wait_for(20)
    finally:
        submitters.stop()
    last = server.publish("The last article")["id"]

    def has_all(follower: Follower) -> bool:
        return any(f'"id":{last},' in event.data for event in follower.events[-1:])

    until(lambda: all(map(has_all, followers)), "the last article for each follower", within=60)
    assert [follower.failures for follower in followers] == [[]] * len(followers)
    order = the_one_order([follower.events for follower in followers])
    received = [event.json()["id"] for event in order if "id" in event.json()]
    counts = Counter(received)
    assert set(counts.values()) == {1}
    assert counts.keys() >= set(submitters.accepted)
    # What was not answered is all that may be there beside.
    assert len(received) <= len(submitters.accepted) + submitters.broken_off + 1


KINDS_AND_BUSES = pytest.mark.parametrize(
    ("kind", "bus_kind"), list(itertools.product(WORKERS_KINDS, BUSES))
)


@KINDS_AND_BUSES
def test_workers_that_end_after_their_share_of_requests_lose_nothing(
    kind: str, bus_kind: str, tmp_path: Path
) -> None:
    arguments = ["--max-requests", "20", "--graceful-timeout", "1"]
    with (
        bus_of(bus_kind) as bus,
        Server(kind, tmp_path, bus=bus.url, arguments=arguments, **worker_options(kind)) as server,
    ):
        seen: set[int] = set()

        def nine_workers_were_there() -> bool:
            seen.update(process.pid for process in server.workers)
            return len(seen) >= 9

        with complaints_of(server), follow(server, 9) as followers:
            check_that_followers_miss_nothing(
                server, followers, lambda: until(nine_workers_were_there, "nine workers", within=90)
            )
            assert any(len(follower.streams) > 1 for follower in followers)


@KINDS_AND_BUSES
def test_a_reload_loses_nothing(kind: str, bus_kind: str, tmp_path: Path) -> None:
    arguments = ["--graceful-timeout", "1"]
    with (
        bus_of(bus_kind) as bus,
        Server(kind, tmp_path, bus=bus.url, arguments=arguments, **worker_options(kind)) as server,
    ):
        until(lambda: len(server.workers) == 3, "three workers")

        def reload_twice() -> None:
            for _ in range(2):
                old = {process.pid for process in server.workers}
                server.master.send_signal(signal.SIGHUP)
                until(
                    lambda old=old: (
                        len(new := {process.pid for process in server.workers}) == 3
                        and not new & old
                    ),
                    "three new workers",
                )

        with complaints_of(server), follow(server, 12) as followers:
            check_that_followers_miss_nothing(server, followers, reload_twice)
            assert all(len(follower.streams) > 1 for follower in followers)


@KINDS_AND_BUSES
def test_a_preloaded_application_that_has_published_before_the_fork(
    kind: str, bus_kind: str, tmp_path: Path
) -> None:
    module = "preloaded_gevent" if "gevent" in kind else "preloaded"
    arguments = ["--preload", "--graceful-timeout", "1", f"observed.{module}:application"]
    with bus_of(bus_kind) as bus:
        server = Server(kind, tmp_path, bus=bus.url, arguments=arguments, **worker_options(kind))
        before = run_python(
            *("manage.py", "sse_publish", "default", '"before"'), environment=server.environment
        ).stdout.strip()
        with server, complaints_of(server):
            until(lambda: len(server.workers) == 3, "three workers")
            with follow(server, 12, last_event_id=before) as followers:

                def replace_workers() -> None:
                    old = {process.pid for process in server.workers}
                    if "gevent" in kind:
                        # gunicorn's master, patched, does not see its workers end.
                        return
                    for process in server.workers:
                        process.terminate()
                    until(
                        lambda: (
                            len(new := {process.pid for process in server.workers}) == 3
                            and not new & old
                        ),
                        "three new workers",
                    )

                check_that_followers_miss_nothing(server, followers, replace_workers)
                assert followers[0].events[0].json() == {"imported by": server.master.pid}
                for follower in followers:
                    first, last = follower.streams[0].worker, follower.streams[-1].worker
                    assert server.master.pid not in (first, last)
                    assert ("gevent" in kind) == (first == last)
