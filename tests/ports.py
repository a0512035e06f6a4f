"""Ports for servers that bind them themselves, a while after they were chosen."""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

HOST = "127.0.0.1"
# Below those that the system gives to whoever connects or asks for any port.
_FIRST, _LAST = 11_000, 32_000
_LENGTH = 500  # of a block
_held: list[IO[bytes]] = []


@functools.cache
def _ports() -> Iterator[int]:
    """Those of a block that no other process of tests has while this one lives."""
    for first in range(_FIRST, _LAST, _LENGTH):
        name = f"sse_channel-tests-{os.getuid()}-ports-{first}"
        lock = (Path(tempfile.gettempdir()) / name).open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        _held.append(lock)
        return itertools.cycle(range(first, first + _LENGTH))
    raise OSError("too many processes run tests: no block of ports is left")


def free_port() -> int:
    """One that nobody has, and that nobody is given until its server binds it.

    Raises:
        OSError: none of this process's ports is free.
    """
    for port in itertools.islice(_ports(), _LENGTH):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError("none of this process's ports is free")
