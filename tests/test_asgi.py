"""The ASGI wrapper, where no stream is taken over."""

from __future__ import annotations

import asyncio

import pytest

from sse_channel import _sse_channel
from sse_channel.asgi import offload


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often the streams of this process would have been ended: others need them still."""
    ends: list[str] = []
    monkeypatch.setattr(_sse_channel, "end_streams", lambda wait: ends.append("ended"))
    return ends


def lifespan(application) -> list[dict]:
    """What is sent when a server starts and ends an application."""
    sent: list[dict] = []
    received = asyncio.Queue()

    async def send(message: dict) -> None:
        sent.append(message)
        if message["type"] == "lifespan.startup.complete":
            received.put_nowait({"type": "lifespan.shutdown"})

    async def run() -> None:
        received.put_nowait({"type": "lifespan.startup"})
        await asyncio.wait_for(offload(application)({"type": "lifespan"}, received.get, send), 30)

    asyncio.run(run())
    return sent


COMPLETE = [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]


def test_the_lifespan_is_answered_for_an_application_that_knows_none(ends):
    async def application(scope, receive, send):
        raise ValueError("only HTTP")

    assert lifespan(application) == COMPLETE
    assert ends == ["ended"]


def test_the_lifespan_of_an_application_is_its_own(ends):
    async def application(scope, receive, send):
        for answer in COMPLETE:
            await receive()
            await send(answer)

    assert lifespan(application) == COMPLETE
    assert ends == ["ended"]


def test_an_application_that_fails_to_start_is_not_taken_for_one_without_a_lifespan():
    async def application(scope, receive, send):
        await receive()
        raise RuntimeError("the database is away")

    with pytest.raises(RuntimeError, match="the database is away"):
        lifespan(application)
