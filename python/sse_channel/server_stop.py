"""When a server begins to stop, so that its streams end then, and not when all else has ended.

A server that stops lets its requests come to their end first. A stream has none: it would use up
the graceful timeout, and be cut off. gunicorn and uvicorn tell nobody when they begin to stop, so
that it is seen where they note it: in an attribute of gunicorn's worker, by a method of uvicorn's
server.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from types import FrameType
from typing import Any

from . import _sse_channel
from .config import options
from .traps import note_gunicorn, note_uvicorn

__all__ = ["end_streams", "watch_server"]

_watched_in: int | None = None


def end_streams(wait: bool) -> None:
    """End all streams of this process, with `wait` until those that left Python are ended."""
    _sse_channel.end_streams(wait, options().retry)


class _Alive:
    """The attribute `alive` of a worker, which SIGTERM, HUP and `max_requests` make false."""

    def __get__(self, worker: Any, owner: type | None = None) -> Any:
        return self if worker is None else vars(worker)["alive"]

    def __set__(self, worker: Any, value: Any) -> None:
        vars(worker)["alive"] = value
        if not value:
            # Maybe within a handler of signals: it waits for nothing.
            end_streams(wait=False)


def watch_server() -> None:
    """Have all streams end when the server stops in whose request this is called.

    Does nothing outside of requests, under other servers, and the second time. An asynchronous view
    under WSGI runs in a thread of its own, where the worker is not seen: so it is called again when
    the response is iterated.
    """
    gunicorn = sys.modules.get("gunicorn.workers.base")
    if gunicorn is not None and _watched_in != os.getpid():
        _watch_gunicorn(gunicorn)
    if (uvicorn := sys.modules.get("uvicorn.server")) is not None:
        _watch_uvicorn(uvicorn)


def _watch_gunicorn(base: Any) -> None:
    """Find the worker in the frames below the request."""
    global _watched_in
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("gunicorn.workers."):
            worker = frame.f_locals.get("self")
            # Of this process alone: the worker was forked before.
            if isinstance(worker, base.Worker) and "alive" in vars(worker):
                if not isinstance(vars(type(worker)).get("alive"), _Alive):
                    type(worker).alive = _Alive()
                _watched_in = os.getpid()
                note_gunicorn(worker)
                if not worker.alive:
                    # By this very request, the last of its share; or it came late.
                    end_streams(wait=False)
                return
        frame = frame.f_back


def _watch_uvicorn(module: Any) -> None:
    """Find the server by its handler of SIGTERM."""
    server: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not isinstance(server, module.Server) or "shutdown" in vars(server):
        return
    shut_down = server.shutdown

    async def shutdown(*args: Any, **kwargs: Any) -> None:
        end_streams(wait=False)
        await shut_down(*args, **kwargs)
        # uvicorn ends by a signal to itself: nothing that Python does at its own end is done.
        await asyncio.get_running_loop().run_in_executor(None, end_streams, True)

    server.shutdown = shutdown
    note_uvicorn(server)
    servers = getattr(server, "servers", [])
    if server.should_exit or (servers and not any(each.is_serving() for each in servers)):
        # The first stream of all came when the stop had begun.
        end_streams(wait=False)
