"""The ASGI wrapper, where no stream is taken over."""

from __future__ import annotations

import asyncio

import pytest

from ports import HOST, free_port
from sse_channel import _sse_channel
from sse_channel.asgi import offload


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often the streams of this process would have been ended: others need them still."""
    ends: list[str] = []
    monkeypatch.setattr(_sse_channel, "end_streams", lambda wait, retry: ends.append("ended"))
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


def test_a_process_may_run_one_server_after_the_other(script):
    out = script(
        """
import asyncio, django, re, uvicorn
from django.conf import settings
settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="only for tests", ALLOWED_HOSTS=["*"],
                   SSE_CHANNEL={"BUS": "memory://"})
django.setup()
from django.core.asgi import get_asgi_application
from django.urls import path
from sse_channel import SSEChannel, stats
from sse_channel.asgi import offload
from sse_channel.django import EventStreamResponse

async def stream(request):
    return EventStreamResponse(request, "news")

urlpatterns = [path("", stream)]

async def serve():
    config = uvicorn.Config(offload(get_asgi_application()), port=0, log_level="warning")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    await reader.readuntil(b"retry: 3000\\n")
    assert stats()["offload"]["connections"] == 1
    SSEChannel("news").publish("hello")
    await reader.readuntil(b"data: hello\\n\\n")
    server.should_exit = True
    rest = await reader.read()
    assert re.search(rb"retry: \\d+\\n\\n\\r\\n0\\r\\n\\r\\n$", rest), rest
    writer.close()
    await serving
    assert stats()["offload"]["connections"] == 0

for _ in range(2):
    asyncio.run(serve())
print("served")
"""
    )
    assert out == "served\n"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_leaves_while_its_stream_is_opened_is_not_taken_over(script, loop, version):
    out = script(
        """
import asyncio, os, socket, sys, threading
import uvicorn
from sse_channel import SSEChannel, stats
from sse_channel.asgi import KEY, offload
from sse_channel.offload import Backlog, Refused

host, port, loop, version = sys.argv[1:]
begun, ended = threading.Event(), threading.Event()
told = []

class Opener:
    async def open(self):
        begun.set()
        while not exchange._cycle.disconnected:
            await asyncio.sleep(0)

async def application(scope, receive, send):
    global exchange
    exchange = scope[KEY]
    exchange.is_held = True
    stream = SSEChannel("news").stream()
    stream._set_opener(Opener())
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        await exchange.take_over(stream, Backlog("disconnect", 100))
        told.append("taken over")
    except BaseException as error:
        told.append(repr(error))
    stream.close()
    ended.set()

config = uvicorn.Config(
    offload(application), host=host, port=int(port), loop=loop, http="h11", lifespan="off",
    log_level="critical",
)
server = uvicorn.Server(config)
thread = threading.Thread(target=server.run)
thread.start()
while not server.started:
    pass
client = socket.create_connection((host, int(port)))
client.sendall(f"GET / HTTP/{version}\\r\\nHost: news\\r\\n\\r\\n".encode())
assert begun.wait(60)
client.close()
assert ended.wait(60)
server.should_exit = True
thread.join()
print(*told, stats()["offload"]["connections"])
""",
        HOST,
        str(free_port()),
        loop,
        version,
        SSE_CHANNEL_BUS="memory://",
    )
    assert out == "Refused('ended') 0\n"


@pytest.mark.parametrize("wrapped", ["offloaded", "plain"])
def test_a_stream_that_fails_while_it_is_opened_is_not_held_by_its_error(script, wrapped):
    out = script(
        """
import asyncio, django, logging, sys, uvicorn
from django.conf import settings
settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="only for tests", ALLOWED_HOSTS=["*"],
                   SSE_CHANNEL={"BUS": "memory://"}, LOGGING_CONFIG=None)
logging.disable()
django.setup()
from django.core.asgi import get_asgi_application
from django.urls import path
from sse_channel import stats
from sse_channel.asgi import offload
from sse_channel.django import EventStreamResponse

kept = []

def initial():
    # As Sentry does it, or a log that is written later.
    kept.append(ValueError("no such article"))
    raise kept[-1]

async def stream(request):
    return EventStreamResponse(request, "news", initial=initial)

urlpatterns = [path("", stream)]
application = get_asgi_application()
if sys.argv[1] == "offloaded":
    application = offload(application)

async def main():
    config = uvicorn.Config(application, port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    for _ in range(3):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        assert b"data:" not in await reader.read()
        writer.close()
    while sum(stats()["clients"].values()):
        await asyncio.sleep(0.01)
    server.should_exit = True
    await serving

asyncio.run(asyncio.wait_for(main(), 60))
print(len(kept))
""",
        wrapped,
    )
    assert out == "3\n"
