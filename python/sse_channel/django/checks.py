"""Django's system checks for the known traps.

They look at settings, the environment and files, import nothing of the project that Django's own
checks do not, and never begin the bus. What only a running server shows is in `..traps`.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

from django.conf import settings
from django.core import checks

from .. import config, traps
from .deployment import Gunicorn, asgi_file, find_gunicorn, wraps_asgi

__all__ = ["TAG", "register"]

#: ``manage.py check --tag sse_channel``.
TAG = "sse_channel"


def register() -> None:
    """Register the checks; twice does nothing."""
    for check in (check_settings, check_bus, check_workers, check_asgi, check_views):
        checks.register(check, TAG)
    checks.register(check_deployed_bus, TAG, deploy=True)
    checks.register(check_password, TAG, deploy=True)


def check_settings(app_configs: Any = None, **options: Any) -> list[checks.CheckMessage]:
    """Tell what is wrong with the options."""
    found: list[checks.CheckMessage] = [
        checks.Error(
            mistake,
            hint="Streams and publishes raise this until it is mended. The README's section "
            "Configuration lists the options.",
            id="sse_channel.E001",
        )
        for mistake in config.mistakes()
    ]
    found += [
        checks.Warning(
            f"The environment variable {variable} is not an option's and has no effect.",
            hint=f"Did you mean {meant}?",
            id="sse_channel.W006",
        )
        for variable, meant in config.strange_variables().items()
    ]
    return found


def check_bus(app_configs: Any = None, **options: Any) -> list[checks.CheckMessage]:
    """Tell of a bus for one process where several workers are configured."""
    in_force = _options()
    if in_force is None or in_force.bus != "memory://" or _is_test():
        return []
    several = find_gunicorn().several_workers
    return [] if several is None else [_warning(traps.memory_bus(several))]


def check_deployed_bus(app_configs: Any = None, **options: Any) -> list[checks.CheckMessage]:
    """Tell of a bus for one process in production."""
    in_force = _options()
    if in_force is None or in_force.bus != "memory://" or settings.DEBUG:
        return []
    return [
        checks.Warning(
            "The bus is memory:// and DEBUG is off: no other process, be it a second worker, a "
            "task queue or a shell, reaches this one's clients, and a restart forgets all.",
            hint=traps.MEMORY_BUS_HINT,
            id="sse_channel.W002",
        )
    ]


def check_password(app_configs: Any = None, **options: Any) -> list[checks.CheckMessage]:
    """Tell of a password where Django's error reports show it."""
    given = getattr(settings, "SSE_CHANNEL", None)
    bus = given.get("BUS") if isinstance(given, dict) else None
    if not isinstance(bus, str) or not config.has_password(bus):
        return []
    return [
        checks.Warning(
            "SSE_CHANNEL['BUS'] in Django's settings holds a password, and Django's error reports "
            "(mails to ADMINS, pages with DEBUG) show the settings.",
            hint="Give it by the environment variable SSE_CHANNEL_BUS, or by "
            "sse_channel.configure(bus=...).",
            id="sse_channel.W008",
        )
    ]


def check_workers(app_configs: Any = None, **options: Any) -> list[checks.CheckMessage]:
    """Tell of sync workers whose streams cannot leave them."""
    gunicorn = find_gunicorn()
    in_force = _options()
    if in_force is None or not gunicorn.is_sync:
        return []
    if not in_force.offload:
        hint = "Turn OFFLOAD on, or choose gevent or gthread workers."
        return [_warning(traps.held_worker("OFFLOAD is off", hint))]
    if gunicorn.tls is not None:
        hint = "End TLS in a proxy in front of gunicorn, or choose gevent or gthread workers."
        return [_warning(traps.held_worker(f"gunicorn itself speaks TLS ({gunicorn.tls})", hint))]
    return []


def check_asgi(app_configs: Any = None, **options: Any) -> list[checks.CheckMessage]:
    """Tell of an `asgi.py` for uvicorn that lacks the wrapper."""
    in_force = _options()
    if in_force is None or not in_force.offload or not _is_uvicorn_likely(find_gunicorn()):
        return []
    path = asgi_file()
    if path is None or wraps_asgi(path):
        return []
    return [_warning(traps.plain_asgi(f"{path} does not use sse_channel.asgi.offload"))]


def check_views(app_configs: Any = None, **options: Any) -> list[checks.CheckMessage]:
    """Tell of asynchronous streams that ATOMIC_REQUESTS makes impossible."""
    atomic = [
        alias for alias, database in settings.DATABASES.items() if database.get("ATOMIC_REQUESTS")
    ]
    if not atomic or not getattr(settings, "ROOT_URLCONF", None):
        return []
    from django.urls import get_resolver

    found: dict[str, checks.CheckMessage] = {}
    for view in _views(get_resolver().url_patterns):
        exempt = getattr(view, "_non_atomic_requests", ())
        refused = [alias for alias in atomic if alias not in exempt]
        if refused and inspect.iscoroutinefunction(_marked(view)) and _streams(view):
            named = getattr(view, "view_class", view)
            shown = f"{named.__module__}.{getattr(named, '__qualname__', named)}"
            found[shown] = _warning(traps.atomic_requests(shown, refused[0]))
    return list(found.values())


def _options() -> config.Options | None:
    """The options in force; None when they are wrong, which `check_settings` tells."""
    try:
        return config.options()
    except (TypeError, ValueError):
        return None


def _is_test() -> bool:
    """Whether ``manage.py test`` runs: its bus is no server's."""
    return sys.argv[1:2] == ["test"]


def _warning(trap: traps.Trap) -> checks.Warning:
    return checks.Warning(trap.message, hint=trap.hint, id=trap.id)


def _is_uvicorn_likely(gunicorn: Gunicorn) -> bool:
    """Whether the project seems to run under uvicorn: an `asgi.py` alone says nothing."""
    if gunicorn.worker_class is not None:
        return "uvicorn" in gunicorn.worker_class.lower()
    if gunicorn.is_used:
        return False
    if any(name.startswith("UVICORN_") for name in os.environ):
        return True
    return _is_installed("uvicorn") and not any(
        _is_installed(server) for server in ("gunicorn", "daphne", "hypercorn", "granian")
    )


def _is_installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def _views(patterns: Any) -> Iterator[Any]:
    for pattern in patterns:
        if hasattr(pattern, "url_patterns"):
            yield from _views(pattern.url_patterns)
        elif callable(view := getattr(pattern, "callback", None)) and hasattr(view, "__module__"):
            yield view


def _marked(view: Any) -> Any:
    """What says whether a view is asynchronous: Django marks the callable of a class."""
    view_class = getattr(view, "view_class", None)
    if view_class is None or not getattr(view_class, "view_is_async", False):
        return view
    handlers = (getattr(view_class, name, None) for name in view_class.http_method_names)
    return next((each for each in handlers if inspect.iscoroutinefunction(each)), view)


def _streams(view: Any) -> bool:
    """Whether the view's own code names `EventStreamResponse`."""
    view_class = getattr(view, "view_class", None)
    parts = [view] if view_class is None else list(vars(view_class).values())
    return any(
        "EventStreamResponse" in _names(code)
        for part in parts
        if (code := getattr(inspect.unwrap(part) if callable(part) else part, "__code__", None))
    )


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names) | set(code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
