"""Configuration, read at first use.

Each option is looked up in this order; the first place that names it wins:

1. ``sse_channel.configure(...)``
2. the environment, ``SSE_CHANNEL_<OPTION>``
3. Django's settings, ``SSE_CHANNEL = {"<OPTION>": ...}``, where Django is configured
4. the default

| option            | default       | meaning                                                |
| ----------------- | ------------- | ------------------------------------------------------ |
| `BUS`             | `memory://`   | where events are ordered and kept: this process        |
| `MAX_EVENT_BYTES` | 1048576       | largest event on the wire, in bytes; else `ValueError` |
| `RETRY`           | 3000          | milliseconds after which a browser reconnects          |
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

__all__ = ["Options", "configure", "options"]


class Options(NamedTuple):
    """The options in force."""

    bus: str = "memory://"
    max_event_bytes: int = 1 << 20
    retry: int = 3000


class _InForce(NamedTuple):
    options: Options
    # Read without Django's settings, they are read again once there are some.
    with_django: bool


_configured: dict[str, Any] = {}
_in_force: _InForce | None = None


def configure(
    *,
    bus: str | None = None,
    max_event_bytes: int | None = None,
    retry: int | None = None,
) -> None:
    """Set options for this process, above the environment and Django's settings.

    Call it before the first use, in `settings.py` or at the top of a script. What is left out, or
    None, stays as it was. Options that are read later than a change see the change; streams that
    are open keep what they were opened with.

    Args:
        bus: the URL of the bus; `memory://`, this process only.
        max_event_bytes: the largest event on the wire, in bytes.
        retry: milliseconds after which a browser reconnects.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: a value that cannot be, named with its option; nothing is changed then.
    """
    global _in_force
    given = {"bus": bus, "max_event_bytes": max_event_bytes, "retry": retry}
    checked = {
        name: _check(name, value, f"configure({name}=...)")
        for name, value in given.items()
        if value is not None
    }
    _configured.update(checked)
    _in_force = None


def options() -> Options:
    """The options in force, read from all places at the first call.

    Raises:
        TypeError, ValueError: an option that cannot be, named with the place that it came from.
    """
    global _in_force
    if _in_force is not None and (_in_force.with_django or not _django_is_configured()):
        return _in_force.options
    settings = _django_settings()
    read: dict[str, Any] = {}
    for name in Options._fields:
        variable = f"SSE_CHANNEL_{name.upper()}"
        if name in _configured:
            read[name] = _configured[name]
        elif variable in os.environ:
            value = _from_text(name, os.environ[variable], variable)
            read[name] = _check(name, value, f"the environment variable {variable}")
        elif name.upper() in settings:
            place = f"SSE_CHANNEL[{name.upper()!r}] in Django's settings"
            read[name] = _check(name, settings[name.upper()], place)
    _in_force = _InForce(Options(**read), _django_is_configured())
    return _in_force.options


def _django_is_configured() -> bool:
    conf = sys.modules.get("django.conf")
    return conf is not None and conf.settings.configured


def _django_settings() -> dict[str, Any]:
    conf = sys.modules.get("django.conf")
    if conf is None:
        return {}
    settings = conf.settings
    if not settings.configured and "DJANGO_SETTINGS_MODULE" not in os.environ:
        return {}
    given = getattr(settings, "SSE_CHANNEL", {})
    if not isinstance(given, dict):
        raise TypeError(
            f"SSE_CHANNEL in Django's settings must be a dict, not {type(given).__name__}"
        )
    known = [name.upper() for name in Options._fields]
    for name in given:
        if name not in known:
            raise ValueError(
                f"SSE_CHANNEL in Django's settings has no option {name!r}; "
                f"the options are {', '.join(known)}"
            )
    return given


def _from_text(name: str, text: str, variable: str) -> object:
    if name == "bus":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"the environment variable {variable} must be a whole number, not {text!r}"
        ) from None


def _check(name: str, value: object, place: str) -> object:
    if name == "bus":
        if not isinstance(value, str):
            raise TypeError(f"{place} must be a URL as str, not {type(value).__name__}")
        if value != "memory://":
            raise ValueError(
                f"{place} is {value!r}, but the only bus of this version is 'memory://'"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{place} must be an int, not {type(value).__name__}")
    smallest = {"max_event_bytes": 1, "retry": 0}[name]
    if not smallest <= value < 1 << 63:
        raise ValueError(f"{place} must be at least {smallest} and below 2**63, not {value}")
    return value
