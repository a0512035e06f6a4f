"""The news example under real servers, and clients for its event streams."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import h11
import psutil

TESTS = Path(__file__).resolve().parent
EXAMPLE = TESTS.parent / "examples" / "news"
HOST = "127.0.0.1"
STARTS_WITHIN = 60
STOPS_WITHIN = 30
ANSWERS_WITHIN = 30

_UVICORN = [
    *("-m", "uvicorn", "--host", HOST, "--port", "{port}", "--log-level", "warning"),
    # Streams never end by themselves: waiting for them must have an end.
    *("--lifespan", "off", "--timeout-graceful-shutdown", "3"),
]
_COMMANDS = {
    "gunicorn-gevent": ["-m", "gunicorn", "-c", "gunicorn.conf.py"],
    "gunicorn-gthread": [
        *("-m", "gunicorn", "-c", "gunicorn.conf.py"),
        *("--worker-class", "gthread", "--threads", "210"),
    ],
    "runserver": ["manage.py", "runserver", "--noreload", f"{HOST}:{{port}}"],
    "uvicorn-asyncio": [*_UVICORN, "--loop", "asyncio", "news_api.asgi:application"],
    "uvicorn-uvloop": [*_UVICORN, "--loop", "uvloop", "news_api.asgi:application"],
}
KINDS = list(_COMMANDS)

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
    the same port and with the same database.
    """

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.is_asgi = kind.startswith("uvicorn")
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.database = directory / "news.sqlite3"
        self.environment = {
            **{name: os.environ[name] for name in os.environ if "SSE_CHANNEL" not in name},
            "DJANGO_SETTINGS_MODULE": "observed.settings",
            "NEWS_BIND": f"{HOST}:{self.port}",
            "NEWS_DB": str(self.database),
            "PYTHONPATH": os.pathsep.join([str(TESTS), *_python_path()]),
            "PYTHONUNBUFFERED": "1",
        }
        self._log = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        run_python("manage.py", "migrate", "--verbosity", "0", environment=self.environment)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert self._process is None
        command = [part.format(port=self.port) for part in _COMMANDS[self.kind]]
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
    def worker(self) -> psutil.Process:
        """The process that runs Django."""
        process = psutil.Process(self._process.pid)
        if self.kind.startswith("gunicorn"):
            (process,) = process.children()
        return process

    def database_descriptors(self) -> list[str]:
        """The worker's open files that belong to the database."""
        paths = [file.path for file in self.worker.open_files()]
        return [path for path in paths if path.startswith(str(self.database))]

    def clients(self) -> int:
        """How many clients listen in the worker."""
        return sum(self.request("GET", "/figures/").json()["clients"].values())

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        within: float = ANSWERS_WITHIN,
    ) -> Answer:
        """The whole answer to a request. A `body` other than bytes goes as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        deadline = time.monotonic() + within
        connection = http.client.HTTPConnection(HOST, self.port, timeout=within)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Connection": "close"})
            with connection.getresponse() as response:
                headers = {name.lower(): value for name, value in response.getheaders()}
                content = b""
                while part := response.read1():
                    content += part
                    assert time.monotonic() < deadline, f"not within {within:g} s: all of {path}"
                return Answer(response.status, headers, content)

    def publish(self, headline: str, **fields: str) -> dict[str, Any]:
        """Submit an article, and return it as the server answered it."""
        answer = self.request("POST", "/news/submit/", {"headline": headline, **fields})
        assert answer.status == 201, answer
        return answer.json()


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


# --- Event streams ------------------------------------------------------------------------


class Event(NamedTuple):
    type: str
    data: str
    last_event_id: str

    def json(self) -> Any:
        return json.loads(self.data)


class EventStreamParser:
    """The parser of an event stream as browsers have it.

    Source: HTML standard, section 9.2.6 "Interpreting an event stream".
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.comments: list[str] = []
        self.retry: int | None = None  # the reconnection time in milliseconds, once it was set
        self.last_event_id = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_begun = False
        self._is_after_cr = False
        self._rest = ""
        self._type = ""
        self._data = ""
        self._id = ""

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes; what they complete is in `events` and `comments` then."""
        text = self._decoder.decode(chunk)
        if not text:
            return
        if not self._is_begun:
            self._is_begun = True
            text = text.removeprefix("\ufeff")
        if self._is_after_cr:
            # The second half of a CRLF whose first half has ended the line already.
            text = text.removeprefix("\n")
        self._is_after_cr = text.endswith("\r")
        *lines, self._rest = re.split("\r\n|\n|\r", self._rest + text)
        for line in lines:
            self._take(line)

    def _take(self, line: str) -> None:
        if not line:
            self._dispatch()
            return
        field, _, value = line.partition(":")
        if not field:
            self.comments.append(value)
            return
        value = value.removeprefix(" ")
        if field == "event":
            self._type = value
        elif field == "data":
            self._data += value + "\n"
        elif field == "id" and "\0" not in value:
            self._id = value
        elif field == "retry" and re.fullmatch("[0-9]+", value):
            self.retry = int(value)

    def _dispatch(self) -> None:
        self.last_event_id = self._id
        if self._data:
            event = Event(self._type or "message", self._data.removesuffix("\n"), self._id)
            self.events.append(event)
        self._type = self._data = ""


class Stream(asyncio.Protocol):
    """One open event stream: the head of its response, and what was received so far.

    It is read by a loop in another thread: its lists only grow, and can be read at any time.
    """

    def __init__(self, path: str, headers: dict[str, str]) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}  # the names in lower case
        self.is_ended = False
        self.parser = EventStreamParser()
        self.is_open = asyncio.get_running_loop().create_future()  # done with the first bytes
        self._request = h11.Request(
            method="GET",
            target=path,
            headers=[("Host", HOST), ("Accept", "text/event-stream"), *headers.items()],
        )
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None

    @property
    def events(self) -> list[Event]:
        return self.parser.events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
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

    def _read(self) -> None:
        while not self.is_ended:
            part = self._http.next_event()
            if isinstance(part, h11.Response):
                self.status = part.status_code
                self.headers = {name.decode(): value.decode() for name, value in part.headers}
            elif isinstance(part, h11.Data):
                self.parser.feed(bytes(part.data))
                self._open()
            elif isinstance(part, (h11.EndOfMessage, h11.ConnectionClosed)):
                self._end()
            else:
                return

    def _open(self) -> None:
        if not self.is_open.done():
            self.is_open.set_result(None)

    def _end(self) -> None:
        self.is_ended = True
        self._open()


class LoopThread:
    """An asyncio loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(_finish_all())
        self._loop.close()

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
def open_stream(server: Server, path: str, **headers: str) -> Iterator[Stream]:
    """One stream, as `open_streams` opens them."""
    with open_streams(server, path, **headers) as (stream,):
        yield stream


class Relay:
    """A port in front of a server, whose connections can be cut."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = LoopThread()
        self._loop.run(self._listen())

    async def _listen(self) -> None:
        self._lets_through = asyncio.Event()
        self._lets_through.set()
        self._listener = await asyncio.start_server(self._relay, HOST, 0)
        self.url = f"http://{HOST}:{self._listener.sockets[0].getsockname()[1]}"

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        await self._lets_through.wait()
        from_server, to_server = await asyncio.open_connection(HOST, self._server.port)
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
