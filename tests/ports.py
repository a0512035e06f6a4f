"""Ports for servers that bind them themselves, a while after they were chosen."""

from __future__ import annotations

import itertools
import os
import random
import socket

HOST = "127.0.0.1"
# Below those that the system gives to whoever connects or asks for any port.
_FIRST, _LAST = 11_000, 32_000
_SHARES = 10  # each process of pytest-xdist has its own


def _share() -> range:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    length = (_LAST - _FIRST) // _SHARES
    first = _FIRST + worker % _SHARES * length
    return range(first, first + length)


# From anywhere on: another run may go on beside this one.
_ports = itertools.cycle(_share())
for _ in range(random.randrange(len(_share()))):
    next(_ports)


def free_port() -> int:
    """One that nobody has, and that nobody is given until its server binds it.

    Raises:
        OSError: none of a thousand is free.
    """
    for port in itertools.islice(_ports, 1000):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError("none of a thousand ports is free")
