"""The buses between processes, for tests that run over each of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from redis_server import RedisServer

#: What a test over each bus is parametrized by.
BUSES = ["local", "redis"]
LOCK = "hhqqi4x"  # of `struct flock` on Linux: type, whence, start, length, process


class SharedBus(NamedTuple):
    url: str
    kill: Callable[[], None] | None = None
    """Kills its server (-9) and starts it again, if it has one."""


def lock_holder(url: str) -> int | None:
    """The process that holds the lock of a local bus: nobody can use it while that is stopped."""
    path = Path(url.removeprefix("local://")) / "lock"
    if not url.startswith("local://") or not path.exists():
        return None
    with path.open("rb+") as file:
        asked = struct.pack(LOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, holder = struct.unpack(LOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else holder


@contextlib.contextmanager
def bus_of(kind: str) -> Iterator[SharedBus]:
    """A bus that nobody else uses, for as long as the context lasts."""
    # Not in pytest's directory: the path of a Unix socket has room for 107 bytes.
    with tempfile.TemporaryDirectory(prefix="sse-") as directory:
        if kind == "local":
            yield SharedBus(f"local://{directory}/bus")
            return
        server = RedisServer(Path(directory) / "redis")

        def kill() -> None:
            server.kill()
            server.start()

        with contextlib.closing(server):
            server.start()
            yield SharedBus(server.bus_url(), kill)
