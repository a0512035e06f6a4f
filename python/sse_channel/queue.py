"""The queue that `SSEChannel.listen` gives."""

from __future__ import annotations

import asyncio
import contextlib
import time
from numbers import Real
from queue import Empty
from typing import TYPE_CHECKING, Any

from . import _sse_channel
from .config import shown
from .waiting import wait

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ClientQueue"]

#: Seconds: nobody sees the end of a longer wait, and a loop's clock may have no such time.
_FOR_EVER = 1e9


class ClientQueue(_sse_channel.Queue):
    """What one listener has not read yet: the reading side of `queue.Queue`, for every caller.

    The same queue can be read by threads, greenlets and asyncio tasks; a message goes to exactly
    one of them, and one that gives up (a timeout, a cancellation, a kill) leaves it in the queue.

    After its close what is left is delivered, then `ChannelClosed` is raised: the first time at
    once, later after the `timeout`, so that an old loop that takes it for `queue.Empty` and sends
    a heartbeat does not spin.

    Made by `SSEChannel.listen`, not by hand.
    """

    __slots__ = ()

    async def aget(self, timeout: float | None = None) -> Any:
        """Take the oldest message, waiting on the running asyncio loop.

        Cancelled or timed out, it leaves the message in the queue.

        Args:
            timeout: seconds to wait; None waits for ever.

        Raises:
            queue.Empty: nothing came within `timeout`.
            ChannelClosed: the queue is closed and nothing is left in it.
            ValueError: a negative `timeout`.
        """
        if timeout is not None and not isinstance(timeout, Real):
            raise TypeError(
                f"'timeout' must be a number of seconds or None, not {type(timeout).__name__}"
            )
        if timeout is not None and not timeout >= 0:
            raise ValueError(
                f"'timeout' must be a non-negative number of seconds, not {shown(timeout)}"
            )
        if timeout is not None and timeout > _FOR_EVER:
            timeout = None
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if not self.empty():
                # Empty all the same, if another reader was quicker.
                with contextlib.suppress(Empty):
                    return self.get_nowait()
            if self.closed:
                # As `get` does: a loop that knows only Empty must not spin.
                if self.empty() and self._tell_closed() and timeout:
                    await asyncio.sleep(timeout)
                return self.get_nowait()
            await wait(self, timeout)
            if deadline is not None:
                timeout = max(0.0, deadline - time.monotonic())
                if not timeout:
                    return self.get_nowait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.aget()
        except _sse_channel.ChannelClosed:
            raise StopAsyncIteration from None
