"""Streams: byte-exact frames, heartbeats, the opening, and every way to end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import threading
import time

import pytest

from sse_channel import Event, EventStream, SSEChannel

HEARTBEAT = b": heartbeat\n\n"


def frames(chunk: bytes) -> list[bytes]:
    assert chunk.endswith(b"\n\n"), "a step ends with a whole frame"
    return [frame + b"\n\n" for frame in chunk.split(b"\n\n")[:-1]]


def test_the_opening_carries_retry_and_the_cursor_and_no_data(channel):
    newest = channel.publish("before")
    with channel.stream() as stream:
        assert next(stream) == f"retry: 3000\nid: {newest}\n\n".encode()


def test_a_client_that_breaks_off_before_its_first_event_resumes(channel):
    with channel.stream() as stream:
        cursor = re.search(rb"^id: (.*)$", next(stream), re.MULTILINE)[1].decode()
    channel.publish("missed")
    with channel.stream(last_event_id=cursor) as stream:
        assert next(stream) == f"retry: 3000\nid: {cursor}\n\n".encode()
        assert next(stream).endswith(b"\ndata: missed\n\n")


@pytest.mark.parametrize(
    ("published", "wire"),
    [
        ({"a": [1, "ü"]}, 'data: {"a":[1,"ü"]}\n\n'),
        ({"lines": "a\nb\r"}, 'data: {"lines":"a\\nb\\r"}\n\n'),
        ("a\nb\rc\r\nd", "data: a\ndata: b\ndata: c\ndata: d\n\n"),
        ("", "data: \n\n"),
        (" leading", "data:  leading\n\n"),
        ("trailing\n\n", "data: trailing\ndata: \ndata: \n\n"),
        ("a\u2028b\x85c\x0bd", "data: a\u2028b\x85c\x0bd\n\n"),
        ("\ufeffx", "data: \ufeffx\n\n"),
        (None, "data: null\n\n"),
        (
            Event("d", event="e", retry=1, comment="c\rc2"),
            ": c\n: c2\nevent: e\nretry: 1\ndata: d\n\n",
        ),
        (Event(retry=0), "retry: 0\n\n"),
        (Event(comment=""), ": \n\n"),
    ],
)
def test_frames_are_byte_exact(channel, published, wire):
    with channel.stream() as stream:
        next(stream)
        event_id = channel.publish(published)
        assert next(stream) == f"id: {event_id}\n{wire}".encode()


def test_frames_that_wait_come_in_one_step_and_a_long_backlog_in_several(channel):
    with channel.stream() as stream:
        next(stream)
        ids = [channel.publish(str(number)) for number in range(3)]
        expected = [f"id: {ids[n]}\ndata: {n}\n\n".encode() for n in range(3)]
        assert frames(next(stream)) == expected
        for _ in range(20):
            channel.publish("x" * 10_000)
        steps = []
        while sum(map(len, steps)) < 20:
            steps.append(frames(next(stream)))
        assert len(steps) > 1
        assert all(sum(map(len, step)) < 100_000 for step in steps)


def test_heartbeats_come_only_when_idle(channel):
    with channel.stream(heartbeat=0.1) as stream:
        next(stream)
        assert [next(stream) for _ in range(3)] == [HEARTBEAT] * 3
        channel.publish("x")
        assert next(stream) != HEARTBEAT
        start = time.monotonic()
        assert next(stream) == HEARTBEAT
        assert time.monotonic() - start >= 0.1


def test_without_heartbeat_a_stream_waits_for_an_event(channel):
    with channel.stream(heartbeat=None) as stream:
        next(stream)
        threading.Timer(0.2, channel.publish, ["x"]).start()
        assert next(stream).endswith(b"\ndata: x\n\n")


@pytest.mark.parametrize("heartbeat", [0, -1, float("nan")])
def test_a_heartbeat_that_cannot_be_is_refused(channel, heartbeat):
    with pytest.raises(ValueError, match="'heartbeat' must be"):
        channel.stream(heartbeat=heartbeat)
    with pytest.raises(TypeError, match="'heartbeat' must be a number of seconds or None"):
        channel.stream(heartbeat="5")
    assert len(channel.listeners) == 0


def test_the_first_payload_comes_after_the_opening_and_before_what_is_live(channel):
    calls = []

    def initial():
        calls.append(1)
        channel.publish("meanwhile")
        return {"first": 1}

    with channel.stream(initial=initial) as stream:
        assert calls == []
        next(stream)
        assert next(stream) == b'data: {"first":1}\n\n'
        assert next(stream).endswith(b"\ndata: meanwhile\n\n")
    assert calls == [1]


@pytest.mark.parametrize(
    ("initial", "wire"),
    [
        ({"a": 1}, b'data: {"a":1}\n\n'),
        ("text", b"data: text\n\n"),
        (lambda: Event("d", event="e"), b"event: e\ndata: d\n\n"),
    ],
)
def test_a_first_payload_is_a_message_or_makes_one(channel, initial, wire):
    with channel.stream(initial=initial) as stream:
        next(stream)
        assert next(stream) == wire


def test_no_first_payload_for_none_and_for_a_client_that_resumes(channel):
    newest = channel.publish("x")
    for options in ({"initial": lambda: None}, {"initial": {"a": 1}, "last_event_id": newest}):
        with channel.stream(heartbeat=0.01, **options) as stream:
            next(stream)
            assert next(stream) == HEARTBEAT
    with channel.stream(initial={"a": 1}, last_event_id="rubbish") as stream:
        assert b"stream-reset" in next(stream)
        assert next(stream) == b'data: {"a":1}\n\n'


@pytest.mark.parametrize(
    ("initial", "error"),
    [
        (lambda: 1 / 0, ZeroDivisionError),
        (lambda: object(), TypeError),
        (lambda: "\ud800", ValueError),
        (lambda: next(iter([])), RuntimeError),
    ],
)
def test_a_first_payload_that_fails_ends_the_stream(channel, initial, error):
    stream = channel.stream(initial=initial)
    next(stream)
    with pytest.raises(error):
        next(stream)
    assert list(stream) == []
    assert len(channel.listeners) == 0

    async def main():
        stream = channel.stream(initial=initial)
        await stream.__anext__()
        with pytest.raises(error):
            await stream.__anext__()
        assert [chunk async for chunk in stream] == []
        assert len(channel.listeners) == 0

    asyncio.run(main())


def test_a_first_payload_that_cannot_be_sent_is_told_at_once(channel):
    for initial, error in ((object(), TypeError), ("\ud800", ValueError)):
        with pytest.raises(error):
            channel.stream(initial=initial)
    assert len(channel.listeners) == 0


def test_a_client_is_told_of_a_gap_once(name):
    """The cursor is past what is lost, so that breaking off and coming back is no gap again."""
    channel = SSEChannel(name, history=2)
    old = channel.publish("0")
    for text in "123":
        channel.publish(text)
    with channel.stream(last_event_id=old) as stream:
        opening = next(stream)
    assert b"stream-reset" in opening
    cursor = re.search(rb"^id: (.*)$", opening, re.MULTILINE)[1].decode()
    with channel.stream(last_event_id=cursor) as stream:
        assert b"stream-reset" not in next(stream)
        assert re.findall(rb"^data: (.)$", next(stream), re.MULTILINE) == [b"2", b"3"]


def test_an_asynchronous_first_payload_of_a_synchronous_stream_says_what_to_do(channel):
    async def initial():
        raise AssertionError("nobody can await it")

    stream = channel.stream(initial=initial)
    next(stream)
    with pytest.raises(TypeError, match="make initial a plain function"):
        next(stream)


def close(stream):
    stream.close()


def leave_with(stream):
    with stream:
        pass


def leave_with_error(stream):
    with contextlib.suppress(ZeroDivisionError), stream:
        raise ZeroDivisionError


@pytest.mark.parametrize("end", [close, leave_with, leave_with_error])
def test_a_closed_stream_is_over_and_no_longer_listens(channel, end):
    stream = channel.stream()
    next(stream)
    channel.publish("never sent")
    assert stream in channel.listeners
    end(stream)
    end(stream)
    assert len(channel.listeners) == 0
    assert list(stream) == []
    assert channel.stats()["disconnected"]["closed"] == 1


def test_a_stream_that_nobody_holds_no_longer_listens(channel):
    stream = channel.stream()
    next(stream)
    del stream
    gc.collect()
    assert len(channel.listeners) == 0


def test_a_generator_around_it_that_is_closed_unlistens(channel):
    def view():
        yield from channel.stream()

    generator = view()
    next(generator)
    assert len(channel.listeners) == 1
    generator.close()
    assert len(channel.listeners) == 0


def test_a_close_from_another_thread_ends_a_waiting_step(channel):
    stream = channel.stream(heartbeat=None)
    next(stream)
    threading.Timer(0.1, stream.close).start()
    assert list(stream) == []


def test_unlisten_sends_what_is_left_and_ends(channel):
    stream = channel.stream()
    next(stream)
    channel.publish("left")
    channel.unlisten(stream)
    assert [chunk.split(b"\n")[1] for chunk in stream] == [b"data: left"]


def test_an_overflow_that_disconnects_ends_after_what_is_left(name):
    channel = SSEChannel(name, capacity=2, overflow="disconnect")
    stream = channel.stream()
    opening = next(stream)
    for number in range(3):
        channel.publish(str(number))
    rest = b"".join(stream)
    assert re.findall(rb"data: (.)", rest) == [b"0", b"1"]
    cursor = re.findall(rb"^id: (.*)$", opening + rest, re.MULTILINE)[-1].decode()
    with channel.stream(last_event_id=cursor) as again:
        next(again)
        assert next(again).endswith(b"\ndata: 2\n\n")


def test_several_channels_share_a_stream_and_its_order(name):
    from sse_channel.stream import open_stream

    one, two, other = (SSEChannel(name + suffix) for suffix in "abc")

    def stream(last_event_id=None):
        return open_stream(
            [one._core, two._core, one._core],
            capacity=10,
            overflow="drop_oldest",
            last_event_id=last_event_id,
            heartbeat=0.05,
            initial=None,
        )

    with stream() as first:
        cursor = re.search(rb"id: (.*)", next(first))[1].decode()
        for target, text in ((one, "1"), (two, "2"), (other, "x"), (one, "3")):
            target.publish(text)
        live = next(first)
        assert re.findall(rb"data: (.*)", live) == [b"1", b"2", b"3"]
    assert len(one.listeners) == len(two.listeners) == 0
    with stream(cursor) as again:
        next(again)
        assert next(again) == live
    private = SSEChannel()
    with pytest.raises(ValueError, match="name"):
        open_stream(
            [one._core, private._core],
            capacity=1,
            overflow="drop_oldest",
            last_event_id=None,
            heartbeat=None,
            initial=None,
        )
    assert len(one.listeners) == 0


# --- asyncio ------------------------------------------------------------------------------


def test_it_is_an_async_iterator_of_the_same_bytes(channel):
    async def main():
        async with channel.stream(heartbeat=0.05, initial={"first": 1}) as stream:
            assert isinstance(stream, EventStream)
            chunks = [await stream.__anext__() for _ in range(3)]
            event_id = channel.publish("x")
            channel.publish("y")
            chunks.append(await stream.__anext__())
            return event_id, chunks

    event_id, chunks = asyncio.run(main())
    assert chunks[0].startswith(b"retry: 3000\nid: ")
    assert chunks[1:3] == [b'data: {"first":1}\n\n', HEARTBEAT]
    assert [frame.split(b"\n")[1] for frame in frames(chunks[3])] == [b"data: x", b"data: y"]
    assert chunks[3].startswith(f"id: {event_id}\n".encode())
    assert len(channel.listeners) == 0


def test_an_asynchronous_first_payload_is_awaited(channel):
    async def initial():
        await asyncio.sleep(0)
        return {"first": 1}

    async def main():
        async with channel.stream(initial=initial) as stream:
            await stream.__anext__()
            return await stream.__anext__()

    assert asyncio.run(main()) == b'data: {"first":1}\n\n'


@pytest.mark.parametrize("ending", ["cancel", "close", "unlisten", "aclosing"])
def test_every_asynchronous_ending_unlistens(channel, ending):
    async def main():
        stream = channel.stream(heartbeat=None)
        started = asyncio.Event()

        async def consume():
            async with contextlib.aclosing(stream):
                async for _ in stream:
                    started.set()

        task = asyncio.create_task(consume())
        await started.wait()
        if ending == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            channel.unlisten(stream) if ending == "unlisten" else await stream.aclose()
            await asyncio.wait_for(task, 30)
        assert len(channel.listeners) == 0
        assert [chunk async for chunk in stream] == []

    asyncio.run(main())


# --- the end of the interpreter -----------------------------------------------------------

AT_EXIT = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from sse_channel import SSEChannel
channel = SSEChannel("x")
ready = threading.Event()
def consume():
    stream = channel.stream(heartbeat=None)
    for chunk in stream:
        ready.set()
    # In one piece: a daemon thread may be gone between two.
    print(f"ended {len(channel.listeners)}", flush=True)
if sys.argv[1] == "executor":
    ThreadPoolExecutor(1).submit(consume)
else:
    threading.Thread(target=consume, daemon=sys.argv[1] == "daemon").start()
ready.wait()
print("leaving", flush=True)
"""


@pytest.mark.parametrize("kind", ["executor", "thread", "daemon"])
def test_the_interpreters_exit_ends_streams_that_threads_wait_in(script, kind):
    out = script(AT_EXIT, kind).splitlines()
    assert out[0] == "leaving"
    # A daemon thread may not get to say it.
    assert out[1:] == ["ended 0"] or (kind == "daemon" and not out[1:])


AFTER_EXIT = """
import asyncio, sys, threading, time
from sse_channel import ChannelClosed, SSEChannel
known = SSEChannel("known")

def late():
    threading.main_thread().join()
    # The hooks of the end run after that.
    deadline = time.monotonic() + 30
    while sys.argv[1] == "used" and not earlier.closed and time.monotonic() < deadline:
        time.sleep(0.01)
    for channel in (SSEChannel(), known, SSEChannel("new")):
        try:
            channel.listen().get()
        except ChannelClosed:
            print("closed", flush=True)
    chunks = list(known.stream(heartbeat=None))
    print("ended", len(chunks), len(known.listeners), flush=True)

    async def read():
        async for _ in await known.alisten():
            pass
        print("closed", flush=True)

    asyncio.run(read())

if sys.argv[1] == "used":
    earlier = known.listen()
threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("used", ["used", "unused"])
@pytest.mark.parametrize("bus", ["memory://", "local://"])
def test_who_listens_after_the_exits_close_waits_for_nothing(script, used, bus, short_path):
    where = f"{bus}{short_path}/bus" if bus == "local://" else bus
    out = script(AFTER_EXIT, used, SSE_CHANNEL_BUS=where).splitlines()
    assert out[:3] == ["closed"] * 3, out
    assert re.fullmatch("ended [0-9] 0", out[3]), out
    assert out[4:] == ["closed"]
