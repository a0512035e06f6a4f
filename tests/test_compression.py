"""Compressed streams: which clients get one, and that it can be read as far as it came."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.http import HttpRequest
from django.middleware.gzip import GZipMiddleware
from django.test import RequestFactory

from handover import take
from servers import OFFLOADING_KINDS, Server, open_stream, open_streams, until
from sse_channel import SSEChannel, configure
from sse_channel.compression import accepts_gzip
from sse_channel.django import EventStreamResponse
from sse_channel.offload import Refused, check_coding

PATH = "/news/events/"
WORDS = "some words that come again and again, "
HEARTBEAT = b": heartbeat\n\n"


class Reader:
    """Reads a gzip stream as far as it came."""

    def __init__(self) -> None:
        self._gzip = zlib.decompressobj(zlib.MAX_WBITS + 16)

    def __call__(self, data: bytes) -> bytes:
        return self._gzip.decompress(data)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (None, False),
        ("", False),
        ("gzip", True),
        ("GZip", True),
        ("x-gzip", True),
        ("gzip, deflate, br, zstd", True),
        ("br,gzip ; q=0.5", True),
        ("gzip;Q=0.001", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000", False),
        ("gzip;q=0, *", False),
        ("*", True),
        ("*;q=0", False),
        ("*;q=0, gzip;q=0.1", True),
        ("br", False),
        ("identity", False),
        ("identity, gzip;q=0.9", False),
        ("identity;q=0.5, gzip;q=0.5", True),
        ("identity;q=0, *;q=0.1", True),
        ("identity;q=0", False),
        # What cannot be read is not there.
        ("gzip;q=2", False),
        ("gzip;q=0.1234", False),
        ("gzip;q=", False),
        ("gzip;level=9", False),
        ("gzip;q=1;q=0", False),
        (";;,q=1,,", False),
        (";q=1, gzip", True),
        ("gzip\x00", False),
        ("gzip" * 10_000, False),
    ],
)
def test_clients_say_what_they_accept(header: str | None, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


# --- The response ----------------------------------------------------------------------------


def request(accept: str | None = "gzip, br", method: str = "GET") -> HttpRequest:
    given = {} if accept is None else {"HTTP_ACCEPT_ENCODING": accept}
    return RequestFactory().generic(method, "/", **given)


@pytest.fixture
def compressing() -> Iterator[None]:
    """The option is on."""
    configure(compress=True)
    yield
    configure(compress=False)


@pytest.mark.parametrize(
    ("option", "argument", "accept", "coding", "vary"),
    [
        (False, None, "gzip", None, None),
        (False, True, "gzip", "gzip", "Accept-Encoding"),
        (False, True, None, None, "Accept-Encoding"),
        (True, None, "gzip", "gzip", "Accept-Encoding"),
        (True, None, "br, gzip;q=0", None, "Accept-Encoding"),
        (True, False, "gzip", None, None),
    ],
)
def test_the_option_and_its_override(option, argument, accept, coding, vary, name) -> None:
    configure(compress=option)
    try:
        response = EventStreamResponse(request(accept), name, compress=argument)
    finally:
        configure(compress=False)
    assert response.headers.get("Content-Encoding") == coding
    assert response.headers.get("Vary") == vary
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    first = next(iter(response))
    assert (Reader()(first) if coding else first).startswith(b"retry: 3000\nid: ")
    response.close()


@pytest.mark.usefixtures("compressing")
def test_headers_of_the_caller_stay(name) -> None:
    vary = EventStreamResponse(request(), name, headers={"Vary": "Cookie"})
    assert vary.headers["Vary"] == "Cookie, Accept-Encoding"
    own = EventStreamResponse(request(), name, headers={"Content-Encoding": "identity"})
    assert own.headers["Content-Encoding"] == "identity"
    assert next(iter(own)).startswith(b"retry: ")
    vary.close()
    own.close()


@pytest.mark.usefixtures("compressing")
def test_a_head_request_is_told_of_the_coding(name) -> None:
    response = EventStreamResponse(request(method="HEAD"), name)
    assert response.headers["Content-Encoding"] == "gzip"
    assert list(response) == []


@pytest.mark.usefixtures("compressing")
def test_a_client_without_a_place_is_told_in_plain_text(name) -> None:
    configure(max_clients=1)
    try:
        one = EventStreamResponse(request(), name)
        other = EventStreamResponse(request(), name)
    finally:
        configure(max_clients=0)
    assert "Content-Encoding" not in other.headers
    assert list(other) == [b"retry: 30000\n\n"]
    one.close()


@pytest.mark.usefixtures("compressing")
def test_gzip_middleware_does_not_compress_it_again(channel, name) -> None:
    response = GZipMiddleware(lambda request: EventStreamResponse(request, name))(request())
    assert response.headers["Content-Encoding"] == "gzip"
    assert response.headers["Vary"] == "Accept-Encoding"
    read, chunks = Reader(), iter(response)
    assert read(next(chunks)).startswith(b"retry: ")
    channel.publish(WORDS * 20)
    assert read(next(chunks)).endswith(f"\ndata: {WORDS * 20}\n\n".encode())
    response.close()


def test_what_is_rendered_once_is_compressed_once(channel, name) -> None:
    responses = [
        EventStreamResponse(request(accept), name, render=str.upper, key="loud", compress=True)
        for accept in ("gzip", "gzip", None)
    ]
    chunks = [iter(response) for response in responses]
    firsts = [next(each) for each in chunks]
    channel.publish(WORDS * 20)
    one, other, plain = [next(each) for each in chunks]
    assert one == other
    read = Reader()
    assert read(firsts[0]).startswith(b"retry: ")
    assert read(one) == plain
    assert plain.endswith(f"data: {WORDS.upper() * 20}\n\n".encode())
    for response in responses:
        response.close()


def test_what_is_no_bool_is_refused(name, monkeypatch) -> None:
    with pytest.raises(TypeError, match="compress must be True, False or None, not str"):
        EventStreamResponse(request(), name, compress="gzip")
    with pytest.raises(TypeError, match=r"configure\(compress=...\) must be True or False"):
        configure(compress=1)


# --- Streams that a server iterates ----------------------------------------------------------


def steps_of(stream: Any, is_async: bool) -> Iterator[bytes]:
    """What the stream gives, step by step, by the one way or the other."""
    if not is_async:
        yield from stream
        return
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        steps = aiter(stream)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield loop.run_until_complete(anext(steps))


@pytest.mark.parametrize("is_async", [False, True])
def test_each_step_can_be_read_at_once(channel, is_async) -> None:
    stream = channel.stream(initial="first", heartbeat=0.05)
    stream._compress()
    read, steps = Reader(), steps_of(stream, is_async)
    assert read(next(steps)).startswith(b"retry: 3000\nid: ")
    assert read(next(steps)) == b"data: first\n\n"
    assert read(next(steps)) == HEARTBEAT
    channel.publish("short")
    assert read(next(steps)).endswith(b"\ndata: short\n\n")
    text = WORDS * 100
    sent = 0
    for number in range(3):
        channel.publish(f"{text}{number}")
    while sent < 3:
        step = next(steps)
        assert len(step) < len(text) / 10
        sent += read(step).count(b"\ndata: some words")
    stream.close()
    assert list(steps) == []


def test_a_stream_that_ends_is_a_whole_gzip_file(script) -> None:
    script(
        """
import asyncio, gzip
from sse_channel import SSEChannel, _sse_channel

def compressed(channel, **options):
    stream = channel.stream(**options)
    stream._compress()
    return stream

async def asynchronous(stream):
    return [step async for step in stream]

channel = SSEChannel("x")
plain, one, other = channel.stream(), compressed(channel), compressed(channel, initial="first")
for number in range(20):
    channel.publish(f"number {number} " * number)
disconnected = SSEChannel("y", capacity=1, overflow="disconnect")
short = compressed(disconnected)
disconnected.publish("1")
disconnected.publish("2")
_sse_channel.end_streams(wait=False, retry=3000)
late = compressed(channel)

expected = b"".join(plain).rpartition(b"retry: ")[0]
text = gzip.decompress(b"".join(one))
assert text.rpartition(b"retry: ")[0] == expected, text
text = gzip.decompress(b"".join(asyncio.run(asynchronous(other))))
assert text.replace(b"data: first\\n\\n", b"").rpartition(b"retry: ")[0] == expected, text
assert gzip.decompress(b"".join(short)).startswith(b"retry: ")
assert gzip.decompress(b"".join(late)).startswith(b"retry: ")
figures = channel.stats()
assert figures["delivered"] == 60
assert figures["bytes"] < 3 * len(expected), figures
""",
        SSE_CHANNEL_BUS="memory://",
    )


def test_bytes_are_those_of_the_wire(channel) -> None:
    stream = channel.stream()
    stream._compress()
    steps = iter(stream)
    next(steps)
    channel.publish(WORDS * 100)
    step = next(steps)
    assert channel.stats()["bytes"] == len(step) < 400
    stream.close()


@pytest.mark.parametrize(
    ("compressed", "codings", "is_refused"),
    [
        (False, [], False),
        (True, ["gzip"], False),
        (True, ["GZIP"], False),
        (False, ["gzip"], True),
        (False, ["identity"], True),
        (True, [], True),
        (True, ["br"], True),
        (True, ["gzip, br"], True),
        (True, ["gzip", "gzip"], True),
    ],
)
def test_only_the_streams_own_coding_may_leave_python(
    channel, compressed: bool, codings: list[str], is_refused: bool
) -> None:
    """Anything else was put around it by a middleware, of Django's or WSGI's."""
    with channel.stream() as stream:
        if compressed:
            stream._compress()
        with pytest.raises(Refused) if is_refused else contextlib.nullcontext():
            check_coding(stream, codings)


# --- Streams that left Python ----------------------------------------------------------------


@pytest.fixture
def take_over() -> Iterator[Callable[..., socket.socket]]:
    """Hand one end of a connection over, with a compressed stream of a channel; the other end."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def open_peer(channel: SSEChannel, last_event_id=None, **options: Any) -> socket.socket:
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(listener.getsockname())
            client.settimeout(30)
            server, _ = listener.accept()
            with server:
                stream = channel.stream(last_event_id=last_event_id, heartbeat=None)
                stream._compress()
                assert take(stream, server.fileno(), **options)
            return client

        yield open_peer


def received(peer: socket.socket, read: Reader, end: bytes) -> bytes:
    """What can be read until `end` has come."""
    text = b""
    while not text.endswith(end):
        data = peer.recv(1 << 16)
        assert data, text[-1000:]
        text += read(data)
    return text


def test_a_body_that_was_handed_over_begins_with_what_the_stream_had(channel, take_over) -> None:
    event_id = channel.publish("before")
    peer, read = take_over(channel, body=f"data: {WORDS * 9}\n\n".encode()), Reader()
    text = received(peer, read, b" \n\n")
    assert text == f"retry: 3000\nid: {event_id}\n\ndata: {WORDS * 9}\n\n".encode()


def test_a_client_that_reads_late_gets_all_of_it(channel, take_over) -> None:
    text = "".join(map(str, range(3000)))
    peer, read = take_over(channel, bytes=1 << 30), Reader()
    for number in range(400):
        channel.publish(f"{text}{number}")
    # Far more than the kernel keeps for it.
    assert channel.stats()["delivered"] < 400
    came = received(peer, read, b"399\n\n")
    assert came.count(b"\ndata: 01234") == 400


def test_the_backlog_is_bounded_by_the_bytes_of_the_wire(channel, take_over) -> None:
    """Of text that would pass the limit ten times nothing is lost; of noise, soon."""
    peer = take_over(channel, bytes=400_000)
    for _ in range(100):
        channel.publish(WORDS * 1000)
    until(lambda: channel.stats()["received"] == 100, "all are passed on")
    assert channel.stats()["dropped"] == 0
    received(peer, Reader(), b"\n\n")

    noise = zlib.compress(WORDS.encode()).hex()
    noisy = "".join(f"{zlib.crc32(f'{noise}{n}'.encode()):x}" for n in range(5000))
    for number in range(300):
        channel.publish(f"{number}{noisy}")
    until(lambda: channel.stats()["disconnected"]["overflow"] == 1, "it was disconnected")


def test_a_client_whose_events_were_dropped_can_read_the_others(channel, take_over) -> None:
    text = "".join(map(str, range(3000)))
    peer, read = take_over(channel, policy="drop_oldest", bytes=100_000), Reader()
    for number in range(2000):
        channel.publish(f"{text} {number}")
    until(lambda: channel.stats()["dropped"] > 0, "some are dropped")
    channel.publish("the last one")
    came = received(peer, read, b"\ndata: the last one\n\n")
    numbers = [int(line.rpartition(b" ")[2]) for line in came.split(b"\n") if b"data: 0" in line]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + channel.stats()["dropped"] == 2000


def test_the_end_fits_whatever_a_slow_client_was_given(script) -> None:
    """Its checksum is of what was sent, and of what waits when the end begins."""
    script(
        """
import socket, zlib
from handover import take
from sse_channel import SSEChannel, _sse_channel

channel = SSEChannel("x")
channel.publish("an id to come back with")
missed = channel.publish("another")
for number in range(50):
    channel.publish(f"missed {number}")
text = "".join(map(str, range(3000)))
peers = {}
for policy, limit in [("disconnect", 1 << 30), ("drop_oldest", 50_000), ("drop_newest", 50_000)]:
    for last_event_id in (None, missed):
        here, there = socket.socketpair()
        with there:
            stream = channel.stream(heartbeat=None, last_event_id=last_event_id)
            stream._compress()
            body = b"data: first\\n\\n"
            assert take(stream, there.fileno(), body=body, policy=policy, bytes=limit)
        peers[policy, last_event_id] = here
for number in range(300):
    channel.publish(f"{text} {number}")
for here in peers.values():
    assert here.recv(1000, socket.MSG_PEEK)
_sse_channel.end_streams(wait=False, retry=3000)
for (policy, last_event_id), here in peers.items():
    gzip, read = zlib.decompressobj(31), b""
    with here:
        while data := here.recv(1 << 18):
            read += gzip.decompress(data)
    assert gzip.eof and not gzip.unused_data, policy
    assert read.count(b"missed ") == (50 if last_event_id else 0), policy
    count = read.count(b"\\ndata: 0123")
    if policy == "disconnect":
        assert count == 300, count
    else:
        assert 0 < count < 300, (policy, count)
""",
        SSE_CHANNEL_BUS="memory://",
    )


def test_a_client_that_comes_back_reads_history(channel, take_over) -> None:
    """More than a connection is given at once."""
    first, *_ = [channel.publish(f"{WORDS}{number}") for number in range(300)]
    peer, read = take_over(channel, last_event_id=first), Reader()
    came = received(peer, read, b"again, 299\n\n")
    assert came.count(b"\ndata: ") == 299
    channel.publish("live")
    assert received(peer, read, b"\n\n").endswith(b"\ndata: live\n\n")


# --- Real servers ----------------------------------------------------------------------------

#: Servers by their kind, and whether streams leave Python.
KINDS = [
    *itertools.product(OFFLOADING_KINDS, [True]),
    *itertools.product(["gunicorn-gevent", "uvicorn-uvloop"], [False]),
]


@pytest.mark.parametrize(("kind", "offload"), KINDS)
def test_each_client_gets_what_it_takes(kind: str, offload: bool, tmp_path: Path) -> None:
    """Compressed and plain, each event at once; who comes back; and the body's end."""
    summary = "It rains, and rains, and then it rains again. " * 6
    with (
        Server(kind, tmp_path, compress=True, offload=offload) as server,
        open_streams(server, PATH, 3, Accept_Encoding="br, gzip") as zipped,
        open_stream(server, PATH) as plain,
    ):
        (figures,) = server.figures().values()
        assert figures["clients"]["socket" if offload else "stream"] == 4
        for stream in zipped:
            assert stream.headers["content-encoding"] == "gzip"
            assert stream.headers["vary"] == "Accept-Encoding"
        assert "content-encoding" not in plain.headers
        assert plain.headers["vary"] == "Accept-Encoding"
        streams = [*zipped, plain]
        for number in range(5):
            # The next is not published before this one is read everywhere.
            article = server.publish(f"Article {number}", summary=summary)
            until(
                lambda n=number: all(len(stream.events) == n + 1 for stream in streams),
                "the article in each stream",
            )
            assert all(stream.events[-1].json() == article for stream in streams)
        assert {tuple(stream.events) for stream in streams} == {tuple(plain.events)}
        assert all(stream.size < plain.size / 1.5 for stream in zipped)
        first = plain.events[0].last_event_id
        with open_stream(server, PATH, Accept_Encoding="gzip", Last_Event_ID=first) as back:
            until(lambda: len(back.events) == 4, "what it missed")
            assert back.events == plain.events[1:]
            assert back.gzip is not None
        server.master.terminate()
        for stream in streams:
            until(lambda s=stream: s.is_ended, "its end")
        for stream in zipped:
            assert stream.gzip.eof
            assert not stream.gzip.unused_data
        server.master.wait(30)
        assert "Traceback" not in server.output()
