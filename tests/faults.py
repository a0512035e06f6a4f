"""What goes wrong in production, done on purpose to real workers, publishers and buses.

`scripts/faults.py` runs them for a report, `test_faults.py` in short.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import platform
import random
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPException
from json import JSONDecodeError
from pathlib import Path
from typing import NamedTuple

import psutil

from delivery import Publishers, Submitter, Tally, tally
from parts import preloaded, small_file_system
from ports import HOST
from redis_server import RedisServer, with_own_prefix
from servers import (
    WORKERS_KINDS,
    Follower,
    Relay,
    Server,
    follow,
    run_python,
    until,
    worker_options,
)

FOLLOWERS = 30
PUBLISHERS = 3
WORKERS = 3
SLOW = 0.3  # of the followers
ALL_WITHIN = 120  # seconds until the last event is with all, on a machine in a hurry


# --- The buses ------------------------------------------------------------------------------------


class Local:
    """The bus of one host."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"local://{directory}/bus"

    def close(self) -> None:
        pass


class SmallLocal(Local):
    """The same on a file system of its own, that is soon full."""

    def __init__(self, directory: Path) -> None:
        self.place = directory / "small"
        self._mounted = ExitStack()
        self._mounted.enter_context(small_file_system(self.place, "8m"))
        super().__init__(self.place)

    def close(self) -> None:
        self._mounted.close()


class Redis:
    """A Redis of its own."""

    def __init__(self, directory: Path) -> None:
        self.server = RedisServer(directory / "redis")
        self.server.start()
        self.url = self.server.bus_url()

    def close(self) -> None:
        self.server.close()


class RedisPair:
    """A primary and its replica behind one address, as of a load balancer or a service."""

    def __init__(self, directory: Path) -> None:
        self._numbers = itertools.count()
        self._directory = directory
        self._primary = self._new()
        self._replica = self._new()
        self._relay = Relay(self)
        self.url = with_own_prefix(f"redis://{HOST}:{self._relay.port}/0")
        self._replicate()

    @property
    def port(self) -> int:
        """That of the primary."""
        return self._primary.port

    def _new(self) -> RedisServer:
        server = RedisServer(self._directory / f"redis-{next(self._numbers)}")
        server.start()
        return server

    def _replicate(self) -> None:
        self._replica.call("REPLICAOF", HOST, self.port)

        def is_in_step() -> bool:
            # Told as bytes, one fact a line.
            return b"master_link_status:up" in self._replica.call("INFO", "replication")

        until(is_in_step, "the replica has all that the primary has")

    def fail_over(self) -> None:
        """Kill the primary (-9), and have its replica be the primary; another is the replica."""
        self._primary.kill()
        self._relay.cut()
        self._replica.call("REPLICAOF", "NO", "ONE")
        self._primary, self._replica = self._replica, self._primary
        self._relay.mend()
        self._replica.close()
        self._replica = self._new()
        self._replicate()

    def close(self) -> None:
        self._relay.close()
        self._primary.close()
        self._replica.close()


Bus = Local | SmallLocal | Redis | RedisPair


# --- The scene ------------------------------------------------------------------------------------


@dataclass
class Scene:
    """What a fault happens to."""

    server: Server
    bus: Bus
    publishers: Publishers
    #: In front of the server, if there is one: followers come through it.
    relay: Relay | None
    chance: random.Random
    clock: Clock | None

    @property
    def redis(self) -> RedisServer:
        assert isinstance(self.bus, Redis)
        return self.bus.server

    def some_worker(self) -> psutil.Process | None:
        """One of the workers, if all are there."""
        workers = self.server.workers
        return self.chance.choice(workers) if len(workers) >= WORKERS else None


Blow = Callable[[Scene], bool]


def kill_a_worker(scene: Scene) -> bool:
    """Kill (-9) one, at any moment of its life, while another one answers.

    On a busy machine all would be killed before they have begun, and what clients come back to is
    older than the channel's history: then they are told of a gap, as they should be.
    """
    worker = scene.some_worker()
    if worker is None or not _another_answers(scene.server, worker):
        return False
    _if_there(worker.kill)
    return True


def _another_answers(server: Server, worker: psutil.Process) -> bool:
    def ask() -> int | None:
        try:
            return server.request("GET", "/figures/", within=5).json()["process"]
        except (OSError, HTTPException, JSONDecodeError, AssertionError):
            return None  # by one that has just been killed

    # One after the other, so that the one that has just answered may do so again.
    return any(ask() not in (None, worker.pid) for _ in range(10))


def kill_a_publisher(scene: Scene) -> bool:
    return scene.publishers.kill_one(scene.chance)


def kill_redis(scene: Scene) -> bool:
    scene.redis.kill()
    scene.redis.start()
    return True


def empty_redis(scene: Scene) -> bool:
    scene.redis.kill()
    scene.redis.forget()
    scene.redis.start()
    return True


def pause_redis(scene: Scene) -> bool:
    scene.redis.signal(signal.SIGSTOP)
    time.sleep(scene.chance.uniform(0.5, 3))
    scene.redis.signal(signal.SIGCONT)
    return True


def fill_redis(scene: Scene) -> bool:
    scene.redis.call("CONFIG", "SET", "maxmemory", 1)
    time.sleep(1)
    scene.redis.call("CONFIG", "SET", "maxmemory", 0)
    return True


def fail_over(scene: Scene) -> bool:
    assert isinstance(scene.bus, RedisPair)
    scene.bus.fail_over()
    return True


def fill_the_disk(scene: Scene) -> bool:
    assert isinstance(scene.bus, SmallLocal)
    filler = scene.bus.place / "filler"
    end = time.monotonic() + 1.5
    with filler.open("wb", buffering=0) as file:
        # What the store lets go of is taken, too.
        while time.monotonic() < end:
            try:
                file.write(b"x" * 4096)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                time.sleep(0.01)
    filler.unlink()
    return True


def set_the_clock_back(scene: Scene) -> bool:
    assert scene.clock is not None
    scene.clock.set_back(scene.chance.choice([0.5, 30, 3600, 86400]))
    return True


def take_all_descriptors(scene: Scene) -> bool:
    """Leave each worker a few more descriptors than it has, and ask for many."""
    with ExitStack() as stack:
        for worker in scene.server.workers:
            limits = worker.rlimit(psutil.RLIMIT_NOFILE)
            worker.rlimit(psutil.RLIMIT_NOFILE, (worker.num_fds() + 8, limits[1]))
            stack.callback(_if_there, worker.rlimit, psutil.RLIMIT_NOFILE, limits)
        asking = []
        for _ in range(60):
            client = stack.enter_context(socket.create_connection((HOST, scene.server.port), 5))
            client.sendall(b"GET /news/events/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
            asking.append(client)
        time.sleep(1)
        answered, _, _ = select.select(asking, [], [], 0)
    # Else there were enough of them.
    return len(answered) < len(asking)


def take_all_memory(scene: Scene) -> bool:
    """Leave a worker no more memory than it has, publish what needs more, and kill it at last.

    It ends by itself where an allocation fails in Rust; Python raises MemoryError, and goes on.
    """
    worker = scene.some_worker()
    if worker is None:
        return False
    worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms, worker.rlimit(psutil.RLIMIT_AS)[1]))
    end = time.monotonic() + 2
    # It has some in reserve, which takes a while.
    while worker.is_running() and time.monotonic() < end:
        run_python("-c", _LARGE, environment=scene.server.environment)
    _if_there(worker.kill)
    return True


_LARGE = """
from sse_channel import sse_channel
for n in range(5):
    sse_channel.publish({"large": n, "text": "x" * 100_000})
"""


def cut_a_connection(scene: Scene) -> bool:
    assert scene.relay is not None
    return scene.relay.cut_one(scene.chance)


def reload(scene: Scene) -> bool:
    scene.server.master.send_signal(signal.SIGHUP)
    return True


def wait(scene: Scene) -> bool:
    return True


def _if_there(do: Callable[..., object], *arguments: object) -> None:
    """Do something to a process that may have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        do(*arguments)


class Clock:
    """A wall clock for processes that are started with its environment, which can be set back."""

    def __init__(self, directory: Path) -> None:
        library = preloaded("clock.c", directory)
        self._file = directory / "offset"
        self._offset = 0.0
        self._file.write_bytes(struct.pack("d", 0.0))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(self._file)}

    def set_back(self, seconds: float) -> None:
        """Set it back, by seconds."""
        self._offset -= seconds
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("d", self._offset))


# --- The faults -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What happens, over and over, to which bus."""

    name: str
    blows: Sequence[Blow]
    buses: Sequence[type[Bus]]
    #: Seconds between two blows, at the least and at the most.
    pause: tuple[float, float] = (0.05, 0.6)
    #: The workers that it is for, without any wish.
    kinds: Sequence[str] = ("gunicorn-sync-3",)
    #: How often each blow must have hit.
    least: int = 2
    clock: bool = False
    #: Whether it could go otherwise with another bus.
    is_of_the_bus: bool = True
    #: Whether there is a proxy in front. It takes what a slow client does not.
    relay: bool = False
    #: Length of a text in each event.
    padding: int = 0
    #: For how many seconds each slow follower reads nothing.
    stall: float = 0.0
    options: Mapping[str, object] = field(default_factory=dict)
    #: Answers that clients may get: there is nothing else to answer them.
    may_fail: bool = False
    #: Whether clients may be told that something is missing: nobody has it any more.
    may_tell: bool = False
    #: Whether it must have come to errors, or it was no fault at all.
    refuses: bool = False


_BOTH: tuple[type[Bus], ...] = (Local, Redis)

FAULTS = [
    Fault("kill -9 of workers and publishers", (kill_a_worker, kill_a_publisher), (Local,),
          kinds=WORKERS_KINDS),
    Fault("kill -9 of workers, publishers and Redis",
          (kill_a_worker, kill_a_publisher, kill_redis), (Redis,), kinds=WORKERS_KINDS),
    Fault("Redis is paused (SIGSTOP)", (pause_redis,), (Redis,), pause=(0.5, 1)),
    Fault("Redis is restarted empty", (empty_redis,), (Redis,), pause=(1, 2), may_tell=True),
    Fault("Redis fails over to its replica", (fail_over,), (RedisPair,), pause=(0.5, 1)),
    Fault("Redis is full", (fill_redis,), (Redis,), pause=(0.5, 1), refuses=True),
    Fault("the disk is full", (fill_the_disk,), (SmallLocal,), pause=(0.5, 1), refuses=True,
          options={"history_bytes": 1 << 20}),
    Fault("the clock is set back", (set_the_clock_back,), _BOTH, pause=(0.5, 1.5), clock=True),
    Fault("descriptors run out", (take_all_descriptors,), _BOTH, pause=(0.5, 1), may_fail=True,
          is_of_the_bus=False),
    Fault("memory runs out", (take_all_memory,), _BOTH, pause=(0.5, 1), may_fail=True,
          is_of_the_bus=False),
    Fault("a proxy cuts connections", (cut_a_connection,), _BOTH, pause=(0.01, 0.1), least=50,
          relay=True, is_of_the_bus=False),
    Fault("30% of the clients are slow", (wait,), _BOTH, stall=1, padding=1000,
          options={"backlog_bytes": 64 << 10}, pause=(0.5, 1),
          is_of_the_bus=False),
    Fault("a reload (HUP) every five seconds", (reload,), _BOTH, pause=(5, 5),
          is_of_the_bus=False),
]  # fmt: skip


class Pulse:
    """How long this process did not get to run at the longest, as a context manager.

    A machine that was stopped or overloaded for long looks to clients like a server that was.
    """

    EVERY = 0.1  # seconds

    def __init__(self) -> None:
        self.longest = 0.0  # seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        # A machine that is suspended may stop the one clock, and not the other.
        clocks = (time.monotonic, time.time)
        before = [clock() for clock in clocks]
        has_ended = False
        while not has_ended:
            # Also of the last time: the end may be what comes next after a standstill.
            has_ended = self._ended.wait(self.EVERY)
            now = [clock() for clock in clocks]
            took = max(later - one for one, later in zip(before, now, strict=True))
            self.longest = max(self.longest, took - self.EVERY)
            before = now

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()


class Usage(NamedTuple):
    """What the workers take: one, in the mean."""

    memory: float  # bytes that are its own
    descriptors: float


def usage(server: Server) -> Usage:
    def measured() -> Usage | None:
        try:
            workers = server.workers
            memory = [worker.memory_full_info().uss for worker in workers]
            descriptors = [worker.num_fds() for worker in workers]
        except psutil.NoSuchProcess:
            return None
        if len(workers) != WORKERS:
            return None
        return Usage(sum(memory) / WORKERS, sum(descriptors) / WORKERS)

    return until(measured, f"{WORKERS} workers")


@dataclass(frozen=True)
class Outcome:
    """What a fault did."""

    fault: Fault
    kind: str
    bus: str
    blows: Mapping[str, int]
    seconds: float
    tally: Tally
    before: Usage
    after: Usage
    #: For how many seconds the clients themselves did not get to run, at the longest.
    standstill: float
    log: str

    @property
    def problems(self) -> list[str]:
        """What should not be, in words."""
        tally = self.tally
        found = []
        if not tally.is_perfect:
            found.append(
                f"{tally.lost} lost, {tally.doubled} doubled, {tally.disordered} out of order"
            )
        if tally.told and not self.fault.may_tell:
            found.append(f"{tally.told} missed by clients that were told so")
        if self.fault.stall and tally.connections == FOLLOWERS:
            found.append("no slow client was disconnected: the fault did not come to pass")
        if tally.failures and not self.fault.may_fail:
            found.append(f"answered {Counter(tally.failures)}")
        if self.fault.refuses and not tally.refused:
            found.append("nothing was refused: the fault did not come to pass")
        if "panicked" in self.log:
            found.append("a panic is in the log")
        return found


def run(
    fault: Fault,
    bus_type: type[Bus],
    kind: str,
    *,
    seconds: float,
    chance: random.Random,
    log: Path | None = None,
) -> Outcome:
    """Have it happen for so many seconds, and longer until each blow has hit often enough.

    What the server says is in the file `log` in the end, also where it raises.

    Raises:
        AssertionError: a follower did not get the last event, or a process ended by itself.
    """
    with Pulse() as pulse:
        try:
            return _run(fault, bus_type, kind, seconds, chance, log, pulse)
        except AssertionError as error:
            raise AssertionError(
                f"{error}; the clients did not get to run for up to {pulse.longest:.1f} s"
            ) from error


def _run(
    fault: Fault,
    bus_type: type[Bus],
    kind: str,
    seconds: float,
    chance: random.Random,
    log: Path | None,
    pulse: Pulse,
) -> Outcome:
    with ExitStack() as stack:
        # Not in pytest's directory: the path of a Unix socket has room for 107 bytes.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sse-")))
        clock = Clock(directory) if fault.clock else None
        with environment(clock.environment if clock else {}):
            bus = stack.enter_context(contextlib.closing(bus_type(directory)))
        options = {**worker_options(kind), **fault.options}
        server = Server(kind, directory, bus=bus.url, **options)
        server.environment.update(clock.environment if clock else {})
        stack.enter_context(server)
        if log is not None:
            stack.callback(lambda: log.write_text(server.output()))
        until(lambda: len(server.workers) == WORKERS, "the workers")
        relay = stack.enter_context(contextlib.closing(Relay(server))) if fault.relay else None
        stalls = [fault.stall] * round(FOLLOWERS * SLOW) if fault.stall else []
        followers = stack.enter_context(follow(relay or server, FOLLOWERS, stalls=stalls))
        publishers = Publishers(directory / "published", server.environment, padding=fault.padding)
        stack.callback(publishers.stop)
        for _ in range(PUBLISHERS):
            publishers.start()
        submitter = Submitter(server)
        stack.callback(submitter.stop)
        until(lambda: all(f.count >= 100 for f in followers if not f.stall), "the first events")
        before = usage(server)

        scene = Scene(server, bus, publishers, relay, chance, clock)
        blows: Counter[str] = Counter()
        began = time.monotonic()
        while (
            time.monotonic() < began + seconds
            or min(blows[blow.__name__] for blow in fault.blows) < fault.least
        ):
            assert time.monotonic() < began + seconds + 120, f"too few of {fault}: {blows}"
            time.sleep(chance.uniform(*fault.pause))
            blow = chance.choice(fault.blows)
            blows[blow.__name__] += blow(scene)
        took = time.monotonic() - began

        publishers.stop()
        submitter.stop()
        last = last_article(server)
        for follower in followers:
            follower.stall = 0.0
        until(
            lambda: all(has_article(follower, last) for follower in followers),
            "the last article for each follower",
            within=ALL_WITHIN,
        )
        settle(server, followers)
        submitter.accepted.append(last)
        result = tally(followers, publishers.published(), submitter)
        after = usage(server)
        return Outcome(
            fault,
            kind,
            bus_type.__name__,
            dict(blows),
            took,
            result,
            before,
            after,
            pulse.longest,
            server.output(),
        )


def settle(server: Server, followers: Sequence[Follower]) -> None:
    """Wait until nobody has come or gone for two seconds, and all are there."""
    seen: list[object] = []
    since = time.monotonic()

    def is_settled() -> bool:
        nonlocal seen, since
        connections = [(len(follower.streams), follower.is_connected) for follower in followers]
        now: list[object] = [sorted(process.pid for process in server.workers), connections]
        if now != seen or not all(is_there for _, is_there in connections):
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 2

    until(is_settled, "all followers are there, and stay")


@contextlib.contextmanager
def environment(more: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started meanwhile have `more` in their environment."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        for name in more:
            del os.environ[name]
        os.environ.update(before)


def last_article(server: Server) -> int:
    """The id of an article that comes after everything else."""
    found: list[int] = []

    def is_published() -> bool:
        try:
            answer = server.request("POST", "/news/submit/", {"headline": "The last article"})
            if answer.status == 201:
                found.append(answer.json()["id"])
        except TimeoutError:
            # Nobody is killed any more: who has taken it must answer.
            raise AssertionError("an article is not answered at all") from None
        except (OSError, HTTPException, JSONDecodeError):
            pass  # by a worker that has just been killed
        return bool(found)

    # Its workers may have to begin first.
    until(is_published, "an article is accepted", within=ALL_WITHIN)
    return found[0]


def has_article(follower: Follower, article: int) -> bool:
    # Over all streams: who has come back since has nothing on the newest, and gets nothing more.
    newest = itertools.chain.from_iterable(
        reversed(stream.events) for stream in reversed(follower.streams)
    )
    return any(f'"id":{article},' in event.data for event in itertools.islice(newest, 2))


def conditions() -> str:
    """Where it ran, for a report."""
    redis = shutil.which("redis-server")
    said = (
        subprocess.run([redis, "--version"], capture_output=True, text=True).stdout if redis else ""
    )
    version = next((word[2:] for word in said.split() if word.startswith("v=")), "none")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"Linux {platform.release().split('-')[0]}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, Redis {version}, {limit} descriptors"
    )
