"""Importing this refuses a subinterpreter, before anything of the extension is loaded into it."""

from __future__ import annotations

import importlib

__all__: list[str] = []


def _refuse_subinterpreters() -> None:
    """Raise in any interpreter of the process but the main one.

    What the extension keeps, clients, classes and hooks, is the process's, and belongs to the
    interpreter that came first: objects of one must not get into another.

    Raises:
        ImportError: this is a subinterpreter.
    """
    # Private, but there is no public way to ask before Python 3.14.
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError(
                "sse_channel works in the main interpreter of a process only, and this is a "
                "subinterpreter; under mod_wsgi, set WSGIApplicationGroup %{GLOBAL}"
            )
        return


_refuse_subinterpreters()
