"""Soak: an hour of 5,000 clients that come and go, mixed publishes and reloads; is all flat?

    python scripts/soak.py                              # an hour: local bus, two sync workers
    python scripts/soak.py --minutes 10
    python scripts/soak.py --worker gevent --bus redis  # 300 streams of it stay in Python

The news example runs under gunicorn. Clients of `benches/load` (`follow.rs`) leave and come back,
some compressed, some slow; each checks that it gets every event once and in order over all of its
connections, and in the end they are compared with what was published. Published is by the workers,
by processes beside them that stay and by ones that end. Between a quarter and 55% of the time
gunicorn is reloaded (HUP) again and again; before and after that the same processes stay, so that
growth within a process can be seen, and of each reload's workers what they take at the same age.

It needs Rust's cargo, and what `pip install --group test` brings. The report is printed and written
to .soak/report.md, also at Ctrl-C and SIGTERM. The exit status is 0 when nothing was lost, doubled,
out of order or reset and everything was flat, else 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import http.client
import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".soak"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benches")]

import load_generator  # noqa: E402

from buses import SharedBus  # noqa: E402
from ports import HOST  # noqa: E402
from redis_server import RedisServer  # noqa: E402
from servers import Server  # noqa: E402

MB = 1_000_000
HISTORY_AGE = 90  # seconds; so that a worker's memory of the channels is full after that time
SETTLES = 120  # seconds of age from which on a process's size says something
#: The part of the time within which gunicorn is reloaded.
RELOADS = (0.25, 0.55)
OPENS = 300  # seconds for all clients to be there
CATCHES_UP = 90  # seconds for the last client to have the last event
NO_ANSWER = "no answer, and the end"  # as the load generator calls it

#: What each quantity may grow by over a series, in which unit, and why. In an hour each worker has
#: 90,000 connections and 25 million deliveries: what is kept of each is soon more than that.
BOUNDS = {
    "USS": (3.0, "MB", "since events of 200 KB come and go, in memory and in backlogs"),
    "descriptors": (1.5, "", "since one may be open for a moment"),
    "threads": (0.9, "", "none may come"),
    "strangers": (25.0, "", "since some come or leave while it is counted"),
}


# --- What is flat -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Series:
    """Values of one quantity of one process over seconds."""

    name: str
    quantity: str  # a key of BOUNDS
    points: Sequence[tuple[float, float]]

    @property
    def duration(self) -> float:
        """Seconds from the first to the last value."""
        return self.points[-1][0] - self.points[0][0] if self.points else 0.0

    @property
    def slope(self) -> float:
        """What it grows by in a second, by least squares."""
        times, values = zip(*self.points, strict=True)
        return statistics.linear_regression(times, values).slope

    @property
    def growth(self) -> float:
        """What it has grown by from the first to the last value, by the slope."""
        return self.slope * self.duration

    @property
    def is_known(self) -> bool:
        """Whether there are enough values for a slope."""
        return len(self.points) >= 3 and self.duration > 0

    @property
    def is_flat(self) -> bool:
        """Whether it has grown by less than the bound. To shrink is no leak."""
        return self.growth < BOUNDS[self.quantity][0]


@dataclasses.dataclass(frozen=True)
class Look:
    """A process at one moment."""

    at: float  # seconds since the beginning
    process: int
    role: str  # "master", "worker" or "publisher"
    generation: int  # of a worker: how many reloads there had been
    age: float  # seconds
    values: dict[str, float]  # USS, PSS and RSS in MB; descriptors, threads, sockets


def settled(looks: Iterable[Look], quantities: Sequence[str], settles: float) -> list[Series]:
    """A series for each process and quantity, from the age `settles` on.

    A process that did not live for as long again is left out: its workers are compared by
    `generations`.
    """
    found: dict[tuple[str, int, int], list[Look]] = {}
    for look in looks:
        if look.age >= settles:
            found.setdefault((look.role, look.generation, look.process), []).append(look)
    series = []
    for (role, generation, process), its in found.items():
        if its[-1].at - its[0].at < settles / 2:
            continue
        which = f", {generation} reloads" if role == "worker" else ""
        for quantity in quantities:
            points = [(look.at, look.values[quantity]) for look in its]
            series.append(Series(f"{role} {process}{which}", quantity, points))
    return series


def generations(looks: Iterable[Look], quantities: Sequence[str], age: float) -> list[Series]:
    """The workers of each reload about the same age, as one series for each quantity."""
    by_worker: dict[tuple[int, int], list[Look]] = {}
    for look in looks:
        # The first ones began before anything was published.
        if look.role == "worker" and look.generation and abs(look.age - age) < age / 3:
            by_worker.setdefault((look.generation, look.process), []).append(look)
    by_generation: dict[int, list[list[Look]]] = {}
    for (generation, _), its in by_worker.items():
        by_generation.setdefault(generation, []).append(its)

    def point(workers: list[list[Look]], quantity: str) -> tuple[float, float]:
        # By the median: a database that is open during a request takes three descriptors or four.
        return (
            statistics.mean(statistics.median(look.at for look in its) for its in workers),
            statistics.mean(
                statistics.median(look.values[quantity] for look in its) for its in workers
            ),
        )

    return [
        Series(
            f"workers of each reload at {age:.0f} s",
            quantity,
            [point(workers, quantity) for _, workers in sorted(by_generation.items())],
        )
        for quantity in quantities
    ]


# --- What runs --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stream:
    """A path with its part of the clients."""

    path: str
    channels: tuple[str, ...]
    share: float
    has_ids: bool = True


STREAMS = (
    Stream("/news/stream/?last_n=10", ("default",), 0.2),
    Stream("/news/events/", ("default",), 0.2),
    Stream("/channels/ticker/", ("ticker",), 0.3),
    Stream("/channels/ticker,bulk/", ("ticker", "bulk"), 0.1),
    Stream("/channels/bulk/", ("bulk",), 0.2),
)
#: Of those that stay in Python: the library's stream, and the app's own generator over a queue.
ORDINARY = (
    Stream("/replaced/", ("default",), 0.3, has_ids=False),
    Stream("/ordinary/ticker/", ("ticker",), 0.7),
)

KINDS = {"sync": "gunicorn-sync-3", "gevent": "gunicorn-gevent-3", "gthread": "gunicorn-gthread-3"}


def groups(clients: int, ordinary: int, worker: str) -> list[str]:
    """How many clients follow each path, as `load follow` takes it."""
    words = []
    # A thread in a generator without end keeps its worker until gunicorn's patience is over.
    kept = ORDINARY if worker == "gevent" else ORDINARY[1:]
    for streams, count in ((STREAMS, clients - ordinary), (kept, ordinary)):
        left = count
        for stream in streams:
            share = left if stream is streams[-1] else round(count * stream.share)
            left -= share
            if share:
                words.append(f"{'' if stream.has_ids else 'queue:'}{stream.path}={share}")
    return words


class Load:
    """The load generator, which has the clients."""

    def __init__(self, program: Path, port: int, churn: int, groups: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [program, "follow", f"{HOST}:{port}", str(churn), *groups],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for this process.
            start_new_session=True,
        )

    def tell(self, line: str) -> dict[str, Any]:
        """Its answer to a line."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


# Rates a second, and sizes in bytes: each channel's own mixture.
OUTSIDE = {"default": 0.5, "ticker": 2.0, "bulk": 0.5}
INSIDE = {"default": 0.25, "ticker": 1.5, "bulk": 0.25}
ARTICLES = 0.25
BURST = {"default": 5, "ticker": 10, "bulk": 2}
BURST_EVERY = 20.0


def size(chance: random.Random, channel: str) -> int:
    """The size of an event's text: mostly small, up to 200 KB on one channel."""
    if channel == "ticker":
        return chance.randint(20, 400)
    if channel == "default":
        return chance.randint(20, 2000)
    limits = chance.choices(
        [(20, 400), (400, 4000), (4000, 40_000), (200_000, 200_000)], [70, 20, 8, 2]
    )[0]
    return chance.randint(*limits)


def message(chance: random.Random, channel: str, publisher: int, number: int) -> dict[str, Any]:
    """An event as the clients check it."""
    now = time.monotonic_ns()
    return {"p": publisher, "n": number, "t": now, "text": "x" * size(chance, channel)}


def outsider(words: Sequence[str]) -> int:
    """The main function of a process that publishes beside the server.

    With ``burst`` it publishes BURST and ends, else until the end of standard input. Its
    publishers' numbers are given, one for each channel; in the end it says how many were published.
    """
    from sse_channel import SSEChannel

    kind, *numbers = words
    publishers = dict(zip(OUTSIDE, map(int, numbers), strict=True))
    chance = random.Random(publishers["default"])
    counts = dict.fromkeys(OUTSIDE, 0)
    channels = {name: SSEChannel(name) for name in OUTSIDE}

    def publish(name: str) -> None:
        channels[name].publish(message(chance, name, publishers[name], counts[name]))
        counts[name] += 1

    if kind == "burst":
        for name, count in BURST.items():
            for _ in range(count):
                publish(name)
    else:
        is_over = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
        for name, pause in paced(OUTSIDE, chance):
            if is_over.wait(pause):
                break
            publish(name)
    print(json.dumps({publishers[name]: counts[name] for name in counts}))
    return 0


def paced(rates: dict[str, float], chance: random.Random) -> Iterator[tuple[str, float]]:
    """What is due next, at random at those rates a second, and the pause until then."""
    total = sum(rates.values())
    while True:
        (name,) = chance.choices(list(rates), list(rates.values()))
        yield name, chance.expovariate(total)


@dataclasses.dataclass
class Published:
    """What one publisher has published on one channel."""

    channel: str
    count: int = 0
    #: One more may have been: it was not answered.
    is_uncertain: bool = False


class Publishers:
    """All that publish, and what they have published, by their number."""

    def __init__(self, server: Server) -> None:
        self.published: dict[int, Published] = {}
        self.articles = Published("default")
        self.unanswered = 0
        self.process: subprocess.Popen[str] | None = None
        self.failures: list[str] = []
        self._server = server
        self._numbers = itertools.count(1)
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,))
            for run in (self._submit, self._publish_inside, self._burst)
        ]

    def start(self) -> None:
        self.process = self._outsider("stay")
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End them all, and learn what they have published."""
        self._is_over.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        if self.process is not None:
            self._take(self.process)
            self.process = None

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:  # for the report, whatever it is
            self.failures.append(f"{run.__name__}: {type(error).__name__}: {error}")

    def _new(self, channel: str) -> int:
        number = next(self._numbers)
        self.published[number] = Published(channel)
        return number

    def _outsider(self, kind: str) -> subprocess.Popen[str]:
        numbers = [str(self._new(channel)) for channel in OUTSIDE]
        return subprocess.Popen(
            [sys.executable, "-W", "error", __file__, "outsider", kind, *numbers],
            env=self._server.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _take(self, process: subprocess.Popen[str]) -> None:
        """Have an outsider end, and note what it says it has published."""
        written, _ = process.communicate(timeout=60)
        if process.returncode:
            self.failures.append(f"a publisher ended with {process.returncode}")
            return
        for number, count in json.loads(written).items():
            self.published[int(number)].count = count

    def _burst(self) -> None:
        while not self._is_over.wait(BURST_EVERY / 2):
            self._take(self._outsider("burst"))
            self._is_over.wait(BURST_EVERY / 2)

    def _post(self, path: str, body: object) -> bool:
        """Whether a worker answered that it has published."""
        try:
            return self._server.request("POST", path, body).status in (200, 201)
        except (OSError, http.client.HTTPException, AssertionError):
            return False

    def _submit(self) -> None:
        while not self._is_over.wait(1 / ARTICLES):
            if self._post("/news/submit/", {"headline": "Rain by noon", "summary": "x" * 500}):
                self.articles.count += 1
            else:
                self.articles.is_uncertain = True
                self.unanswered += 1

    def _publish_inside(self) -> None:
        chance = random.Random(0)
        numbers = {channel: self._new(channel) for channel in INSIDE}
        for channel, pause in paced(INSIDE, chance):
            if self._is_over.wait(pause):
                return
            published = self.published[numbers[channel]]
            body = message(chance, channel, numbers[channel], published.count)
            if self._post(f"/publish/{channel}/", body):
                published.count += 1
            else:
                # Another name, since nobody knows which number the next one has.
                published.is_uncertain = True
                self.unanswered += 1
                numbers[channel] = self._new(channel)


def differences(figures: dict[str, Any], publishers: Publishers) -> list[str]:
    """Where the clients of a path have not got what was published on its channels."""
    found = []
    for stream in (*STREAMS, *ORDINARY):
        its = figures["paths"].get(stream.path)
        if its is None or not stream.has_ids:
            continue
        expected = [
            (f"publisher {number} on {each.channel}", each, its["publishers"].get(str(number), 0))
            for number, each in publishers.published.items()
            if each.channel in stream.channels
        ]
        if "default" in stream.channels:
            expected.append(("articles", publishers.articles, its["unnumbered"]))
        for name, published, received in expected:
            more = received - published.count
            if more < 0 or (more > 0 and not published.is_uncertain):
                found.append(f"{stream.path}: {received} of {published.count} of {name}")
    return found


# --- The run ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A run, and what is known of it so far."""

    seconds: float
    clients: int
    churn: int  # that leave each second
    ordinary: int
    interval: float
    settles: float
    looks: list[Look] = dataclasses.field(default_factory=list)
    stores: list[tuple[float, dict[str, float]]] = dataclasses.field(default_factory=list)
    strangers: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    open: list[int] = dataclasses.field(default_factory=list)
    reloads: list[float] = dataclasses.field(default_factory=list)  # when, in seconds
    #: Seconds until nearly all were with the new workers, by the number of the reload.
    moved: dict[int, float] = dataclasses.field(default_factory=dict)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    lasted: float = 0.0
    wrong: list[str] = dataclasses.field(default_factory=list)  # what must not be, in words
    left: int | None = None  # connections of the workers when all clients had gone
    is_whole: bool = False

    @property
    def nearly_all(self) -> int:
        """Clients that are there when only those are away who left within two seconds."""
        return self.clients - max(self.clients // 50, 2 * self.churn)

    @property
    def reload_times(self) -> list[float]:
        """When gunicorn is to be reloaded: up to six times, at least a minute apart."""
        first, last = (part * self.seconds for part in RELOADS)
        count = max(1, min(6, int((last - first) / 60)))
        return [first + number * (last - first) / count for number in range(count)]

    @property
    def equal_age(self) -> float:
        """Seconds of age at which the workers of each reload are compared."""
        between = [b - a for a, b in itertools.pairwise(self.reload_times)] or [self.seconds / 4]
        return 0.75 * min(between)

    def series(self) -> list[Series]:
        """All that must be flat."""
        quantities = ("USS", "descriptors", "threads")
        found = settled(self.looks, quantities, self.settles)
        found += generations(self.looks, quantities, self.equal_age)
        # Not while the streams move from one process to another.
        last = max(self.reloads, default=0.0)
        calm = [(at, value) for at, value in self.strangers if at > last + self.settles]
        found.append(Series("sockets without a client", "strangers", calm))
        return [each for each in found if each.is_known]

    def failures(self) -> list[str]:
        """Why it has failed, in words; nothing when it has not."""
        found = list(self.wrong)
        names = ("lost", "doubled", "out_of_order", "resets")
        found += [f"{self.figures[name]} {name}" for name in names if self.figures.get(name)]
        if not self.figures.get("events"):
            found.append("no event was received")
        found += [
            f"{each.quantity} of {each.name} grew by {each.growth:.2f}"
            for each in self.series()
            if not each.is_flat
        ]
        if self.left:
            found.append(f"{self.left} connections are left after all clients have gone")
        return found


def descriptors_of(process: int) -> tuple[int, int]:
    """How many sockets a process has open, and how many other descriptors."""
    sockets = others = 0
    for path in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            is_socket = os.readlink(path).startswith("socket:")
            sockets, others = sockets + is_socket, others + (not is_socket)
    return sockets, others


def connections_of(process: psutil.Process, port: int) -> int:
    """How many connections of the server's port a process has."""
    with suppress(psutil.NoSuchProcess):
        of_port = [each for each in process.net_connections("tcp") if each.laddr.port == port]
        return sum(each.status != psutil.CONN_LISTEN for each in of_port)
    return 0


def look_at(process: psutil.Process, **names: Any) -> Look | None:
    """What a process takes now; None when it has just ended."""
    try:
        with process.oneshot():
            memory = process.memory_full_info()
            age = time.time() - process.create_time()
            threads = process.num_threads()
        sockets, others = descriptors_of(process.pid)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None
    values = {
        **{name.upper(): getattr(memory, name) / MB for name in ("uss", "pss", "rss")},
        # Which worker a client comes to is the system's choice.
        "sockets": sockets,
        "descriptors": others,
        "threads": threads,
    }
    return Look(process=process.pid, age=age, values=values, **names)


def sizes(bus: SharedBus, redis: RedisServer | None) -> dict[str, float]:
    """MB of what the bus keeps outside of the processes."""
    if redis is not None:
        lines = redis.call("INFO", "memory").decode().splitlines()
        told = dict(line.split(":", 1) for line in lines if ":" in line)
        return {name: int(told[name]) / MB for name in ("used_memory", "used_memory_rss")}
    directory = Path(bus.url.removeprefix("local://"))
    found: dict[str, float] = {}
    for path in directory.iterdir() if directory.exists() else ():
        with suppress(FileNotFoundError):
            kind = path.suffix if "sqlite3" in path.name else "others"
            # Its blocks: some files have holes.
            found[kind] = found.get(kind, 0.0) + path.stat().st_blocks * 512 / MB
    return dict(sorted(found.items()))


@contextmanager
def one_bus(kind: str) -> Iterator[tuple[SharedBus, RedisServer | None]]:
    """A bus of its own, and its Redis if it has one."""
    # Where the path of a socket has room, and the files are in memory as they are by default.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sse-soak-", dir=place) as directory, ExitStack() as on:
        if kind == "local":
            yield SharedBus(f"local://{directory}/bus"), None
            return
        redis = RedisServer(Path(directory) / "redis", config="appendfsync everysec\n")
        on.callback(redis.close)
        redis.start()
        yield SharedBus(redis.bus_url()), redis


def soak(run: Run, given: argparse.Namespace, program: Path, *, say: Callable[[str], None]) -> None:
    """The run itself; what it finds is in `run`, also when it is interrupted."""
    for old in ("server.log", "news.sqlite3", "news.sqlite3-wal", "news.sqlite3-shm"):
        (given.directory / old).unlink(missing_ok=True)
    arguments = ["--workers", str(given.workers), "--backlog", "2048"]
    if given.worker == "gthread":
        arguments += ["--threads", str(run.ordinary + 8)]
    with ExitStack() as stack:
        bus, redis = stack.enter_context(one_bus(given.bus))
        server = Server(
            KINDS[given.worker],
            given.directory,
            bus=bus.url,
            arguments=arguments,
            settings="observed.soak",
            history_age=HISTORY_AGE,
            compress=True,
        )
        server.environment["NEWS_DEBUG"] = "0"
        stack.enter_context(server)
        words = groups(run.clients, run.ordinary, given.worker)
        load = Load(program, server.port, given.churn, words)
        stack.callback(load.stop)
        deadline = time.monotonic() + OPENS
        # Nearly all: some leave already.
        while (figures := load.tell("figures"))["open"] < run.nearly_all:
            if time.monotonic() > deadline:
                raise RuntimeError(f"not within {OPENS:g} s: all clients are there; {figures}")
            time.sleep(0.2)
        say(f"{figures['open']} clients")
        publishers = Publishers(server)
        stack.callback(publishers.stop)
        publishers.start()
        generation_of = {process.pid: 0 for process in server.workers}
        begun, next_look, pending = time.monotonic(), 0.0, list(run.reload_times)
        while (at := time.monotonic() - begun) < run.seconds:
            run.lasted = at
            if pending and at >= pending[0]:
                pending.pop(0)
                run.reloads.append(at)
                say(f"{at:6.0f} s: reload {len(run.reloads)}")
                reload(server, generation_of, len(run.reloads))
            # Until all are with the new workers.
            if run.reloads and len(run.reloads) not in run.moved:
                is_calm = load.tell("figures")["open"] >= run.nearly_all
                workers = {process.pid for process in server.workers}
                if is_calm and all(generation_of[pid] == len(run.reloads) for pid in workers):
                    run.moved[len(run.reloads)] = at - run.reloads[-1]
            if at >= next_look:
                next_look = max(next_look + run.interval, at)
                look_at_all(run, at, server, load, publishers, generation_of)
                run.stores.append((at, sizes(bus, redis)))
                if len(run.looks) % 10 == 0 or run.seconds < 60:
                    say(line_of(run))
            unknown = {process.pid for process in server.workers} - generation_of.keys()
            if unknown:
                run.wrong.append(f"workers that no reload began: {unknown}")
                generation_of.update(dict.fromkeys(unknown, len(run.reloads)))
            time.sleep(0.2)
        run.lasted = run.seconds
        finish(run, server, load, publishers)
        run.is_whole = True


def reload(server: Server, generation_of: dict[int, int], number: int) -> None:
    """Have gunicorn begin new workers, and end the others."""
    before = {process.pid for process in server.workers}
    server.master.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 60
    while True:
        now = {process.pid for process in server.workers}
        generation_of.update(dict.fromkeys(now - before, number))
        if now and not now & before:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"workers that a reload did not end: {now & before}")
        time.sleep(0.1)


def look_at_all(
    run: Run,
    at: float,
    server: Server,
    load: Load,
    publishers: Publishers,
    generation_of: dict[int, int],
) -> None:
    looks = [look_at(server.master, at=at, role="master", generation=0)]
    for process in server.workers:
        generation = generation_of.get(process.pid, len(run.reloads))
        looks.append(look_at(process, at=at, role="worker", generation=generation))
    if publishers.process is not None:
        beside = psutil.Process(publishers.process.pid)
        looks.append(look_at(beside, at=at, role="publisher", generation=0))
    run.figures = load.tell("figures")
    run.open.append(run.figures["open"])
    found = [look for look in looks if look is not None]
    run.looks += found
    sockets = sum(look.values["sockets"] for look in found if look.role == "worker")
    run.strangers.append((at, sockets - run.figures["open"]))


def finish(run: Run, server: Server, load: Load, publishers: Publishers) -> None:
    """No more is published: each client must come to the last event, then all leave."""
    publishers.stop()
    run.wrong += publishers.failures
    load.tell("finish")
    deadline = time.monotonic() + CATCHES_UP
    while (figures := load.tell("figures"))["behind"] and time.monotonic() < deadline:
        time.sleep(0.2)
    run.figures = {**figures, "published": sum_of(publishers), "unanswered": publishers.unanswered}
    if figures["behind"]:
        run.wrong.append(f"{figures['behind']} events had not come to their clients in the end")
    run.wrong += differences(figures, publishers)
    # Connections may fail; what is no answer, or none to be understood, may not be.
    strange = {
        why: count
        for why, count in figures["failures"].items()
        if "os error" not in why and why != NO_ANSWER
    }
    if strange:
        run.wrong.append(f"answers that are none: {strange}")
    load.stop()
    deadline = time.monotonic() + 30
    while run.left != 0 and time.monotonic() < deadline:
        time.sleep(0.2)
        run.left = sum(connections_of(each, server.port) for each in server.workers)
    written = server.output()
    for word in ("Traceback", "Warning", "CRITICAL"):
        if word in written:
            run.wrong.append(f"the server's log has {word!r}: see server.log beside the report")


def sum_of(publishers: Publishers) -> int:
    counts = [each.count for each in publishers.published.values()]
    return sum(counts) + publishers.articles.count


# --- The report -------------------------------------------------------------------------------


def line_of(run: Run) -> str:
    """Where the run is now."""
    at = run.looks[-1].at
    workers = [look for look in run.looks if look.at == at and look.role == "worker"]
    sizes = ", ".join(f"{look.values['USS']:.1f}" for look in workers)
    wrong = [run.figures[name] for name in ("lost", "doubled", "out_of_order", "resets")]
    return (
        f"{at:6.0f} s: {run.figures['open']} open, {run.figures['connections']} connections, "
        f"{run.figures['events']:,} events, wrong {wrong}, workers' USS {sizes} MB"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, with numbers on the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def report(run: Run, where: str) -> str:
    """All of it in words and tables."""
    figures = run.figures
    failures = run.failures() if run.is_whole else [*run.failures(), "it was not run to its end"]
    outcome = "FAILED: " + "; ".join(failures) if failures else "All held, and all is flat."
    parts = ["# Soak", where, outcome]
    if not figures:
        return "\n\n".join(parts) + "\n"
    left = ", ".join(f"{count:,} by {way}" for way, count in figures["left"].items())
    failed = ", ".join(f"{why}: {count:,}" for why, count in figures["failures"].items())
    delay, opening = figures["delay"], figures["opening"]
    # One that was not over before the next has none.
    numbers = range(1, len(run.reloads) + 1)
    moved = ", ".join(f"{run.moved[n]:.0f}" if n in run.moved else "-" for n in numbers)
    rows = [
        ("time", f"{run.lasted / 60:.1f} min"),
        ("clients open at a look (least, most)", f"{min(run.open):,}, {max(run.open):,}"),
        ("connections", f"{figures['connections']:,}"),
        ("left", left or "none"),
        ("streams ended by the server, cut by it", f"{figures['ended']:,}, {figures['cut']:,}"),
        ("connections that failed", failed or "none"),
        ("reloads, and s until nearly all were back", f"{len(run.reloads)}: {moved}"),
        ("published", f"{figures.get('published', 0):,}"),
        ("publishes without an answer", f"{figures.get('unanswered', 0):,}"),
        ("delivered", f"{figures['events']:,}, {figures['bytes'] / MB:,.0f} MB on the wire"),
        ("lost", f"{figures['lost']:,}"),
        ("doubled", f"{figures['doubled']:,}"),
        ("out of order", f"{figures['out_of_order']:,}"),
        ("resets", f"{figures['resets']:,}"),
        ("longest silence of an open stream", f"{figures['silence']:.1f} s (heartbeat: 15 s)"),
        ("publish to receipt, ms (p50, p99, most)", quantiles(delay)),
        ("request to answer, ms (p50, p99, most)", quantiles(opening)),
        ("connections left after all had gone", "-" if run.left is None else str(run.left)),
    ]
    parts.append(table(("", ""), rows))
    if figures["complaints"]:
        parts.append("\n".join(f"- {complaint}" for complaint in figures["complaints"][:20]))
    rows = []
    for each in run.series():
        bound, unit, _ = BOUNDS[each.quantity]
        values = [value for _, value in each.points]
        rows.append(
            (
                *(each.name, each.quantity, f"{each.duration / 60:.1f}"),
                *(f"{values[0]:.1f}", f"{values[-1]:.1f}", f"{each.slope * 3600:+.2f}"),
                *(f"{each.growth:+.2f}", f"{bound:g} {unit}".strip()),
                "flat" if each.is_flat else "GROWS",
            )
        )
    head = ("series", "of", "min", "first", "last", "slope, 1/h", "growth", "bound", "")
    parts.append(table(head, rows))
    parts.append(
        f"Slopes are by least squares, from the age of {run.settles:.0f} s on; a series grows when "
        "slope times duration is more than the bound. USS in MB. Bounds: "
        + "; ".join(f"{name}, {why}" for name, (_, _, why) in BOUNDS.items())
        + ". Descriptors are those that are no sockets; sockets without a client are those of all "
        "workers, without the clients that were there."
    )
    parts.append(table(PROCESS_HEAD, process_rows(run)))
    if run.stores:
        names = sorted({name for _, store in run.stores for name in store})
        rows = [
            (
                name,
                *(f"{each.get(name, 0):.1f}" for each in (run.stores[0][1], run.stores[-1][1])),
                f"{max(store.get(name, 0) for _, store in run.stores):.1f}",
            )
            for name in names
        ]
        parts.append(table(("the bus's store, MB", "first", "last", "most"), rows))
    return "\n\n".join(parts) + "\n"


def quantiles(of: dict[str, float]) -> str:
    return f"{of['p50']:.1f}, {of['p99']:.0f}, {of['max']:,.0f}"


PROCESS_HEAD = (
    *("process", "from s", "to s", "USS", "PSS", "RSS", "descriptors", "threads", "sockets"),
)


def process_rows(run: Run) -> list[tuple[str, ...]]:
    """The first and last look at each process."""
    rows = []
    by_process: dict[int, list[Look]] = {}
    for look in run.looks:
        by_process.setdefault(look.process, []).append(look)
    for looks in by_process.values():
        first, last = looks[0], looks[-1]
        which = f", {first.generation} reloads" if first.role == "worker" else ""

        def both(name: str, digits: int, first: Look = first, last: Look = last) -> str:
            return " → ".join(f"{each.values[name]:.{digits}f}" for each in (first, last))

        rows.append(
            (
                *(f"{first.role} {first.process}{which}", f"{first.at:.0f}", f"{last.at:.0f}"),
                *(both(name, 1) for name in ("USS", "PSS", "RSS")),
                *(both(name, 0) for name in ("descriptors", "threads", "sockets")),
            )
        )
    return rows


def conditions(run: Run, given: argparse.Namespace) -> str:
    """What was run where."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "no commit"
    packages = ", ".join(f"{name} {version(name)}" for name in ("Django", "gunicorn", "gevent"))
    kept = f", {run.ordinary} of them in Python" if run.ordinary else ""
    return (
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, commit {commit}; "
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {packages}.\n"
        f"{run.clients:,} clients{kept}, {given.churn} leave each second; "
        f"gunicorn, {given.workers} {given.worker} workers; bus {given.bus}; "
        f"HISTORY_AGE {HISTORY_AGE} s."
    )


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="soak.py", description="Thousands of clients that come and go: is all flat?"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--clients", type=int, default=5000, help="how many at all times (5000)")
    parser.add_argument("--churn", type=int, help="that leave each second (1%% of them)")
    parser.add_argument("--bus", choices=["local", "redis"], default="local")
    parser.add_argument("--worker", choices=list(KINDS), default="sync")
    parser.add_argument("--workers", type=int, default=2, help="how many (2)")
    parser.add_argument(
        "--ordinary", type=int, help="clients that stay in Python (300 under gevent, else 0)"
    )
    parser.add_argument("--report", type=Path, help="write the report there, too")
    parser.add_argument(
        "--directory", type=Path, default=WORK, help="for the report and the server's files (.soak)"
    )
    parser.add_argument("--load", type=Path, help="the load generator, instead of building it")
    given = parser.parse_args(words)
    if given.churn is None:
        given.churn = max(1, given.clients // 100)
    if not 0 <= given.churn <= given.clients / 10:
        parser.error(
            "--churn: a tenth of the clients a second at the most, since each is away for one"
        )
    if given.ordinary is None:
        given.ordinary = min(300, given.clients // 10) if given.worker == "gevent" else 0
    if given.worker == "sync" and given.ordinary:
        parser.error("--ordinary: a stream in Python would hold a sync worker")
    if given.ordinary > given.clients:
        parser.error("--ordinary: more than there are clients")
    return given


def main(words: Sequence[str] | None = None) -> int:
    given = parse(words)
    program = given.load or load_generator.build()
    seconds = given.minutes * 60
    given.directory = given.directory.resolve()
    given.directory.mkdir(parents=True, exist_ok=True)
    run = Run(
        seconds=seconds,
        clients=given.clients,
        churn=given.churn,
        ordinary=given.ordinary,
        interval=max(0.5, min(10.0, seconds / 120)),
        settles=min(SETTLES, seconds / 5),
    )
    where = conditions(run, given)
    print(where, flush=True)
    # A run in the background is ended by SIGTERM, and is to say what it knows as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        soak(run, given, program, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("interrupted")
    except Exception as error:  # what there is of the report is worth more than a traceback alone
        run.wrong.append(f"{type(error).__name__}: {error}")
        if not isinstance(error, (OSError, RuntimeError, AssertionError)):
            raise
    finally:
        text = report(run, where)
        for path in filter(None, (given.directory / "report.md", given.report)):
            path.write_text(text)
        print(f"\n{text}", flush=True)
    return 0 if run.is_whole and not run.failures() else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["outsider"]:
        sys.exit(outsider(sys.argv[2:]))
    sys.exit(main())
