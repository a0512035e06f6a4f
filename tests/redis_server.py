"""A real Redis for a test, and processes that use it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parts import missing
from ports import HOST, free_port

HERE = Path(__file__).parent
# As a Redis before 7: without sharded Pub/Sub.
PLAIN = 'rename-command SPUBLISH ""\nrename-command SSUBSCRIBE ""\n'


class RedisServer:
    """A Redis in a directory of its own, that can be stopped in all the ways there are."""

    def __init__(self, directory: Path, *, sharded: bool = True, config: str = "") -> None:
        self._program = shutil.which("redis-server") or missing("redis-server")
        self.directory = directory
        self.port = free_port()
        self.sharded = sharded
        self.config = config
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(exist_ok=True)

    def url(self, *, user: str = "", path: str = "/0") -> str:
        return f"redis://{user}{HOST}:{self.port}{path}"

    def bus_url(self) -> str:
        """That of a bus that was never before.

        A host keeps by the address what those that departed have counted, and ports come again.
        """
        return with_own_prefix(self.url())

    def start(self) -> None:
        path = self.directory / "redis.conf"
        path.write_text(
            f'bind {HOST}\nport {self.port}\ndir {self.directory}\nsave ""\n'
            f"appendonly yes\nappendfsync always\n{self.config}" + ("" if self.sharded else PLAIN)
        )
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen([self._program, path], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError, RespError):
                self.call("PING")
                return
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.01)

    def call(self, *words: str | int) -> Any:
        """What Redis answers to one command, on a connection of its own."""
        with socket.create_connection((HOST, self.port), timeout=30) as connection:
            return command(connection, *words)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Lose all data, once it is killed."""
        shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def with_own_prefix(url: str) -> str:
    """The URL of a bus that nobody else has, on the Redis of `url`."""
    return f"{url}?prefix={secrets.token_hex(8)}:"


class RespError(Exception):
    """What Redis refused."""


def command(connection: socket.socket, *words: str | int) -> Any:
    """One command and its answer."""
    encoded = [str(word).encode() for word in words]
    lines = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
    connection.sendall(b"*%d\r\n%s" % (len(words), lines))
    with connection.makefile("rb") as stream:
        return _answer(stream)


def _answer(stream: Any) -> Any:
    line = stream.readline()
    if not line.endswith(b"\r\n"):
        raise ConnectionError("Redis ended the connection")
    kind, rest = line[:1], line[1:-2]
    if kind == b"-":
        raise RespError(rest.decode())
    if kind == b":":
        return int(rest)
    if kind == b"$":
        return None if rest == b"-1" else stream.read(int(rest) + 2)[:-2]
    if kind == b"*":
        return [_answer(stream) for _ in range(int(rest))]
    return rest.decode()


class Worker:
    """A process with a bus, that runs what it is told; see `redis_worker.py`."""

    def __init__(self, url: str, *options: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(HERE / "redis_worker.py"), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SSE_CHANNEL_BUS": url, **environment},
        )
        self.pid = self._process.pid
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def begin(self, name: str, *arguments: object) -> None:
        """Tell it, without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()

    def answer(self, patience: float = 90) -> Any:
        line = self._answers.get(timeout=patience)
        assert line, "the worker ended"
        problem, value = json.loads(line)
        if problem is not None:
            raise AssertionError(problem)
        return value

    def __call__(self, name: str, *arguments: object) -> Any:
        """Tell it, and get the answer."""
        self.begin(name, *arguments)
        return self.answer()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Meanwhile it does not run (SIGSTOP)."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(timeout=60) == 0
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process.stdout.close()


Until = Callable[..., None]
