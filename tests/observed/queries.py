"""How many queries this process has sent to its databases."""

from collections.abc import Callable
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

# Appended to: an addition could be lost between two threads.
_sent: list[None] = []


def count() -> int:
    return len(_sent)


def _watch(connection: BaseDatabaseWrapper, **_: Any) -> None:
    # It is the same object each time that it connects.
    if _note not in connection.execute_wrappers:
        connection.execute_wrappers.append(_note)


def _note(execute: Callable[..., Any], *arguments: Any) -> Any:
    _sent.append(None)
    return execute(*arguments)


connection_created.connect(_watch)
