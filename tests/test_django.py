"""EventStreamResponse with Django's own request handling, on WSGI and ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
import re

import pytest
from asgiref.sync import sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.contrib.contenttypes.models import ContentType
from django.core.handlers.asgi import ASGIHandler
from django.db import connection, transaction
from django.test import AsyncRequestFactory, Client, RequestFactory

from sse_channel import SSEChannel
from sse_channel.django import EventStreamResponse
from urls import with_database

HEARTBEAT = b": heartbeat\n\n"


pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def get():
    """A GET through the whole of Django, as a WSGI server sees it."""
    client = Client()

    def get(path, **options):
        response = client.get(path, **options)
        assert response.status_code == 200
        return response

    return get


def test_headers(get, name):
    response = get(f"/stream/{name}/")
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in response.headers
    assert "Content-Encoding" not in response.headers
    response.close()


def test_headers_of_the_caller_win():
    response = EventStreamResponse(
        RequestFactory().get("/"),
        "x",
        headers={"Cache-Control": "no-store", "Access-Control-Allow-Origin": "*"},
        status=203,
    )
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.status_code == 203
    response.close()


def test_events_published_after_the_view_arrive_and_the_close_unlistens(get, channel, name):
    response = get(f"/stream/{name}/")
    assert len(channel.listeners) == 1
    channel.publish("x")
    chunks = iter(response)
    assert next(chunks).startswith(b"retry: 3000\nid: ")
    assert next(chunks).endswith(b"\ndata: x\n\n")
    assert next(chunks) == HEARTBEAT
    response.close()
    assert len(channel.listeners) == 0
    assert list(chunks) == []


@pytest.mark.parametrize(
    "how", ["Last-Event-ID", "last_event_id", "lastEventId", "header before url"]
)
def test_a_client_tells_where_it_goes_on(get, channel, name, how):
    ids = [channel.publish(str(number)) for number in range(3)]
    options = {}
    path = f"/stream/{name}/"
    if how == "Last-Event-ID":
        options["headers"] = {"Last-Event-ID": ids[0]}
    elif how == "header before url":
        options["headers"] = {"Last-Event-ID": ids[0]}
        path += f"?last_event_id={ids[2]}"
    else:
        path += f"?{how}={ids[0]}"
    response = get(path, **options)
    chunks = iter(response)
    assert next(chunks) == f"retry: 3000\nid: {ids[0]}\n\n".encode()
    assert re.findall(rb"^data: (.*)$", next(chunks), re.MULTILINE) == [b"1", b"2"]
    response.close()


@pytest.mark.parametrize("rubbish", ["x", "é", "\x00", "9" * 10_000, "1-0\r\nX: y"])
def test_rubbish_from_a_client_is_a_reset(get, name, rubbish):
    response = get(f"/stream/{name}/", data={"last_event_id": rubbish})
    assert b'event: stream-reset\ndata: {"reason":"unknown"}\n\n' in next(iter(response))
    response.close()


def test_a_head_request_gets_headers_and_no_stream(channel, name):
    response = Client().head(f"/stream/{name}/")
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert len(channel.listeners) == 0
    plain = EventStreamResponse(RequestFactory().head("/"), name)
    assert list(plain) == []


def test_gzip_middleware_holds_nothing_back(get, channel, name):
    response = get(f"/stream/{name}/", headers={"Accept-Encoding": "gzip, br"})
    channel.publish("x" * 1000)
    chunks = iter(response)
    next(chunks)
    assert b"data: xxx" in next(chunks)
    response.close()


def test_a_middleware_may_wrap_the_content(channel, name):
    response = EventStreamResponse(RequestFactory().get("/"), name)
    response.streaming_content = (chunk.upper() for chunk in response.streaming_content)
    assert next(iter(response)).startswith(b"RETRY: 3000\n")
    response.close()
    assert len(channel.listeners) == 0


def test_several_channels_by_object_and_by_name(name):
    one = SSEChannel(name + "a")
    response = EventStreamResponse(RequestFactory().get("/"), one, name + "b")
    chunks = iter(response)
    next(chunks)
    one.publish("1")
    SSEChannel(name + "b").publish("2")
    assert re.findall(rb"^data: (.*)$", next(chunks), re.MULTILINE) == [b"1", b"2"]
    response.close()


def test_what_cannot_be_a_channel_is_refused(name):
    request = RequestFactory().get("/")
    with pytest.raises(TypeError, match="at least one channel"):
        EventStreamResponse(request)
    with pytest.raises(TypeError, match="must be an SSEChannel or its name"):
        EventStreamResponse(request, 7)
    with pytest.raises(TypeError, match=r"first argument .* must be the request, not SSEChannel"):
        EventStreamResponse(SSEChannel(name))
    with pytest.raises(ValueError, match="private channel"):
        EventStreamResponse(request, name, SSEChannel())
    with pytest.raises(ValueError, match="heartbeat"):
        EventStreamResponse(request, name, heartbeat=0)
    assert len(SSEChannel(name).listeners) == 0


def test_no_database_connection_stays_open_while_a_stream_waits(get, name):
    response = get(f"/database/{name}/")
    assert connection.connection is not None
    chunks = iter(response)
    next(chunks)
    assert connection.connection is None, "the view's connection"
    assert re.fullmatch(rb'data: {"types":[0-9]+}\n\n', next(chunks))
    assert connection.connection is None, "the first payload's connection"
    assert next(chunks) == HEARTBEAT
    assert connection.connection is None
    response.close()


def test_inside_atomic_the_connection_is_left_alone(channel, name):
    with transaction.atomic():
        chunks = iter(with_database(RequestFactory().get("/"), name))
        next(chunks)
        assert next(chunks).startswith(b"data: ")
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    del chunks
    assert len(channel.listeners) == 0


# --- ASGI ---------------------------------------------------------------------------------


async def open_asgi(path, query=b""):
    """A request to the ASGI application; its start message and the communicator."""
    scope = AsyncRequestFactory()._base_scope(
        path=path, method="GET", query_string=query, headers=[(b"host", b"testserver")]
    )
    scope["headers"] = [(b"host", b"testserver")]
    communicator = ApplicationCommunicator(ASGIHandler(), scope)
    await communicator.send_input({"type": "http.request"})
    start = await communicator.receive_output(30)
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    return start, communicator


async def body(communicator):
    return (await communicator.receive_output(30))["body"]


def test_asgi_streams_and_a_disconnect_unlistens(channel, name):
    async def main():
        start, communicator = await open_asgi(f"/stream/{name}/")
        headers = {key.lower(): value for key, value in start["headers"]}
        assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        assert (await body(communicator)).startswith(b"retry: 3000\nid: ")
        channel.publish("x")
        assert (await body(communicator)).endswith(b"\ndata: x\n\n")
        assert await body(communicator) == HEARTBEAT
        assert len(channel.listeners) == 1
        await communicator.send_input({"type": "http.disconnect"})
        await communicator.wait(30)
        assert len(channel.listeners) == 0

    asyncio.run(main())


def test_asgi_keeps_neither_a_connection_nor_a_thread_while_it_waits(name):
    import threading

    opened = []

    def open_connections():
        return [each for each in opened if each.connection is not None]

    def remember(connection, **_):
        opened.append(connection)

    from django.db.backends.signals import connection_created

    async def main():
        before = threading.active_count()
        streams = []
        for _ in range(20):
            _, communicator = await open_asgi(f"/database/{name}/")
            await body(communicator)
            assert re.fullmatch(rb'data: {"types":[0-9]+}\n\n', await body(communicator))
            assert await body(communicator) == HEARTBEAT
            streams.append(communicator)
        assert len(opened) >= 20
        assert not open_connections()
        deadline = asyncio.get_running_loop().time() + 30
        while threading.active_count() > before + 1:
            assert asyncio.get_running_loop().time() < deadline, threading.enumerate()
            await asyncio.sleep(0.01)
        for communicator in streams:
            await communicator.send_input({"type": "http.disconnect"})
            await communicator.wait(30)
        assert len(SSEChannel(name).listeners) == 0

    connection_created.connect(remember)
    try:
        asyncio.run(main())
    finally:
        connection_created.disconnect(remember)


class AwaitableObject:
    async def __call__(self):
        return await sync_to_async(latest)()


def latest():
    return {"types": ContentType.objects.count()}


async def alatest():
    return {"types": await ContentType.objects.acount()}


class RestRequest:
    """As Django REST framework's: not Django's request, but it holds it."""

    def __init__(self, request):
        self._request = request

    def __getattr__(self, name):
        return getattr(self._request, name)


@pytest.mark.parametrize("wrap", [lambda request: request, RestRequest], ids=["django", "rest"])
@pytest.mark.parametrize(
    "initial",
    [latest, alatest, lambda: alatest(), AwaitableObject()],
    ids=["plain", "async", "lambda", "object"],
)
def test_asgi_first_payloads_of_every_kind_may_use_the_database(name, initial, wrap):
    async def main():
        request = wrap(AsyncRequestFactory().get("/"))
        response = EventStreamResponse(request, name, initial=initial)
        async with contextlib.aclosing(aiter(response)) as chunks:
            await anext(chunks)
            return await anext(chunks)

    assert re.fullmatch(rb'data: {"types":[0-9]+}\n\n', asyncio.run(main()))


def test_asgi_head_ends_at_once(name):
    response = EventStreamResponse(AsyncRequestFactory().head("/"), name)

    async def main():
        return [chunk async for chunk in response]

    assert asyncio.run(main()) == []
    assert len(SSEChannel(name).listeners) == 0


def test_each_stream_counts_once_against_the_limit_of_clients(script):
    script(
        """
import gc
import django
from django.conf import settings
settings.configure(SSE_CHANNEL={"MAX_CLIENTS": 2, "BUS": "memory://"}, SECRET_KEY="only for tests")
django.setup()
from django.test import RequestFactory
from sse_channel import SSEChannel, stats
from sse_channel.django import EventStreamResponse

def respond(*channels, method="GET"):
    request = RequestFactory().generic(method, "/")
    response = EventStreamResponse(request, *(channels or ("news",)))
    content = iter(response)
    return response, next(content, b"")

LATER = b"retry: 30000\\n\\n"
private = SSEChannel()
several, first = respond("news", "sport", "weather")
assert first != LATER
alone, first = respond(private)
assert first != LATER
full, first = respond()
assert (full.status_code, first) == (200, LATER)
assert stats()["offload"]["refused"] == {"full": 1, "server": 2}, stats()["offload"]
# Neither counts one that has no stream, nor one that could not be made.
assert respond(method="HEAD")[1] == b""
try:
    EventStreamResponse(RequestFactory().get("/"), "news", heartbeat=-1)
except ValueError:
    pass
# A place is free again when a response is closed, however it ended.
alone.close()
again, first = respond()
assert first != LATER
several.close()
again.close()
two = [respond(), respond()]
assert all(first != LATER for _, first in two)
assert respond()[1] == LATER
del two
# Or when nobody holds it. On Python 3.10 an error within Django's handling of connections does, in
# a cycle.
gc.collect()
assert respond()[1] != LATER
"""
    )


@pytest.mark.parametrize("raising", ["view", "middleware"])
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("error", ["ValueError", "PermissionDenied", "Http404"])
def test_a_stream_whose_request_is_answered_by_an_error_ends(script, raising, is_async, error):
    out = script(
        """
import asyncio, logging, sys
import django
from django.conf import settings
settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="only for tests", ALLOWED_HOSTS=["*"],
                   SSE_CHANNEL={"BUS": "memory://"}, MIDDLEWARE=["__main__.middleware"])
logging.disable()
django.setup()
from django.core.exceptions import PermissionDenied
from django.http import Http404
from django.test import AsyncClient, Client
from django.urls import path
from django.utils.decorators import sync_and_async_middleware
from sse_channel import stats
from sse_channel.django import EventStreamResponse

errors = {"ValueError": ValueError, "PermissionDenied": PermissionDenied, "Http404": Http404}
raising, is_async, error = sys.argv[1], sys.argv[2] == "True", errors[sys.argv[3]]
kept = []

def fail():
    # As Sentry does it, or a log that is written later.
    kept.append(error("on the way out"))
    raise kept[-1]

def respond(request):
    response = EventStreamResponse(request, "news")
    assert stats()["clients"]["stream"] == 1
    if raising == "view":
        fail()
    return response

async def arespond(request):
    return respond(request)

@sync_and_async_middleware
def middleware(get_response):
    if is_async:
        async def answer(request):
            response = await get_response(request)
            if raising == "middleware":
                fail()
            return response
    else:
        def answer(request):
            response = get_response(request)
            if raising == "middleware":
                fail()
            return response
    return answer

urlpatterns = [path("", arespond if is_async else respond)]
for _ in range(2):
    if is_async:
        asyncio.run(AsyncClient(raise_request_exception=False).get("/"))
    else:
        Client(raise_request_exception=False).get("/")
    assert sum(stats()["clients"].values()) == 0
print(len(kept))
""",
        raising,
        str(is_async),
        error,
        # Nothing to wait for: the stream is registered when it is made.
        SSE_CHANNEL_BUS="memory://",
    )
    assert out == "2\n"


def test_an_error_that_is_held_holds_no_place(script):
    out = script(
        """
import django
from django.conf import settings
settings.configure(SSE_CHANNEL={"PUBLISH_TIMEOUT": 0.2, "MAX_CLIENTS": 2})
django.setup()
from django.test import RequestFactory
from sse_channel import BusError
from sse_channel.django import EventStreamResponse

kept = []
for render in (None, str):
    for _ in range(3):
        try:
            EventStreamResponse(RequestFactory().get("/"), "news", render=render)
        except BusError as error:
            kept.append(error)
print(len(kept))
""",
        SSE_CHANNEL_BUS="redis://127.0.0.1:1/0",
    )
    assert out == "6\n"


def test_a_request_with_a_stream_is_closed_copied_and_pickled_as_ever(name):
    request = RequestFactory().get("/")
    closed = []
    request.close = lambda: closed.append(True)
    responses = [EventStreamResponse(request, name) for _ in range(2)]
    copied = copy.copy(request)
    request.close()
    assert closed == [True]
    assert [response._stream.closed for response in responses] == [True, True]
    copied.close()
    plain = RequestFactory().get("/")
    response = EventStreamResponse(plain, name)
    pickle.loads(pickle.dumps(vars(plain)["close"]))()
    assert not response._stream.closed
    plain.close()
    assert response._stream.closed
