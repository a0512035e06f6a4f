"""Waiting on asyncio, and the end of the interpreter.

Threads and greenlets wait inside the extension. On asyncio each loop has one `Parking`: its
descriptor is watched by ``loop.add_reader``, and its callback resolves the futures of those
clients that have something. The deadline of a wait is kept by the extension's timer.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import select
import threading
import weakref
from collections.abc import Callable

from . import _sse_channel

__all__ = ["wait"]

_parkings: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _sse_channel.Parking] = (
    weakref.WeakKeyDictionary()
)
_exit_hook_set = False

#: Seconds after which a loop that was rung is asked whether it is closed.
_PATIENCE = 0.5


async def wait(client: _sse_channel.Client, timeout: float | None) -> None:
    """Return when `client` may have something, is closed, or after `timeout` seconds.

    The caller looks which. A cancelled wait takes nothing from the queue, and passes a wake-up
    that it had already got on to the next waiter.
    """
    loop = asyncio.get_running_loop()
    parking = _parking_of(loop)
    future = loop.create_future()
    token = client._park(parking, future, timeout)
    if token is None:
        return
    try:
        await future
    except BaseException:
        client._unpark(parking, token)
        raise


def _parking_of(loop: asyncio.AbstractEventLoop) -> _sse_channel.Parking:
    parking = _parkings.get(loop)
    if parking is None or parking.foreign:
        _let_go_of_closed_loops()
        parking = _sse_channel.Parking()
        resume = parking.resume
        try:
            loop.add_reader(parking.fileno(), resume)
        except NotImplementedError:
            _ring_from_a_thread(loop, parking)
        else:
            # A loop lets go of it at its close: what its tasks were woken for goes on to others.
            weakref.finalize(resume, parking.close).atexit = False
        _parkings[loop] = parking
    return parking


def _let_go_of_closed_loops() -> None:
    """Forget the waiters of loops that were closed over them: they hold their loop."""
    # Changed by another thread meanwhile: then the next loop's first wait does it.
    with contextlib.suppress(RuntimeError, KeyError):
        for loop, parking in list(_parkings.items()):
            if loop.is_closed():
                del _parkings[loop]
                parking.close()


def _ring_from_a_thread(loop: asyncio.AbstractEventLoop, parking: _sse_channel.Parking) -> None:
    """Watch the bell for a loop that cannot watch descriptors, from one thread per loop.

    The thread ends with the loop: at its close, seen at the next ring, or when it is collected.
    """
    handled = threading.Event()

    def gone(_: object) -> None:
        handled.set()
        parking.ring()

    weak = weakref.ref(loop, gone)

    def resume() -> None:
        handled.set()
        parking.resume()

    def watch() -> None:
        bell = select.poll()
        bell.register(parking.fileno(), select.POLLIN)
        patience = None
        while True:
            while not bell.poll(patience):
                if is_closed():
                    return
                if is_running():
                    patience = None
            # A loop that stops after it was rung may be closed before its tasks go on.
            patience = _PATIENCE * 1000
            handled.clear()
            alive = weak()
            if alive is None:
                return
            with contextlib.suppress(RuntimeError):  # the loop is closed
                alive.call_soon_threadsafe(resume)
            del alive
            while not handled.wait(_PATIENCE):
                if is_closed():
                    return

    def is_running() -> bool:
        alive = weak()
        return alive is not None and alive.is_running()

    def is_closed() -> bool:
        alive = weak()
        if alive is not None and not alive.is_closed():
            return False
        parking.close()
        return True

    threading.Thread(target=watch, name="sse-channel-loop", daemon=True).start()


def close_at_exit() -> None:
    """Arrange, once, that the end of the interpreter ends every client and the bus.

    Threads that are blocked in a stream end then, before the interpreter waits for them.
    """
    global _exit_hook_set
    if _exit_hook_set:
        return
    # Set before, not after: twice would be harmless, and a lock would be one more for forks.
    _exit_hook_set = True
    try:
        # An executor joins its threads in a hook of the same kind, and hooks run backwards: ours
        # must be set after it, or the join would wait for a stream that never ends.
        import concurrent.futures.thread  # noqa: F401

        # Not public, but the only moment before non-daemon threads are joined.
        getattr(threading, "_register_atexit", atexit.register)(_close_all)
    except RuntimeError:
        # The interpreter is at its end already, and waits for this thread, which must not wait.
        _close_all()


_after_close: list[tuple[int, Callable[[], object]]] = []


def after_close(wait: Callable[[], object]) -> None:
    """At the end of the interpreter, call `wait` when every client has ended."""
    _after_close.append((os.getpid(), wait))


def _close_all() -> None:
    _sse_channel.close_all()
    for pid, wait in _after_close:
        # Threads do not survive a fork.
        if pid == os.getpid():
            wait()
