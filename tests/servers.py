"""The news example under real servers, and clients for its event streams."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import h11
import psutil

from buses import bus_of, lock_holder
from ports import HOST, free_port
from sse_channel.parser import EventStreamParser
from sse_channel.parser import ReceivedEvent as Event

TESTS = Path(__file__).resolve().parent
EXAMPLE = TESTS.parent / "examples" / "news"
STARTS_WITHIN = 60
STOPS_WITHIN = 30
ANSWERS_WITHIN = 30

_UVICORN = [
    *("-m", "uvicorn", "--host", HOST, "--port", "{port}", "--log-level", "warning"),
    # Streams never end by themselves: waiting for them must have an end.
    *("--timeout-graceful-shutdown", "3"),
]
_GUNICORN = ["-m", "gunicorn", "-c", "gunicorn.conf.py"]
_COMMANDS = {
    "gunicorn-gevent": [*_GUNICORN, "--workers", "1"],
    "gunicorn-gthread": [
        *(*_GUNICORN, "--workers", "1"),
        *("--worker-class", "gthread", "--threads", "210"),
    ],
    "runserver": ["manage.py", "runserver", "--noreload", f"{HOST}:{{port}}"],
    "uvicorn-asyncio": [*_UVICORN, "--loop", "asyncio", "news_api.asgi:application"],
    "uvicorn-uvloop": [*_UVICORN, "--loop", "uvloop", "news_api.asgi:application"],
}
KINDS = list(_COMMANDS)

# Streams leave Python under each of these.
_COMMANDS |= {
    "gunicorn-sync": [*_GUNICORN, "--workers", "1", "--worker-class", "sync"],
    "uvicorn-asyncio-h11": [*_COMMANDS["uvicorn-asyncio"], "--http", "h11"],
    "uvicorn-uvloop-httptools": [*_COMMANDS["uvicorn-uvloop"], "--http", "httptools"],
    "gunicorn-uvicorn": [
        *(*_GUNICORN, "--workers", "1", "--worker-class", "uvicorn_worker.UvicornWorker"),
        "news_api.asgi:application",
    ],
}
OFFLOADING_KINDS = [
    *("gunicorn-sync", "gunicorn-gthread", "gunicorn-gevent", "gunicorn-uvicorn"),
    *("uvicorn-asyncio-h11", "uvicorn-uvloop-httptools"),
]

# Its application is among its arguments.
_COMMANDS["uvicorn-plain"] = _UVICORN

# None of these is known.
_COMMANDS |= {
    "hypercorn": [
        *("-m", "hypercorn", "--workers", "0", "--bind", f"{HOST}:{{port}}"),
        *("--graceful-timeout", "1"),
        "news_api.asgi:application",
    ],
    "daphne": ["-m", "daphne", "-b", HOST, "-p", "{port}", "news_api.asgi:application"],
    "gunicorn-asgi": [
        *(*_GUNICORN, "--workers", "1", "--worker-class", "asgi", "--graceful-timeout", "1"),
        "news_api.asgi:application",
    ],
}
OTHER_KINDS = ["hypercorn", "daphne", "gunicorn-asgi"]

_COMMANDS |= {
    "gunicorn-sync-3": [*_GUNICORN, "--workers", "3", "--worker-class", "sync"],
    "gunicorn-gevent-3": [*_GUNICORN, "--workers", "3"],
    # Enough threads for the case that one worker gets all the streams.
    "gunicorn-gthread-3": [
        *(*_GUNICORN, "--workers", "3"),
        *("--worker-class", "gthread", "--threads", "310"),
    ],
}
WORKERS_KINDS = ["gunicorn-sync-3", "gunicorn-gevent-3", "gunicorn-gthread-3"]


def worker_options(kind: str) -> dict[str, object]:
    """Options for one of `WORKERS_KINDS`: one of them iterates its streams itself."""
    return {"offload": kind != "gunicorn-gevent-3"}


T = TypeVar("T")


def until(condition: Callable[[], T], what: str, *, within: float = 30) -> T:
    """Wait until `condition` gives something true, and return it; fail after `within` seconds."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(0.02)
    return value


# --- Servers ------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # the names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """The news example under a server of one kind, with a database of its own in `directory`.

    As a context manager it runs inside of the `with`. It can be started again after a `kill`, on
    the same port and with the same database and bus. `bus` is the URL of a bus that others use,
    too; without, it is a local one of its own. `arguments` are the server's, behind those of its
    kind; `settings` the project's; `options` the library's.
    """

    def __init__(
        self,
        kind: str,
        directory: Path,
        *,
        bus: str | None = None,
        arguments: Sequence[str] = (),
        settings: str = "observed.settings",
        **options: object,
    ) -> None:
        self.kind = kind
        self.arguments = list(arguments)
        self._own = contextlib.ExitStack()
        self.bus = bus or self._own.enter_context(bus_of("local")).url
        self.is_asgi = kind.startswith("uvicorn")
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.database = directory / "news.sqlite3"
        self.environment = {
            **{name: os.environ[name] for name in os.environ if "SSE_CHANNEL" not in name},
            "DJANGO_SETTINGS_MODULE": settings,
            "NEWS_BIND": f"{HOST}:{self.port}",
            "NEWS_DB": str(self.database),
            "PYTHONPATH": os.pathsep.join([str(TESTS), *_python_path()]),
            "PYTHONUNBUFFERED": "1",
            "SSE_CHANNEL_BUS": self.bus,
            **{f"SSE_CHANNEL_{name.upper()}": str(value) for name, value in options.items()},
        }
        self._log = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        run_python("manage.py", "migrate", "--verbosity", "0", environment=self.environment)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._own:
            self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers and has all its workers."""
        assert self._process is None
        command = [part.format(port=self.port) for part in _COMMANDS[self.kind]] + self.arguments
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=EXAMPLE,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            until(self._answers, f"{self.kind} answers", within=STARTS_WITHIN)
            if self.kind.startswith("gunicorn"):
                # The first of them answers before the last is forked.
                count = int(command[len(command) - command[::-1].index("--workers")])
                until(lambda: len(self.workers) == count, "all workers", within=STARTS_WITHIN)
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        code = self._process.poll()
        assert code is None, f"{self.kind} ended with {code}:\n{self.output()}"
        try:
            return self.request("GET", "/news/").status == 200
        except ConnectionError:
            return False

    def stop(self) -> None:
        """End it as a service manager does; a server that needs to be killed is a failure."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.kind} did not end within {STOPS_WITHIN} s of SIGTERM:\n{self.output()}"
            ) from None
        finally:
            self.kill()

    def kill(self) -> None:
        """End it at once, with all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def output(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace")

    @property
    def master(self) -> psutil.Process:
        """The process that was started; under gunicorn it runs no view."""
        return psutil.Process(self._process.pid)

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes that run Django now."""
        return self.master.children() if self.kind.startswith("gunicorn") else [self.master]

    @property
    def worker(self) -> psutil.Process:
        """The process that runs Django, where it is one."""
        (process,) = self.workers
        return process

    @contextlib.contextmanager
    def only(self, worker: psutil.Process) -> Iterator[None]:
        """Meanwhile `worker` alone accepts connections: the others are stopped (SIGSTOP).

        For moments only: an arbiter kills workers that are silent for long.
        """
        others = [process for process in self.workers if process != worker]
        with contextlib.ExitStack() as stack:

            def have_stopped() -> bool:
                for process in others:
                    process.suspend()
                for process in others:
                    until(lambda p=process: p.status() == psutil.STATUS_STOPPED, "it has stopped")
                # Else the one that is left could not use the bus.
                is_free = lock_holder(self.bus) not in {process.pid for process in others}
                if not is_free:
                    for process in others:
                        process.resume()
                return is_free

            for process in others:
                stack.callback(process.resume)
            until(have_stopped, "the others have stopped, and none with the bus's lock")
            yield

    def database_descriptors(self) -> list[str]:
        """The worker's open files that belong to the database."""
        paths = [file.path for file in self.worker.open_files()]
        return [path for path in paths if path.startswith(str(self.database))]

    def figures(self) -> dict[int, dict[str, Any]]:
        """What the library counts in each worker, by its process id."""
        answers: dict[int, dict[str, Any]] = {}

        def ask(_: int) -> None:
            answer = self.request("GET", "/figures/").json()
            answers[answer["process"]] = answer

        def every_worker_answered() -> bool:
            count = len(self.workers)
            # Several at once: the one that has just answered is the most likely to answer again.
            list(threads.map(ask, range(1 if count == 1 else 4 * count)))
            return answers.keys() >= {process.pid for process in self.workers}

        with ThreadPoolExecutor(12) as threads:
            until(every_worker_answered, "an answer of every worker")
        return answers

    def clients(self) -> int:
        """How many clients listen in all workers."""
        return sum(sum(figures["clients"].values()) for figures in self.figures().values())

    def queries(self) -> int:
        """How many queries all workers have sent to the database."""
        return sum(figures["queries"] for figures in self.figures().values())

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        within: float = ANSWERS_WITHIN,
        **headers: str,
    ) -> Answer:
        """The whole answer to a request. A `body` other than bytes goes as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        deadline = time.monotonic() + within
        connection = http.client.HTTPConnection(HOST, self.port, timeout=within)
        with contextlib.closing(connection):
            own = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Connection": "close", **own})
            with connection.getresponse() as response:
                # Of several of one name, Set-Cookie for one, all.
                received = {
                    name.lower(): ", ".join(response.headers.get_all(name))
                    for name in response.headers
                }
                content = b""
                while part := response.read1():
                    content += part
                    assert time.monotonic() < deadline, f"not within {within:g} s: all of {path}"
                return Answer(response.status, received, content)

    def cookie_of(self, user: str, channels: str) -> str:
        """Log a user of those groups in; under `observed.users_settings`."""
        answer = self.request("GET", f"/enter/{user}/{channels}/")
        assert answer.status == 200, answer
        return re.search(r"sessionid=[^;]+", answer.headers["set-cookie"])[0]

    def publish(self, headline: str, **fields: str) -> dict[str, Any]:
        """Submit an article, and return it as the server answered it."""
        answer = self.request("POST", "/news/submit/", {"headline": headline, **fields})
        assert answer.status == 201, answer
        return answer.json()


@contextlib.contextmanager
def on_demand(make: Callable[[str], Server]) -> Iterator[Callable[[str], Server]]:
    """The server of a kind, made and started when it is first asked for."""
    running: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:

        def get(kind: str) -> Server:
            if kind not in running:
                running[kind] = stack.enter_context(make(kind))
            return running[kind]

        yield get


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def run_python(
    *arguments: str, environment: dict[str, str], within: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run Python in the example's directory to its end, which must be exit status 0."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=EXAMPLE,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=within,
    )
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stderr}"
    return done


# --- Event streams ------------------------------------------------------------------------


class Stream(asyncio.Protocol):
    """One open event stream: the head of its response, and what was received so far.

    It is read by a loop in another thread: its lists only grow, and can be read at any time.
    A slow one reads for a moment, and then nothing for `stall` seconds, over and over.
    """

    READS_FOR = 0.5  # seconds, of a slow one
    BUFFER = 16 << 10  # bytes that the system may receive for a slow one

    def __init__(self, path: str, headers: dict[str, str], *, stall: float = 0.0) -> None:
        loop = asyncio.get_running_loop()
        self._stall = stall
        self.status: int | None = None
        self.headers: dict[str, str] = {}  # the names in lower case
        self.events: list[Event] = []
        self.times: list[float] = []  # of `time.monotonic`, when each event was received
        self.opened_at: float | None = None  # the same of the first bytes
        self.ended_at: float | None = None
        self.parser = EventStreamParser()
        self.size = 0  # bytes of the body, as they came
        self.gzip: Any = None  # what decompresses the body, where it is compressed
        self.is_open = loop.create_future()  # done with the first bytes, or the end
        self.is_over = loop.create_future()  # done with the end
        self._request = h11.Request(
            method="GET",
            target=path,
            headers=[("Host", HOST), ("Accept", "text/event-stream"), *headers.items()],
        )
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None

    @property
    def is_ended(self) -> bool:
        return self.is_over.done()

    @property
    def worker(self) -> int:
        """The process that serves it."""
        return int(self.headers["x-worker"])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if self._stall:
            taken = transport.get_extra_info("socket")
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.BUFFER)
            self._read_for_a_moment()
        transport.write(self._http.send(self._request) + self._http.send(h11.EndOfMessage()))

    def data_received(self, data: bytes) -> None:
        self._http.receive_data(data)
        self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        with contextlib.suppress(h11.RemoteProtocolError):  # broken off: ended as well
            self._http.receive_data(b"")
            self._read()
        self._end()

    def close(self) -> None:
        self._transport.close()

    def _read_for_a_moment(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()
            asyncio.get_running_loop().call_later(self.READS_FOR, self._read_nothing)

    def _read_nothing(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(self._stall, self._read_for_a_moment)

    def _read(self) -> None:
        while not self.is_ended:
            part = self._http.next_event()
            if isinstance(part, h11.Response):
                self.status = part.status_code
                self.headers = {name.decode(): value.decode() for name, value in part.headers}
                if self.headers.get("content-encoding") == "gzip":
                    self.gzip = zlib.decompressobj(zlib.MAX_WBITS + 16)
            elif isinstance(part, h11.Data):
                self._take(bytes(part.data))
            elif isinstance(part, (h11.EndOfMessage, h11.ConnectionClosed)):
                self._end()
            else:
                return

    def _take(self, chunk: bytes) -> None:
        now = time.monotonic()
        if self.opened_at is None:
            self.opened_at = now
        self.size += len(chunk)
        events = self.parser.feed(chunk if self.gzip is None else self.gzip.decompress(chunk))
        self.times += [now] * len(events)
        self.events += events
        self._open()

    def _open(self) -> None:
        if not self.is_open.done():
            self.is_open.set_result(None)

    def _end(self) -> None:
        if not self.is_over.done():
            self.ended_at = time.monotonic()
            self.is_over.set_result(None)
        self._open()


class LoopThread:
    """An asyncio loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._kept: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(_finish_all())
        self._loop.close()

    def keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Have `coroutine` run in the loop until the loop is stopped; called in the loop."""
        task = self._loop.create_task(coroutine)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    def run(self, coroutine: Coroutine[Any, Any, T], *, within: float = 60) -> T:
        """Run `coroutine` in the loop, and wait for its result."""
        waited = asyncio.wait_for(coroutine, within)
        return asyncio.run_coroutine_threadsafe(waited, self._loop).result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


async def _finish_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)  # what the transports have to say about their end


@contextlib.contextmanager
def open_streams(
    server: Server, path: str, count: int = 1, **headers: str
) -> Iterator[Sequence[Stream]]:
    """`count` streams of `path`, each with its first bytes received; closed at the end.

    `headers` are those of the request, with underscores for hyphens.
    """
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    streams: list[Stream] = []

    async def open_one(turn: asyncio.Semaphore) -> None:
        loop = asyncio.get_running_loop()
        # A few at a time: the backlog of a development server is short.
        async with turn:
            stream = Stream(path, named)
            await loop.create_connection(lambda: stream, HOST, server.port)
            streams.append(stream)
            await stream.is_open

    async def open_all() -> None:
        turn = asyncio.Semaphore(8)
        await asyncio.gather(*(open_one(turn) for _ in range(count)))

    async def close_all() -> None:
        for stream in streams:
            stream.close()

    loop = LoopThread()
    try:
        loop.run(open_all())
        refused = [stream.status for stream in streams if stream.status != 200]
        assert not refused, f"{path} answered {refused}:\n{server.output()}"
        yield streams
    finally:
        loop.run(close_all())
        loop.stop()


@contextlib.contextmanager
def spread_streams(
    server: Server, path: str, count: int, **headers: str
) -> Iterator[Sequence[Stream]]:
    """`count` streams of every worker; else, which worker takes a connection is the system's."""
    with contextlib.ExitStack() as stack:
        streams: list[Stream] = []
        for worker in server.workers:
            with server.only(worker):
                streams += stack.enter_context(open_streams(server, path, count, **headers))
        yield streams


@contextlib.contextmanager
def cover_workers(server: Server, path: str, **headers: str) -> Iterator[Sequence[Stream]]:
    """Streams, some of each worker: for views that use the database.

    Nobody is stopped meanwhile, as by `spread_streams`: who is stopped might hold its lock.
    """
    with contextlib.ExitStack() as stack:
        streams: list[Stream] = []
        workers = {process.pid for process in server.workers}
        for _ in range(30):
            streams += stack.enter_context(open_streams(server, path, 4, **headers))
            if workers <= {stream.worker for stream in streams}:
                break
        else:
            raise AssertionError(f"one of {workers} took none of {len(streams)} streams")
        yield streams


@contextlib.contextmanager
def open_stream(server: Server, path: str, **headers: str) -> Iterator[Stream]:
    """One stream, as `open_streams` opens them."""
    with open_streams(server, path, **headers) as (stream,):
        yield stream


@contextlib.contextmanager
def quiet(server: Server, unwanted: Sequence[str] = ("Traceback",)) -> Iterator[None]:
    """None of the `unwanted` words is in what the server says meanwhile."""
    before = len(server.output())
    yield
    written = server.output()[before:]
    print(written)
    assert not [word for word in unwanted if word in written]


class Follower:
    """A client that comes back with its last event id whenever its stream ends, as a browser does.

    Its `streams`, one after the other, are read by a loop in another thread; they only grow.
    """

    PAUSE = 0.02  # seconds until it comes back

    def __init__(
        self, server: Server | Relay, path: str, last_event_id: str, stall: float = 0.0
    ) -> None:
        self.streams: list[Stream] = []
        self.last_event_id = last_event_id
        self.failures: list[str] = []  # what a server that is merely restarted does not answer
        self.is_connected = False
        self.stall = stall
        self._server = server
        self._path = path

    @property
    def count(self) -> int:
        """How many events it has."""
        return sum(len(stream.events) for stream in self.streams)

    @property
    def events(self) -> list[Event]:
        """What it has received, over all its streams."""
        return [event for stream in self.streams for event in stream.events]

    def longest_wait(self, known: dict[str, float]) -> float:
        """The longest time that it was connected and without an event that was `known`.

        `known` gives the time from which on an event, by its id, should be received. Events that
        are not in it do not count, and no time does in which the follower had no connection.
        """
        return max(
            (
                self._connected_between(known[event.last_event_id], at, number)
                for number, stream in enumerate(self.streams)
                for event, at in zip(stream.events, stream.times, strict=True)
                if event.last_event_id in known
            ),
            default=0.0,
        )

    def _connected_between(self, begin: float, end: float, number: int) -> float:
        """Seconds of connection in a time that ends during stream `number`."""
        connected = end - max(begin, self.streams[number].opened_at)
        for stream in reversed(self.streams[:number]):
            if stream.ended_at <= begin:
                break
            connected += stream.ended_at - max(begin, stream.opened_at)
        return connected

    async def run(self) -> None:
        """Follow, until cancelled."""
        while True:
            headers = {"Last-Event-ID": self.last_event_id} if self.last_event_id else {}
            stream = Stream(self._path, headers, stall=self.stall)
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().create_connection(
                    lambda stream=stream: stream, HOST, self._server.port
                )
                try:
                    await stream.is_open
                    if stream.events or stream.opened_at is not None:
                        self.streams.append(stream)
                    self.is_connected = stream.status == 200
                    await stream.is_over
                finally:
                    self.is_connected = False
                    stream.close()
                if stream.status not in (200, None):
                    self.failures.append(f"{self._path} answered {stream.status}")
                self.last_event_id = stream.parser.last_event_id or self.last_event_id
            await asyncio.sleep(self.PAUSE)


@contextlib.contextmanager
def follow(
    server: Server | Relay,
    count: int,
    path: str = "/news/events/",
    *,
    last_event_id: str = "",
    stalls: Sequence[float] = (),
) -> Iterator[list[Follower]]:
    """`count` followers of `path`, connected to begin with.

    The first of them are slow: each stalls for as long as its part of `stalls` says.
    """
    all_stalls = [*stalls, *[0.0] * (count - len(stalls))]
    followers = [Follower(server, path, last_event_id, stall) for stall in all_stalls]
    loop = LoopThread()

    async def start() -> None:
        for follower in followers:
            loop.keep(follower.run())

    try:
        loop.run(start())
        until(lambda: all(follower.is_connected for follower in followers), "all followers connect")
        yield followers
    finally:
        loop.stop()


class HasPort(Protocol):
    """What listens on a port of this machine: a server, or who is one at the moment."""

    @property
    def port(self) -> int: ...


class Relay:
    """A port in front of a server, whose connections can be cut."""

    def __init__(self, server: HasPort) -> None:
        self._server = server
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = LoopThread()
        self._loop.run(self._listen())

    async def _listen(self) -> None:
        self._lets_through = asyncio.Event()
        self._lets_through.set()
        self._listener = await asyncio.start_server(self._relay, HOST, 0, backlog=1000)
        self.port: int = self._listener.sockets[0].getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        await self._lets_through.wait()
        try:
            from_server, to_server = await asyncio.open_connection(HOST, self._server.port)
        except OSError:  # it is away
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(to_server)
        await asyncio.gather(self._pump(reader, to_server), self._pump(from_server, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)

    def cut(self) -> None:
        """Cut all connections, and let new ones wait."""

        async def cut() -> None:
            self._lets_through.clear()
            for writer in self._writers:
                writer.transport.abort()

        self._loop.run(cut())

    def cut_one(self, chance: random.Random) -> bool:
        """Cut a connection on one of its sides; whether there was any."""

        async def cut() -> bool:
            # In an order that does not change from run to run.
            writers = sorted(self._writers, key=lambda each: str(each.get_extra_info("sockname")))
            if writers:
                chance.choice(writers).transport.abort()
            return bool(writers)

        return self._loop.run(cut())

    def mend(self) -> None:
        """Let connections through again."""

        async def mend() -> None:
            self._lets_through.set()

        self._loop.run(mend())

    def close(self) -> None:
        async def close() -> None:
            self._listener.close()

        self.cut()
        self._loop.run(close())
        self._loop.stop()
