"""A bus of a test's own, around a block, a function or a whole `TestCase`."""

from __future__ import annotations

import functools
import inspect
import unittest
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

from ..config import overridden

__all__ = ["MemoryBus"]

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


class MemoryBus:
    """What `memory_bus` gives."""

    def __init__(self) -> None:
        # Those that are entered, the newest last: a decorated function may call itself.
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        bus = overridden(bus="memory://")
        bus.__enter__()
        self._entered.append(bus)

    def __exit__(self, *exc_info: Any) -> None:
        self._entered.pop().__exit__(*exc_info)

    def __call__(self, decorated: _Decorated) -> _Decorated:
        """Decorate a function, or a `TestCase`.

        Raises:
            TypeError: an asynchronous generator, any other class, or what cannot be called.
        """
        if isinstance(decorated, type):
            if not issubclass(decorated, unittest.TestCase):
                raise TypeError(
                    f"memory_bus() decorates functions and TestCases, not {decorated.__name__}: "
                    "decorate its methods, or use the fixture sse_memory_bus"
                )
            # Around all that belongs to a test; a subclass has it too.
            for name in ("run", "debug"):
                setattr(decorated, name, self._wrapped(getattr(decorated, name)))
            return cast(_Decorated, decorated)
        return cast(_Decorated, self._wrapped(decorated))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with the bus from its first step to its last."""
        if not callable(function):
            raise TypeError(f"memory_bus() decorates functions, not {type(function).__name__}")
        if inspect.isasyncgenfunction(function):
            # What its caller sends or throws into it could not be passed on.
            raise TypeError(
                f"memory_bus() cannot decorate the asynchronous generator {function.__name__}; "
                "write `with memory_bus():` in it"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return awaited
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generated(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
                with self:
                    return (yield from function(*args, **kwargs))

            return generated

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with self:
                result = function(*args, **kwargs)
            if inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()
                raise TypeError(
                    f"memory_bus() decorates a function that gives a coroutine; make "
                    f"{getattr(function, '__qualname__', function)} an `async def`"
                )
            return result

        return called
