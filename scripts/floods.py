"""Floods: what clients that mean harm cost a worker, and one that does not, with and without caps.

    python scripts/floods.py                    # all
    python scripts/floods.py slow               # those whose name contains the text
    python scripts/floods.py --seconds 30

Each flood has a server of its own: the news example, one worker of gunicorn, which offloads. A
process publishes ten events of 20 KB a second, and one client reads them and comes back when it is
sent away, as a browser does. The table tells the worker's memory (RSS) and descriptors before, at
their peak and two seconds after the flood, the longest time in which the well-behaved client got
nothing, how often it had to come back, and what the library counted. Linux alone: /proc tells.

The exit status is 1 when the well-behaved client got nothing at all in some flood other than
`head`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from ports import HOST  # noqa: E402
from servers import EXAMPLE, Server, until  # noqa: E402

PATH = "/channels/flooded/"
PUBLISHER = """
import django, time
django.setup()
from sse_channel import SSEChannel
channel = SSEChannel("flooded")
while True:
    channel.publish("x" * 20_000)
    time.sleep(0.1)
"""
CONNECT_FOR = 10.0  # seconds until a server that takes nobody has refused a client
AT_ONCE = 500  # connects under way
GIVEN_UP = 0.05  # seconds after which a connect that has not come about is given up
CAPS_OFF = {"backlog_bytes": 1 << 40}
SERVERS = ["gunicorn-sync", "gunicorn-gevent"]


class Flood(NamedTuple):
    """One kind of clients that mean harm."""

    name: str
    run: Callable[[Server, float], str]
    """Floods for so many seconds; what it attempted."""
    caps: dict[str, dict[str, object]]
    """The options of the library, by what the table calls them."""
    arguments: tuple[str, ...] = ()
    """Of gunicorn."""
    descriptors: int = 0
    """How many the worker may have; 0 for as many as it has."""


# --- The floods -------------------------------------------------------------------------------


def connect(server: Server, stack: contextlib.ExitStack, sent: bytes = b"") -> socket.socket:
    connection = stack.enter_context(socket.socket())
    # What the kernel keeps for one that does not read is not what is measured.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(CONNECT_FOR)
    connection.connect((HOST, server.port))
    connection.sendall(sent or f"GET {PATH} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    return connection


def open_many(server: Server, stack: contextlib.ExitStack, count: int, seconds: float) -> int:
    """Streams that nobody reads, until so many are open or the time is over."""
    begun = time.monotonic()
    for opened in range(count):
        if time.monotonic() - begun > seconds:
            return opened
        try:
            connect(server, stack)
        except OSError:
            return opened
    return count


def slow_readers(server: Server, seconds: float) -> str:
    with contextlib.ExitStack() as stack:
        opened = open_many(server, stack, 500, 30)
        time.sleep(2 * seconds)
    return f"{opened} streams that read nothing"


def holders(server: Server, seconds: float) -> str:
    with contextlib.ExitStack() as stack:
        opened = open_many(server, stack, 3000, 30)
        time.sleep(seconds / 2)
    return f"{opened} streams of one address, held open"


def leavers(server: Server, seconds: float) -> str:
    """As many connects as one process can make, each with its request, and gone at once.

    Those that the kernel has no room for are given up after `GIVEN_UP`; else it would be the
    server, by its backlog, that says how many come.
    """
    begun, opened, refused, given_up = 0, 0, 0, 0
    request = f"GET {PATH} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    under_way: dict[socket.socket, float] = {}
    end = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:

        def leave(connection: socket.socket) -> None:
            selector.unregister(connection)
            del under_way[connection]
            connection.close()

        while (now := time.monotonic()) < end or under_way:
            while now < end and len(under_way) < AT_ONCE:
                connection = socket.socket()
                connection.setblocking(False)
                error = connection.connect_ex((HOST, server.port))
                begun += 1
                if error not in (0, errno.EINPROGRESS):
                    refused += 1
                    connection.close()
                    break
                under_way[connection] = now
                selector.register(connection, selectors.EVENT_WRITE)
            for key, _ in selector.select(0.01):
                try:
                    key.fileobj.send(request)
                    opened += 1
                except OSError:
                    refused += 1
                leave(key.fileobj)
            # In the order of their beginnings.
            for connection, since in list(itertools.islice(under_way.items(), AT_ONCE)):
                if now - since < GIVEN_UP:
                    break
                given_up += 1
                leave(connection)
    return (
        f"{begun / seconds:,.0f} connects a second, {opened / seconds:,.0f} of them with a "
        f"request, that leave at once, {refused} refused, {given_up} given up"
    )


def talkers(server: Server, seconds: float) -> str:
    with contextlib.ExitStack() as stack:
        talking = [connect(server, stack) for _ in range(100)]
        for connection in talking:
            connection.setblocking(False)
        sent, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            for connection in list(talking):
                try:
                    sent += connection.send(b"x" * 65_536)
                except BlockingIOError:
                    continue
                except OSError:
                    talking.remove(connection)
            time.sleep(0.001)
    return f"100 clients that sent {sent / 1e6:.0f} MB after their request, {len(talking)} left"


def unfinished_heads(server: Server, seconds: float) -> str:
    with contextlib.ExitStack() as stack:
        heads = [connect(server, stack, b"GET / HTTP/1.1\r\nX: ") for _ in range(200)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for connection in heads:
                with contextlib.suppress(OSError):
                    connection.sendall(b"x")
            time.sleep(0.5)
    return "200 requests whose head never ends"


def more_than_descriptors(server: Server, seconds: float) -> str:
    with contextlib.ExitStack() as stack:
        opened = open_many(server, stack, 400, 15)
        time.sleep(seconds / 2)
    return f"{opened} streams, a worker that may have 200 descriptors"


FLOODS = [
    Flood("slow", slow_readers, {"BACKLOG_BYTES": {}, "no cap on bytes": CAPS_OFF}),
    Flood(
        "hold",
        holders,
        {
            "no limit": {},
            "MAX_CLIENTS=500": {"max_clients": 500},
            "MAX_CLIENTS_PER_ADDRESS=100": {"max_clients_per_address": 100},
        },
    ),
    Flood("leave", leavers, {"as it is": {}}),
    Flood("talk", talkers, {"64 KiB, always": {}}),
    Flood("head", unfinished_heads, {"gunicorn --timeout 5": {}}, ("--timeout", "5")),
    Flood(
        "descriptors",
        more_than_descriptors,
        {"no limit": {}, "MAX_CLIENTS=100": {"max_clients": 100}},
        descriptors=200,
    ),
]


# --- Who watches ------------------------------------------------------------------------------


class WellBehaved:
    """A client that reads what comes, and comes back when its stream ends."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._over = threading.Event()
        self.received = 0
        self.longest = 0.0
        self.returns = -1
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        while not self._over.is_set():
            self.returns += 1
            try:
                # It may be one of those whom a limit keeps out: another address is another client.
                with socket.create_connection(
                    (HOST, self._server.port), 1, source_address=("127.0.0.2", 0)
                ) as connection:
                    connection.sendall(f"GET {PATH} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
                    connection.settimeout(0.5)
                    self._read(connection)
            except OSError:
                pass
            self._note(0)
            self._over.wait(0.5)

    def _read(self, connection: socket.socket) -> None:
        while not self._over.is_set():
            try:
                chunk = connection.recv(1 << 16)
            except TimeoutError:
                self._note(0)
                continue
            if not chunk:
                return
            # The head and what a refused client is told are no events.
            self._note(chunk.count(b"x") // 20_000 or int(chunk.endswith(b"x")))

    def _note(self, events: int) -> None:
        now = time.monotonic()
        self.longest = max(self.longest, now - self._last)
        if events:
            self.received += events
            self._last = now

    def __enter__(self) -> WellBehaved:
        self._thread.start()
        until(lambda: self.received, "the first event")
        self.longest = 0.0
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()


class Watched:
    """What a worker, whichever it is, has at the most."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._over = threading.Event()
        self.before = self.peak = self._look()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _look(self) -> tuple[float, int]:
        try:
            (worker,) = self._server.workers
            return worker.memory_info().rss / (1 << 20), worker.num_fds()
        except (psutil.Error, ValueError):
            # One is killed, and the next not there yet.
            return 0.0, 0

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            now = self._look()
            self.peak = (max(self.peak[0], now[0]), max(self.peak[1], now[1]))

    def end(self) -> tuple[float, int]:
        self._over.set()
        self._thread.join()
        return self._look()


@contextlib.contextmanager
def publishing(server: Server) -> Iterator[None]:
    command = [sys.executable, "-c", PUBLISHER]
    publisher = subprocess.Popen(command, env=server.environment, cwd=EXAMPLE)
    try:
        yield
    finally:
        publisher.kill()
        publisher.wait()


def counted(server: Server) -> str:
    """Why streams ended or were refused, as the library counted it."""
    code = (
        "import django, json; django.setup(); import sse_channel; "
        "print(json.dumps(sse_channel.host_stats()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=EXAMPLE,
        env=server.environment,
        capture_output=True,
        check=True,
    ).stdout
    found: dict[str, int] = {}

    def gather(what: Any) -> None:
        if not isinstance(what, dict):
            return
        for key, value in what.items():
            if key in ("disconnected", "refused") and isinstance(value, dict):
                for reason, count in value.items():
                    if count:
                        found[reason] = max(found.get(reason, 0), count)
            gather(value)

    gather(json.loads(out))
    return ", ".join(f"{reason} {count}" for reason, count in sorted(found.items())) or "-"


def run(flood: Flood, kind: str, cap: str, seconds: float) -> tuple[list[str], bool]:
    with (
        tempfile.TemporaryDirectory(prefix="sse-") as directory,
        Server(kind, Path(directory), arguments=flood.arguments, **flood.caps[cap]) as server,
        publishing(server),
        WellBehaved(server) as client,
    ):
        if flood.descriptors:
            limit = (flood.descriptors, flood.descriptors)
            resource.prlimit(server.worker.pid, resource.RLIMIT_NOFILE, limit)
        watched = Watched(server)
        received = client.received
        attempted = flood.run(server, seconds)
        was_served = client.received > received
        time.sleep(2)
        after = watched.end()
        memory = "/".join(f"{mib:.0f}" for mib in (watched.before[0], watched.peak[0], after[0]))
        files = "/".join(str(count) for count in (watched.before[1], watched.peak[1], after[1]))
        row = [flood.name, kind.removeprefix("gunicorn-"), cap, attempted, memory, files]
        row += [f"{client.longest:.1f}", str(client.returns), counted(server)]
        return row, was_served


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", default="", help="a part of the floods' names")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each flood (10)")
    options = parser.parse_args()
    # Many clients are ours.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    titles = "flood | worker | caps | attempted | MiB before/peak/after | descriptors"
    print(f"| {titles} | s of silence | came back | counted |")
    print("| --- | --- | --- | --- | --- | --- | ---: | ---: | --- |")
    all_served = True
    for flood in FLOODS:
        if options.name not in flood.name:
            continue
        for kind in SERVERS:
            for cap in flood.caps:
                row, was_served = run(flood, kind, cap, options.seconds)
                print(f"| {' | '.join(row)} |", flush=True)
                all_served &= was_served or flood.name == "head"
    return 0 if all_served else 1


if __name__ == "__main__":
    sys.exit(main())
