"""How the project is served, as far as files and the environment tell: nothing is executed."""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from django.conf import settings

__all__ = ["Gunicorn", "asgi_file", "find_gunicorn", "wraps_asgi"]

_CONFIG = "gunicorn.conf.py"
_OPTIONS = ("workers", "worker_class", "threads", "certfile", "keyfile")


class Gunicorn(NamedTuple):
    """gunicorn as it is configured."""

    is_used: bool
    """Whether anything speaks of it."""

    several_workers: str | None
    """What says that there are several workers, gunicorn's or another server's."""

    worker_class: str | None
    """The class that is asked for, if it can be told."""

    is_sync: bool
    """Whether its workers are surely sync ones."""

    tls: str | None
    """What says that it speaks TLS itself."""


class _Given(NamedTuple):
    value: Any
    """`_UNKNOWN` for what only running the file would tell."""

    text: str
    where: str


_UNKNOWN = object()


def find_gunicorn() -> Gunicorn:
    """Read GUNICORN_CMD_ARGS, WEB_CONCURRENCY and `gunicorn.conf.py`, as gunicorn would.

    Its command line is not known, nor is what a file computes.
    """
    arguments = _from_arguments(os.environ.get("GUNICORN_CMD_ARGS", ""))
    config_file = arguments.pop("config", None)
    path = _config_file(None if config_file is None else str(config_file.value))
    given = {**(_from_file(path) if path is not None else {}), **arguments}
    workers = given.get("workers")
    if workers is None and (text := os.environ.get("WEB_CONCURRENCY")):
        workers = _Given(_number(text), text, "WEB_CONCURRENCY")
    worker_class = given.get("worker_class")
    threads = given.get("threads")
    is_used = path is not None or "GUNICORN_CMD_ARGS" in os.environ
    name = None if worker_class is None else worker_class.value
    tls = given.get("certfile") or given.get("keyfile")
    return Gunicorn(
        is_used=is_used,
        several_workers=_several(workers),
        worker_class=name if isinstance(name, str) else None,
        is_sync=is_used
        and (name is None or (isinstance(name, str) and _is_sync(name)))
        and (threads is None or threads.value == 1),
        tls=None if tls is None or tls.value in (None, "") else _shown(tls),
    )


def _is_sync(name: str) -> bool:
    return name == "sync" or name.endswith("SyncWorker")


def _several(workers: _Given | None) -> str | None:
    if workers is None:
        return None
    if workers.value is _UNKNOWN:
        # As gunicorn's documentation recommends it.
        return _shown(workers) if "cpu_count" in workers.text else None
    return _shown(workers) if isinstance(workers.value, int) and workers.value > 1 else None


def _shown(given: _Given) -> str:
    return f"{given.text} in {given.where}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _from_arguments(text: str) -> dict[str, _Given]:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    parser.add_argument("-w", "--workers")
    parser.add_argument("-k", "--worker-class")
    parser.add_argument("--threads")
    parser.add_argument("--certfile")
    parser.add_argument("--keyfile")
    try:
        found, _ = parser.parse_known_args(shlex.split(text))
    except ValueError:
        # gunicorn itself tells what is wrong with them.
        return {}
    given = {}
    for name, value in vars(found).items():
        if value is not None:
            parsed = _number(value) if name in ("workers", "threads") else value
            shown = f"--{name.replace('_', '-')} {value}"
            given[name] = _Given(parsed, shown, "GUNICORN_CMD_ARGS")
    return given


def _number(text: str) -> object:
    try:
        return int(text)
    except ValueError:
        return _UNKNOWN


def _config_file(named: str | None) -> Path | None:
    """The configuration: the named one, or the one in the directory it is started from."""
    if named is not None:
        path = Path(named.removeprefix("file:"))
        return path if path.is_file() else None
    directories = [Path.cwd()]
    if os.path.basename(sys.argv[0]) == "manage.py":
        directories.append(Path(sys.argv[0]).absolute().parent)
    base = getattr(settings, "BASE_DIR", None)
    if isinstance(base, (str, os.PathLike)):
        directories.append(Path(base))
    for directory in directories:
        if (directory / _CONFIG).is_file():
            return directory / _CONFIG
    return None


def _from_file(path: Path) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for statement in _parsed(path):
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        value = getattr(statement, "value", None)
        if value is None:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and target.id in _OPTIONS:
                text = f"{target.id} = {ast.unparse(value)}"
                given[target.id] = _Given(_literal(value), text, str(path))
    return given


def _literal(value: ast.expr) -> object:
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError):
        return _UNKNOWN


def _parsed(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []


def asgi_file() -> Path | None:
    """The file of the ASGI application: the one of the settings, or beside the WSGI one's."""
    if named := getattr(settings, "ASGI_APPLICATION", None):
        return _file_of(named.rpartition(".")[0])
    for module in (
        (getattr(settings, "WSGI_APPLICATION", None) or "").rpartition(".")[0],
        getattr(settings, "SETTINGS_MODULE", None) or "",
    ):
        package = module.rpartition(".")[0]
        if package and (path := _file_of(f"{package}.asgi")) is not None:
            return path
    return None


def _file_of(module: str) -> Path | None:
    """Where a module is, without importing it nor its package."""
    package, _, name = module.rpartition(".")
    search = None
    if package:
        parent = sys.modules.get(package)
        if parent is None or not hasattr(parent, "__path__"):
            return None
        search = list(parent.__path__)
    spec = PathFinder.find_spec(name, search)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def wraps_asgi(path: Path) -> bool:
    """Whether the file uses the wrapper; true as well if it cannot be told."""
    body = _parsed(path)
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        else:
            continue
        if any(name.startswith("sse_channel.asgi") for name in names):
            return True
    return not body
