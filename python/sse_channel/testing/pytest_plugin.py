"""Fixtures for pytest: ``pytest_plugins = ["sse_channel.testing.pytest_plugin"]`` in `conftest.py`.

It is no plugin that pytest finds by itself: a project that does not name it pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from ..channel import SSEChannel
from . import Captured, EventReader, capture, connect, memory_bus

__all__ = ["sse_capture", "sse_connect", "sse_memory_bus"]


@pytest.fixture
def sse_memory_bus() -> Iterator[None]:
    """An empty ``memory://`` bus for this test alone."""
    with memory_bus():
        yield


@pytest.fixture
def sse_capture() -> Iterator[Callable[..., Captured]]:
    """Call it with channels or names: `capture`, closed at the end of the test."""
    with ExitStack() as stack:

        def begin(*channels: SSEChannel | str) -> Captured:
            return stack.enter_context(capture(*channels))

        yield begin


@pytest.fixture
def sse_connect() -> Iterator[Callable[..., EventReader]]:
    """Call it with a test client and a path: `connect`, closed at the end of the test."""
    with ExitStack() as stack:

        def begin(*arguments: object, **options: object) -> EventReader:
            return stack.enter_context(connect(*arguments, **options))  # type: ignore[arg-type]

        yield begin
