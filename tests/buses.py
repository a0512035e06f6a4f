"""The buses between processes, for tests that run over each of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

#: What a test over each bus is parametrized by.
BUSES = ["local"]


@contextlib.contextmanager
def bus_of(kind: str) -> Iterator[str]:
    """The URL of a bus that nobody else uses, for as long as the context lasts."""
    assert kind in BUSES
    # Not in pytest's directory: the path of a Unix socket has room for 107 bytes.
    with tempfile.TemporaryDirectory(prefix="sse-") as directory:
        yield f"local://{directory}/bus"
