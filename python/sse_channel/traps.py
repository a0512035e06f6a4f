"""What a project may have wrong without noticing it, and what to do about it.

`sse_channel.django.checks` tells it when Django checks the project. Servers run no checks, so each
process that meets one of these tells it as well: once, at its first stream, as a warning of the
logger ``"sse_channel"``.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, NamedTuple

from .config import options

__all__ = [
    "MEMORY_BUS_HINT",
    "Trap",
    "atomic_requests",
    "held_worker",
    "memory_bus",
    "note_gunicorn",
    "note_plain_asgi",
    "note_refused",
    "note_uvicorn",
    "plain_asgi",
]

_log = logging.getLogger("sse_channel")

#: Why a stream stayed with its server, where one can do something about it.
_REASONS = {
    "tls": "gunicorn itself speaks TLS",
    "protocol": "the response is HTTP/2, or has a known length",
    "body": "more than 1 MiB of the request's body was left unread",
    "descriptors": "the process has no more descriptors",
}


#: What to do about the bus of one process.
MEMORY_BUS_HINT = (
    "Leave BUS out of SSE_CHANNEL (local:// reaches every process of the project on this host) or "
    "let it name a Redis."
)


class Trap(NamedTuple):
    """What is wrong, as Django's checks tell it."""

    id: str
    message: str
    hint: str


def memory_bus(told_by: str) -> Trap:
    """The bus of one process, and several processes."""
    return Trap(
        "sse_channel.W001",
        f"The bus is memory://, and there are several workers ({told_by}): an event reaches only "
        "the clients of the worker that publishes it.",
        MEMORY_BUS_HINT,
    )


def held_worker(why: str, hint: str) -> Trap:
    """Streams that stay with a worker that does one thing at a time."""
    return Trap(
        "sse_channel.W003",
        f"Each open stream holds one of gunicorn's sync workers for itself, since {why}.",
        hint,
    )


def plain_asgi(where: str) -> Trap:
    """ASGI without the wrapper."""
    return Trap(
        "sse_channel.W004",
        f"{where}: under uvicorn each stream stays in Python, as a task of its own.",
        "In asgi.py: from sse_channel.asgi import offload; "
        "application = offload(get_asgi_application()), around all other wrappers.",
    )


def atomic_requests(view: str, alias: str) -> Trap:
    """An asynchronous view where each request is to be a transaction."""
    return Trap(
        "sse_channel.W005",
        f"{view} is asynchronous, and the database {alias!r} has ATOMIC_REQUESTS: Django refuses "
        "its requests with a RuntimeError, and browsers never come back after that.",
        f"Decorate it with transaction.non_atomic_requests(using={alias!r}), or make it a plain "
        "function: under ASGI too its stream needs no thread.",
    )


def _wrapped(content: object) -> Trap:
    code = getattr(content, "gi_code", None) or getattr(content, "ag_code", None)
    if type(content).__module__.startswith("sse_channel."):
        # Nothing in Django: the head of the response says so.
        who = "the response got a Content-Encoding around the application"
    elif code is not None:
        who = f"{getattr(content, '__qualname__', code.co_name)} in {code.co_filename}"
    else:
        who = f"{type(content).__module__}.{type(content).__qualname__}"
    return Trap(
        "sse_channel.W007",
        f"Something stands between a stream and its client ({who}): the stream cannot leave "
        "Python, and frames arrive when that lets them through.",
        "Have the middleware that sets streaming_content, or compresses, leave responses alone "
        "whose content type is text/event-stream.",
    )


class _Serving(NamedTuple):
    process: int
    #: gunicorn's sync worker, which serves one request at a time.
    is_sync: bool
    is_uvicorn: bool


_serving: _Serving | None = None
_told: set[tuple[int, str]] = set()


def note_gunicorn(worker: Any) -> None:
    """Note in which worker of gunicorn this process serves streams."""
    global _serving
    sync = sys.modules.get("gunicorn.workers.sync")
    is_sync = sync is not None and isinstance(worker, sync.SyncWorker)
    _serving = _Serving(os.getpid(), is_sync, is_uvicorn=False)
    _look_at_bus(worker.cfg.workers, "gunicorn's")
    if is_sync and not options().offload:
        _tell(
            held_worker("OFFLOAD is off", "Turn OFFLOAD on, or choose gevent or gthread workers.")
        )


def note_uvicorn(server: Any) -> None:
    """Note that uvicorn serves streams in this process."""
    global _serving
    _serving = _Serving(os.getpid(), is_sync=False, is_uvicorn=True)
    _look_at_bus(getattr(server.config, "workers", 1), "uvicorn's")


def note_refused(reason: str, content: object = None) -> None:
    """Note a stream that stays with the server, and what would be iterated for it."""
    serving = _serving
    if serving is None or serving.process != os.getpid():
        # A test, or a server that nothing is known of.
        return
    if reason == "wrapped":
        _tell(_wrapped(content))
    elif serving.is_sync and reason in _REASONS:
        hint = (
            "End TLS in a proxy in front of gunicorn" if reason == "tls" else "See docs/offload.md"
        )
        _tell(held_worker(_REASONS[reason], f"{hint}, or choose gevent or gthread workers."))


def note_plain_asgi(behind: str | None) -> None:
    """Note a response on ASGI that no wrapper has prepared, or one that is `behind` another."""
    if _serving is not None and _serving.process == os.getpid() and _serving.is_uvicorn:
        _tell(
            plain_asgi(
                "The ASGI application is not wrapped by sse_channel.asgi.offload"
                if behind is None
                else f"{behind} stands between the server and sse_channel.asgi.offload"
            )
        )


def _look_at_bus(workers: object, whose: str) -> None:
    if isinstance(workers, int) and workers > 1 and options().bus == "memory://":
        _tell(memory_bus(f"{whose}, {workers}"))


def _tell(trap: Trap) -> None:
    """Log it, once for each process."""
    key = (os.getpid(), trap.id)
    if key not in _told:
        _told.add(key)
        _log.warning("%s %s (%s)", trap.message, trap.hint, trap.id)
