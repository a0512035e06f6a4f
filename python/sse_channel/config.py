"""Configuration, read at first use.

Each option is looked up in this order; the first place that names it wins:

1. ``sse_channel.configure(...)``
2. the environment, ``SSE_CHANNEL_<OPTION>``
3. Django's settings, ``SSE_CHANNEL = {"<OPTION>": ...}``, where Django is configured
4. the default

| option            | default       | meaning                                                   |
| ----------------- | ------------- | --------------------------------------------------------- |
| `BACKLOG_BYTES`   | 1048576       | bytes that may wait for one offloaded client              |
| `BUS`             | `local://`    | where events are ordered and kept                         |
| `COMPRESS`        | False         | whether streams are compressed for clients that take gzip |
| `CORS_ORIGINS`    | ()            | other origins whose pages may open streams                |
| `HISTORY_AGE`     | 86400         | seconds that an event is kept for clients that come back  |
| `HISTORY_BYTES`   | 67108864      | bytes of events kept for each channel                     |
| `IO_THREADS`      | 2             | threads that write to offloaded clients, at the most      |
| `MAX_CLIENTS`     | 0             | streams of one process at the most; 0 for no limit        |
| `MAX_CLIENTS_PER_ADDRESS` | 0     | of them, those of one address; 0 for no limit             |
| `MAX_CLIENTS_PER_USER` | 0        | of them, those of one user; 0 for no limit                |
| `MAX_EVENT_BYTES` | 1048576       | largest event on the wire, in bytes; else `ValueError`    |
| `OFFLOAD`         | True          | whether streams leave Python where they can               |
| `PROXIES`         | 0             | proxies in front that each add to X-Forwarded-For         |
| `PUBLISH_TIMEOUT` | 10            | seconds that the bus may take to answer; else `BusError`  |
| `RENDER_THREADS`  | 4             | threads that call `render=`, at the most                  |
| `RETRY`           | 3000          | milliseconds after which a browser reconnects             |

`BUS` is `memory://` (this process), `local://` (every process of this project and user on this
host), ``local:///a/directory`` (the same, in a directory of your choice) or
``redis://[user:password@]host[:port][/db][?prefix=name]`` (any number of hosts; ``rediss://`` with
TLS). The bus is begun at the first use of a channel with a name and stays for the life of the
process. Only tests change it: Django's ``override_settings(SSE_CHANNEL=...)`` begins it anew, and
so does what `sse_channel.testing` has.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from . import _sse_channel

__all__ = [
    "Options",
    "bus_settings",
    "bus_shown",
    "configure",
    "mistakes",
    "options",
    "overridden",
    "project",
    "strange_variables",
]


class Options(NamedTuple):
    """The options in force. Its `repr` has no password."""

    backlog_bytes: int = 1 << 20
    bus: str = "local://"
    compress: bool = False
    cors_origins: tuple[str, ...] = ()
    history_age: int = 86400
    history_bytes: int = 64 << 20
    io_threads: int = 2
    max_clients: int = 0
    max_clients_per_address: int = 0
    max_clients_per_user: int = 0
    max_event_bytes: int = 1 << 20
    offload: bool = True
    proxies: int = 0
    publish_timeout: float = 10.0
    render_threads: int = 4
    retry: int = 3000

    def __repr__(self) -> str:
        # A page for errors shows local variables.
        shown = (f"{name}={_shown(value)}" for name, value in self._asdict().items())
        return f"Options({', '.join(shown)})"


class _InForce(NamedTuple):
    options: Options
    # Read without Django's settings, they are read again once there are some.
    with_django: bool


_SMALLEST = {
    "backlog_bytes": 1,
    "history_age": 1,
    "history_bytes": 1,
    "io_threads": 1,
    "max_clients": 0,
    "max_clients_per_address": 0,
    "max_clients_per_user": 0,
    "max_event_bytes": 1,
    "proxies": 0,
    "render_threads": 1,
    "retry": 0,
}
_LARGEST = {"io_threads": 256, "proxies": 100, "render_threads": 256}
_SWITCHES = ("compress", "offload")

# In ASCII without capitals, as a browser sends it; a pattern with * is none.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[!\"$-)+-.0-9;->[-~]+)(:[0-9]+)?")

_configured: dict[str, Any] = {}
_in_force: _InForce | None = None
# What the bus of this process was begun with.
_begun: dict[str, Any] = {}


def configure(
    *,
    backlog_bytes: int | None = None,
    bus: str | None = None,
    compress: bool | None = None,
    cors_origins: Sequence[str] | None = None,
    history_age: int | None = None,
    history_bytes: int | None = None,
    io_threads: int | None = None,
    max_clients: int | None = None,
    max_clients_per_address: int | None = None,
    max_clients_per_user: int | None = None,
    max_event_bytes: int | None = None,
    offload: bool | None = None,
    proxies: int | None = None,
    publish_timeout: float | None = None,
    render_threads: int | None = None,
    retry: int | None = None,
) -> None:
    """Set options for this process, above the environment and Django's settings.

    Call it before the first use, in `settings.py` or at the top of a script. What is left out, or
    None, stays as it was. Options that are read later than a change see the change; streams that
    are open keep what they were opened with. The bus and its history are begun once: after the
    first use of a channel with a name they cannot be changed.

    Args:
        backlog_bytes: bytes that may wait for one offloaded client that does not read.
        bus: the URL of the bus.
        compress: whether streams are compressed for clients that take gzip. Not for events that
            hold a secret beside text that a stranger chose: see docs/compression.md.
        cors_origins: origins (``"https://app.example"``) other than the site's own whose pages may
            open streams, with the user's cookies; ``"*"`` alone for any, without cookies.
        history_age: seconds that an event is kept.
        history_bytes: bytes of events kept for each channel.
        io_threads: threads that write to offloaded clients, at the most. The first begins with the
            first of them, another when each has 1,000.
        max_clients: streams of this process at the most, 0 for no limit. One more is told to come
            back in 30 seconds.
        max_clients_per_address: of them, those that come from one address.
        max_clients_per_user: of them, those of one user.
        max_event_bytes: the largest event on the wire, in bytes.
        offload: whether streams leave Python where they can.
        proxies: proxies in front of the server, each of which adds the address it sees to
            ``X-Forwarded-For``. With 0 a client's address is that of the connection.
        publish_timeout: seconds that the bus may take to answer.
        render_threads: threads that call `render=`, at the most; one more begins with each
            rendering.
        retry: milliseconds after which a browser reconnects.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: a value that cannot be, named with its option, or another bus than the one
            that is in use; nothing is changed then.
    """
    global _in_force
    given = {
        "backlog_bytes": backlog_bytes,
        "bus": bus,
        "compress": compress,
        "cors_origins": cors_origins,
        "history_age": history_age,
        "history_bytes": history_bytes,
        "io_threads": io_threads,
        "max_clients": max_clients,
        "max_clients_per_address": max_clients_per_address,
        "max_clients_per_user": max_clients_per_user,
        "max_event_bytes": max_event_bytes,
        "offload": offload,
        "proxies": proxies,
        "publish_timeout": publish_timeout,
        "render_threads": render_threads,
        "retry": retry,
    }
    checked = {
        name: _check(name, value, f"configure({name}=...)")
        for name, value in given.items()
        if value is not None
    }
    if _sse_channel.bus_url() is not None:
        # No variable has a value of these: a page for errors would show it, with its password.
        late = [name for name in _begun if checked.get(name, _begun[name]) != _begun[name]]
        if late:
            raise ValueError(
                f"configure({late[0]}=...) comes too late: this process uses the bus "
                f"{_sse_channel.bus_url()!r} already; call it before the first use of a channel"
            )
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
    read: dict[str, Any] = {
        name: value for name in Options._fields if (value := _read(name, settings)) is not None
    }
    _in_force = _InForce(Options(**read), _django_is_configured())
    _watch_overrides()
    return _in_force.options


def mistakes() -> list[str]:
    """Tell all that is wrong with the options, in whichever place; `options` raises the first."""
    try:
        settings = _given()
    except TypeError as error:
        return [str(error)]
    found = [_unknown(name) for name in settings if name not in _known()]
    for name in Options._fields:
        try:
            _read(name, settings)
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def strange_variables() -> dict[str, str]:
    """Environment variables that look like an option's and are none's, and what each may mean."""
    known = [_variable(name) for name in Options._fields]
    strange = {}
    for variable in os.environ:
        if variable.startswith("SSE_CHANNEL_") and variable not in known:
            # Others may have variables of that kind: only what is nearly an option's is strange.
            close = difflib.get_close_matches(variable.upper(), known, 1, 0.9)
            if close:
                strange[variable] = close[0]
    return strange


@contextlib.contextmanager
def overridden(**given: Any) -> Iterator[None]:
    """Have other options within, above all other places, and a bus begun anew. For tests."""
    global _configured
    checked = {name: _check(name, value, f"{name}=...") for name, value in given.items()}
    # Before the first use too: an override within is applied as a whole, or refused.
    _watch_overrides()
    before = _configured
    _configured = {**before, **checked}
    _begin_anew()
    try:
        yield
    finally:
        _configured = before
        _begin_anew()


def _begin_anew() -> None:
    global _in_force
    _in_force = None
    _sse_channel.begin_bus_anew()
    _begun.clear()


_is_watching = False


def _watch_overrides() -> None:
    """Follow Django's `override_settings`, which tests use."""
    global _is_watching
    if not _is_watching and _django_is_configured():
        from django.core.signals import setting_changed

        setting_changed.connect(_setting_changed, dispatch_uid="sse_channel.config")
        _is_watching = True


def _setting_changed(*, setting: str, enter: bool, **_: Any) -> None:
    global _in_force
    if setting != "SSE_CHANNEL":
        return
    _in_force = None
    if enter:
        _check_that_nothing_is_above()
    try:
        now = options()._asdict()
    except (TypeError, ValueError):
        # Told at the next use; this may be a test of just that.
        return
    if _sse_channel.bus_url() is not None and any(now[name] != _begun[name] for name in _begun):
        _begin_anew()


def _check_that_nothing_is_above() -> None:
    """Raise for a setting that another place hides: a test would run with other options."""
    try:
        settings = _django_settings()
        wanted = {name: _from_settings(name, settings) for name in Options._fields}
        in_force = options()._asdict()
    except (TypeError, ValueError):
        return
    for name, value in wanted.items():
        if value is not None and value != in_force[name]:
            above = (
                "configure() or memory_bus()"
                if name in _configured
                else f"the variable {_variable(name)}"
            )
            raise ValueError(
                f"SSE_CHANNEL[{name.upper()!r}] = {_shown(value)} has no effect: {above} says "
                f"{_shown(in_force[name])}, which comes before Django's settings; take it away "
                "for the tests"
            )


def _django_is_configured() -> bool:
    conf = sys.modules.get("django.conf")
    return conf is not None and conf.settings.configured


def _given() -> dict[str, Any]:
    """Django's setting, as it is."""
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
    return given


def _django_settings() -> dict[str, Any]:
    given = _given()
    for name in given:
        if name not in _known():
            raise ValueError(_unknown(name))
    return given


def _known() -> list[str]:
    return [name.upper() for name in Options._fields]


def _unknown(name: object) -> str:
    known = _known()
    close = difflib.get_close_matches(name.upper(), known, 1) if isinstance(name, str) else None
    hint = f"did you mean {close[0]!r}? The" if close else "the"
    return (
        f"SSE_CHANNEL in Django's settings has no option {shown(name)}; "
        f"{hint} options are {', '.join(known)}"
    )


def _variable(name: str) -> str:
    return f"SSE_CHANNEL_{name.upper()}"


def _read(name: str, settings: dict[str, Any]) -> object:
    """The option from the first place that names it, None when none does."""
    variable = _variable(name)
    if name in _configured:
        return _configured[name]
    if variable in os.environ:
        value = _from_text(name, os.environ[variable], variable)
        return _check(name, value, f"the environment variable {variable}")
    return _from_settings(name, settings)


def _from_settings(name: str, settings: dict[str, Any]) -> object:
    option = name.upper()
    if option not in settings:
        return None
    return _check(name, settings[option], f"SSE_CHANNEL[{option!r}] in Django's settings")


def _from_text(name: str, text: str, variable: str) -> object:
    if name == "bus":
        return text
    if name == "cors_origins":
        return [origin.strip() for origin in text.split(",") if origin.strip()]
    if name in _SWITCHES:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ValueError(f"the environment variable {variable} must be true or false, not {text!r}")
    try:
        return float(text) if name == "publish_timeout" else int(text)
    except ValueError:
        kind = "number" if name == "publish_timeout" else "whole number"
        raise ValueError(
            f"the environment variable {variable} must be a {kind}, not {text!r}"
        ) from None


def _check(name: str, value: object, place: str) -> object:
    if name == "bus":
        if not isinstance(value, str):
            raise TypeError(f"{place} must be a URL as str, not {type(value).__name__}")
        try:
            problem = _sse_channel.check_bus(value)
        except UnicodeEncodeError as error:
            problem = f"which UTF-8 cannot carry ({error.reason})"
        if problem is not None:
            raise ValueError(f"{place} is {_shown(value)}, {problem}")
        return value
    if name == "cors_origins":
        return _check_origins(value, place)
    if name == "publish_timeout":
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{place} must be a number of seconds, not {type(value).__name__}")
        if not 0 < value <= 3600:
            number = shown(value)
            raise ValueError(f"{place} must be more than 0 and at most 3600 seconds, not {number}")
        return float(value)
    if name in _SWITCHES:
        if not isinstance(value, bool):
            raise TypeError(f"{place} must be True or False, not {type(value).__name__}")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{place} must be an int, not {type(value).__name__}")
    if value > _LARGEST.get(name, value):
        raise ValueError(f"{place} must be at most {_LARGEST[name]}, not {shown(value)}")
    if not _SMALLEST[name] <= value < 1 << 63:
        raise ValueError(
            f"{place} must be at least {_SMALLEST[name]} and below 2**63, not {shown(value)}"
        )
    return value


def _check_origins(value: object, place: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"{place} must be a list of origins, not {type(value).__name__}")
    for origin in value:
        if not isinstance(origin, str):
            raise TypeError(f"{place} must hold origins as str, not {type(origin).__name__}")
        # As browsers write it: in lower case, without a path, and without the scheme's own port.
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{place} has {origin!r}, which is no origin; write scheme and host as the browser "
                'does, such as "https://app.example" or "http://localhost:5173", without a path'
            )
    if "*" in value and len(value) > 1:
        raise ValueError(f'{place} has "*" beside other origins; name either all or some')
    return tuple(value)


def shown(value: object) -> str:
    """A value for an error message, also one that Python does not write: of thousands of digits."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"that {type(value).__name__}"


_PASSWORD_ALONE = re.compile(
    r"^(?!local:|memory:)((?:[a-z]+:/+)?(?:\[[^]]*\]|[^:/?@[]*)):(?!\d*(?:[/?]|$)).*",
    flags=re.DOTALL | re.IGNORECASE,
)


def _shown(value: object) -> str:
    """A value without a password: errors end in logs."""
    return shown(_without_password(value) if isinstance(value, str) else value)


def _without_password(url: str) -> str:
    # Also that of a URL which is none for want of a slash or of the scheme.
    url = re.sub(r"^([a-z]+:/+)?.*@", r"\1***@", url, flags=re.DOTALL | re.IGNORECASE)
    # What stands in the place of a port and is none: a password whose @ and host are missing.
    url = _PASSWORD_ALONE.sub(r"\1:***", url)
    return re.sub(r"([?&](?!prefix=|ca=)[^=&]*=)[^&]*", r"\1***", url)


def bus_shown() -> str:
    """The URL of the bus without a password, also while the bus is not in use yet."""
    return _sse_channel.bus_url() or _without_password(options().bus)


def has_password(url: str) -> bool:
    """Whether a URL of the bus carries what nobody else must see."""
    return url.startswith(("redis://", "rediss://")) and "@" in url


def bus_settings() -> tuple[str, str, int, int]:
    """What the extension begins the bus with: its URL, the project, and the history's limits."""
    found = options()
    _begun.update(bus=found.bus, history_age=found.history_age, history_bytes=found.history_bytes)
    return found.bus, project(), found.history_age, found.history_bytes


def project() -> str:
    """Name what all processes of this project have in common, and no other project has.

    With Django that is the file of its settings, whatever directory a process was started in.
    Without, it is the working directory at the first use.
    """
    conf = sys.modules.get("django.conf")
    if conf is not None and (conf.settings.configured or "DJANGO_SETTINGS_MODULE" in os.environ):
        module = sys.modules.get(getattr(conf.settings, "SETTINGS_MODULE", None) or "")
        path = getattr(module, "__file__", None)
        if path is not None:
            return f"django {os.path.realpath(path)}"
    return f"directory {os.path.realpath(os.getcwd())}"
