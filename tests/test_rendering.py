"""Rendering once: what `render=` makes of an event, for all clients that share it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import logging
import os
import re
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from servers import Server, open_streams
from servers import until as until_
from sse_channel import BusError, Event, SSEChannel, rendering, stats

ID = rb"id: [0-9]+-[0-9]+\n"
OPENING = re.compile(rb"(retry: 3000\nid: .*\n\n)?")


def plain(message):
    """What most tests here render."""
    return {"rendered": message}


def read(stream, until: bytes, given: bytes = b"") -> bytes:
    """What a stream gives after its opening, up to the frame that ends so; without ids.

    Begins with what it has `given`.
    """
    while True:
        given = given.removeprefix(OPENING.match(given)[0])
        if given.endswith(until + b"\n\n"):
            break
        given += next(stream)
    return re.sub(ID, b"", given)


def cursor_of(stream) -> str:
    return re.search(rb"^id: (.*)$", next(stream), re.MULTILINE)[1].decode()


def test_1000_streams_share_what_was_rendered_once(channel):
    calls = []

    def render(message):
        calls.append(message)
        return plain(message)

    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(channel.stream(render=render, key="all")) for _ in range(1000)
        ]
        for n in range(20):
            channel.publish(n)
        want = b"".join(b'data: {"rendered":%d}\n\n' % n for n in range(20))
        assert {read(stream, b'{"rendered":19}') for stream in streams} == {want}
        assert calls == list(range(20))
        assert len(channel.listeners) == 1000
        assert channel.stats()["clients"] == {"queue": 0, "stream": 1000, "socket": 0}
        assert channel.stats()["delivered"] == 20_000


def test_each_key_is_rendered_for_itself(channel):
    def render(message, factor):
        return message * factor

    with contextlib.ExitStack() as stack:
        streams = {
            factor: [
                stack.enter_context(
                    channel.stream(render=functools.partial(render, factor=factor), key=factor)
                )
                for _ in range(2)
            ]
            for factor in (2, 3)
        }
        ordinary = stack.enter_context(channel.stream())
        channel.publish(7)
        for factor, both in streams.items():
            for stream in both:
                assert read(stream, b"%d" % (7 * factor)) == b"data: %d\n\n" % (7 * factor)
        assert read(ordinary, b"7") == b"data: 7\n\n"


def test_two_functions_with_one_key_are_two_renderings(channel):
    with (
        channel.stream(render=lambda m: "a", key=1) as one,
        channel.stream(render=lambda m: "b", key=1) as other,
    ):
        channel.publish("x")
        assert (read(one, b"a"), read(other, b"b")) == (b"data: a\n\n", b"data: b\n\n")


class Page:
    def render(self, message):
        return message

    @classmethod
    def of(cls, message):
        return cls.__name__


class Card(Page):
    pass


def decorated(made):
    @functools.wraps(made)
    def wrapper(message):
        return made(message)

    return wrapper


@decorated
def row(message):
    return "row"


@decorated
def cell(message):
    return "cell"


def test_a_function_that_may_differ_from_client_to_client_needs_a_key(channel):
    captured = "of this client"

    def with_default(message, captured=captured):
        return captured

    for render in (
        functools.partial(plain),
        lambda message: captured,
        lambda message, captured=captured: captured,
        lambda message, *, captured=captured: captured,
        with_default,
        Page().render,
    ):
        with pytest.raises(ValueError, match="give key= as well"):
            channel.stream(render=render)
        channel.stream(render=render, key="one").close()
    # None of these differs.
    for render in (plain, str, lambda message: "x"):
        channel.stream(render=render).close()


def test_functions_that_look_alike_are_told_apart(channel):
    with contextlib.ExitStack() as stack:
        streams = [
            (stack.enter_context(channel.stream(render=render, key=1)), want)
            for render, want in [
                (row, b"row"),
                (cell, b"cell"),
                (Page.of, b"Page"),
                (Card.of, b"Card"),
            ]
        ]
        channel.publish("x")
        for stream, want in streams:
            assert read(stream, want) == b"data: %s\n\n" % want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"render": "text"}, "render must be a callable, not str"),
        ({"render": plain, "key": ["a"]}, "key must be hashable, .* not list"),
        ({"key": 1}, "give render= as well"),
    ],
)
def test_arguments_that_cannot_be_are_told_at_the_call(channel, given, message):
    with pytest.raises(TypeError, match=message):
        channel.stream(**given)
    assert len(channel.listeners) == 0


def test_the_event_name_stays_unless_an_event_is_given_back(channel):
    def render(message):
        return Event(message, event="other", comment="c") if message == "other" else message

    with channel.stream(render=render, key=1) as stream:
        channel.publish("same", event="article")
        channel.publish("two\nlines", event="article")
        channel.publish("other", event="article")
        assert read(stream, b"data: other") == (
            b"event: article\ndata: same\n\n"
            b"event: article\ndata: two\ndata: lines\n\n"
            b": c\nevent: other\ndata: other\n\n"
        )


def test_none_sends_nothing_and_what_has_no_message_is_passed_on(channel):
    def render(message):
        assert message != Event.NO_DATA
        return None if message == "nothing" else message

    with channel.stream(render=render) as stream:
        channel.publish("nothing")
        channel.publish(Event(comment="passed on"))
        channel.publish(Event(retry=7))
        channel.publish("end")
        assert read(stream, b"end") == b": passed on\n\nretry: 7\n\ndata: end\n\n"


@pytest.mark.parametrize("bad", [KeyError("secret"), object(), "\ud800", "x" * (2 << 20)])
def test_an_error_is_logged_counted_and_sent_and_ends_nothing(channel, caplog, bad):
    def render(message):
        if message != "bad":
            return message
        if isinstance(bad, Exception):
            raise bad
        return bad

    errors = stats()["render"]["errors"]
    with channel.stream(render=render, key=repr(bad)[:20]) as stream:
        with caplog.at_level(logging.ERROR, "sse_channel"):
            event_id = channel.publish("bad", event="article")
            channel.publish("good")
            assert read(stream, b"good") == (
                b'event: stream-error\ndata: {"reason":"render-failed"}\n\ndata: good\n\n'
            )
        assert stats()["render"]["errors"] == errors + 1
        (record,) = caplog.records
        assert event_id in record.getMessage()
        assert record.exc_info


def test_a_client_that_comes_back_gets_what_it_missed_rendered_once(channel):
    calls = []

    def render(message):
        calls.append(message)
        return plain(message)

    with channel.stream(render=render, key=1) as stream:
        cursor = cursor_of(stream)
    # Nobody listens: it is not rendered yet.
    for n in range(5):
        channel.publish(n)
    with (
        channel.stream(render=render, key=1, last_event_id=cursor) as one,
        channel.stream(render=render, key=1, last_event_id=cursor) as other,
    ):
        channel.publish(5)
        want = b"".join(b'data: {"rendered":%d}\n\n' % n for n in range(6))
        for stream in (one, other):
            assert read(stream, b'{"rendered":5}') == want
            assert stream.reset is None
        assert sorted(calls) == list(range(6))


def test_a_client_further_behind_than_another_is_given_more(channel):
    calls = []

    def render(message):
        calls.append(message)
        return plain(message)

    ids = [channel.publish(n) for n in range(6)]
    with (
        channel.stream(render=render, key=1, last_event_id=ids[3]) as near,
        channel.stream(render=render, key=1, last_event_id=ids[1]) as far,
    ):
        assert read(near, b"5}") == b'data: {"rendered":4}\n\ndata: {"rendered":5}\n\n'
        assert read(far, b"5}").count(b"data") == 4
        assert calls == [4, 5, 2, 3]


def test_a_client_that_another_process_was_quicker_for_gets_nothing_twice(channel):
    begun, go_on = threading.Event(), threading.Event()

    def render(message):
        begun.set()
        assert go_on.wait(30)
        return message

    with channel.stream(render=render, key=1) as first:
        slow = channel.publish("slow")
        assert begun.wait(30)
        opened = []
        # It has had the event, from a process that rendered it already.
        opener = threading.Thread(
            target=lambda: opened.append(channel.stream(render=render, key=1, last_event_id=slow))
        )
        opener.start()
        go_on.set()
        opener.join(30)
        (second,) = opened
        channel.publish("next")
        assert read(first, b"next") == b"data: slow\n\ndata: next\n\n"
        assert read(second, b"next") == b"data: next\n\n"
        second.close()


def test_what_history_has_lost_is_told(name):
    channel = SSEChannel(name, history=3)
    ids = [channel.publish(n) for n in range(6)]
    with channel.stream(render=plain, last_event_id=ids[0]) as stream:
        assert b'stream-reset\ndata: {"reason":"too-old"}' in next(stream)
        assert read(stream, b"5}").count(b"data") == 3
    with channel.stream(render=plain, last_event_id="99999999999999-0") as stream:
        assert b'{"reason":"future"}' in next(stream)
    with channel.stream(render=plain, last_event_id="rubbish") as stream:
        assert b'{"reason":"unknown"}' in next(stream)


def test_a_renderer_that_is_too_slow_loses_events_and_says_so(channel, monkeypatch, caplog):
    monkeypatch.setattr(rendering, "_CAPACITY", 3)
    begun, go_on = threading.Event(), threading.Event()

    def render(message):
        begun.set()
        assert go_on.wait(30)
        return message

    with channel.stream(render=render, key=1) as stream:
        channel.publish(0)
        assert begun.wait(30)
        for n in range(1, 9):
            channel.publish(n)
        go_on.set()
        assert read(stream, b"data: 8") == (
            b"data: 0\n\n"
            b'event: stream-reset\ndata: {"reason":"too-old"}\n\n'
            b"data: 6\n\ndata: 7\n\ndata: 8\n\n"
        )
        assert "too slow" in caplog.text


def test_several_channels_are_rendered_in_one_order(name):
    one, other = SSEChannel(name), SSEChannel(f"{name}-other")
    from sse_channel.stream import open_stream

    with open_stream(
        [one._core, other._core],
        capacity=100,
        overflow="drop_oldest",
        last_event_id=None,
        heartbeat=None,
        initial=None,
        render=plain,
    ) as stream:
        for n in range(10):
            (one, other)[n % 2].publish(n)
        want = b"".join(b'data: {"rendered":%d}\n\n' % n for n in range(10))
        assert read(stream, b"9}") == want
        assert len(one.listeners) == len(other.listeners) == 1
        assert stream in one.listeners
        other.unlisten(stream)
        assert len(one.listeners) == len(other.listeners) == 0


def test_a_private_channel_renders_objects_that_have_no_wire_form():
    channel = SSEChannel()
    with channel.stream(render=lambda message: message.__name__) as stream:
        channel.publish(threading.Thread)
        assert read(stream, b"Thread") == b"data: Thread\n\n"
        # With its channel it ends, although it was rendered.
        del channel
        gc.collect()
        assert list(stream) == []


def test_nothing_is_rendered_for_nobody(channel, until, monkeypatch):
    monkeypatch.setattr(rendering, "_FIRST", 0.0)
    calls = []

    def render(message):
        calls.append(message)
        return message

    stream = channel.stream(render=render, key=1)
    during = stats()["render"]["renderings"]
    assert during > 0
    stream.close()
    channel.publish("for nobody")
    until(lambda: stats()["render"]["renderings"] == during - 1)
    assert calls == []
    assert channel.stats()["disconnected"]["closed"] == 1
    with channel.stream(render=render, key=1) as stream:
        channel.publish("for somebody")
        assert read(stream, b"somebody") == b"data: for somebody\n\n"


def test_a_client_that_joins_a_rendering_at_its_end_begins_another(channel, monkeypatch):
    register = rendering.Rendering.register
    ended = []

    def late(self, *arguments):
        if not ended:
            ended.append(self.end(0.0))
            self.desk.forget(self)
        return register(self, *arguments)

    monkeypatch.setattr(rendering.Rendering, "register", late)
    with channel.stream(render=plain) as stream:
        assert ended == [True]
        channel.publish(1)
        assert read(stream, b"1}") == b'data: {"rendered":1}\n\n'


def test_renderings_and_threads_without_clients_end_by_themselves(script):
    script(
        """
import contextlib, threading, time
from sse_channel import SSEChannel, configure, rendering, stats

configure(bus="memory://", render_threads=2)
rendering._REST = rendering._LINGER = 0.05
channel = SSEChannel("a")
released = []

@contextlib.contextmanager
def surroundings():
    yield
    released.append(threading.current_thread().name)

rendering.render_within(surroundings)
streams = [channel.stream(render=str, key=n) for n in range(5)]

def threads():
    return [t for t in threading.enumerate() if t.name == "sse-channel-render"]

assert len(threads()) == 2, threads()
assert stats()["render"]["renderings"] == 5
for stream in streams:
    next(stream)
channel.publish("one")
for stream in streams:
    assert next(stream).endswith(b"data: one\\n\\n")
    stream.close()
deadline = time.monotonic() + 30
while threads() or stats()["render"]["renderings"]:
    assert time.monotonic() < deadline, (threads(), stats()["render"])
    time.sleep(0.01)
assert "sse-channel-render" in released
# And begin again.
with channel.stream(render=str) as stream:
    channel.publish("two")
    assert next(stream) and next(stream).endswith(b"data: two\\n\\n")
"""
    )


def test_a_forked_child_renders_for_itself(script):
    script(
        """
import os
from sse_channel import SSEChannel, configure, stats

configure(bus="memory://")
channel = SSEChannel("a")

def check():
    with channel.stream(render=str) as stream:
        channel.publish(os.getpid())
        assert next(stream)
        assert next(stream).endswith(b"data: %d\\n\\n" % os.getpid())

held = channel.stream(render=str)
check()
child = os.fork()
if child == 0:
    assert stats()["render"]["renderings"] == 0
    check()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
check()
"""
    )


@pytest.mark.parametrize("is_async", [False, True])
def test_asyncio_streams_are_rendered_too(channel, is_async):
    threads = set()

    async def awaited(message):
        threads.add(threading.current_thread())
        await asyncio.sleep(0)
        return plain(message)

    def called(message):
        threads.add(threading.current_thread())
        return plain(message)

    async def main():
        render = awaited if is_async else called
        cursor = re.search(rb"id: (\S+)", await anext(channel.stream()))[1].decode()
        await channel.apublish("missed")
        stream = channel.stream(render=render, key=1, last_event_id=cursor)
        opening = await anext(stream)
        assert cursor.encode() in opening
        assert (await anext(stream)).endswith(b'data: {"rendered":"missed"}\n\n')
        await channel.apublish("live")
        assert (await anext(stream)).endswith(b'data: {"rendered":"live"}\n\n')
        stream.close()

    asyncio.run(main())
    # An asynchronous one runs on the loop, any other where it cannot hold up the loop.
    assert (threads == {threading.main_thread()}) is is_async
    assert (threading.main_thread() in threads) is is_async


def test_clients_that_resume_on_asyncio_leave_the_loops_threads_to_render(channel):
    async def render(message):
        # Needs one of the threads that the clients would wait in.
        return await asyncio.to_thread(str, message)

    async def main():
        first = await anext(channel.stream())
        cursor = re.search(rb"id: (\S+)", first)[1].decode()
        for n in range(3):
            await channel.apublish(n)
        streams = [
            channel.stream(render=render, key=n, last_event_id=cursor)
            for n in range(2 * ((os.cpu_count() or 1) + 4))
        ]
        openings = await asyncio.wait_for(asyncio.gather(*map(anext, streams)), 60)
        assert all(cursor.encode() in opening for opening in openings)
        for stream in streams:
            assert (await anext(stream)).count(b"data: ") == 3
            stream.close()

    asyncio.run(main())


def test_a_render_that_is_cancelled_or_whose_loop_ends_is_an_error_and_ends_nothing(channel):
    begun = threading.Event()

    async def render(message):
        if message == "cancelled":
            raise asyncio.CancelledError
        if message == "stuck":
            begun.set()
            await asyncio.Event().wait()
        return message

    errors = stats()["render"]["errors"]

    async def main():
        stream = channel.stream(render=render, key=1)
        await anext(stream)
        channel.publish("cancelled")
        assert b"stream-error" in await anext(stream)
        channel.publish("stuck")
        assert await asyncio.to_thread(begun.wait, 30)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(main())
    # It does not run any more, and is not closed: nobody will ever finish it.
    channel.publish("after it")
    assert read(stream, b"after it").count(b"stream-error") == 1
    assert stats()["render"]["errors"] == errors + 2
    stream.close()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_a_stream_that_cannot_be_opened_leaves_no_rendering(script):
    script(
        """
import gc
from sse_channel import BusError, SSEChannel, configure, rendering, stats

configure(bus="redis://127.0.0.1:1/0", publish_timeout=0.2)
channel = SSEChannel("a")
for _ in range(3):
    try:
        channel.stream(render=str)
    except BusError:
        pass
    else:
        raise AssertionError("no Redis is there")
gc.collect()
left = [each for each in gc.get_objects() if isinstance(each, rendering.Rendering)]
assert not left, left
assert stats()["render"]["renderings"] == 0
"""
    )


def test_a_client_of_several_channels_gets_back_all_that_they_remember(name):
    channels = [SSEChannel(f"{name}-{n}", history=10) for n in range(2)]
    from sse_channel.stream import open_stream

    def opened(last_event_id=None):
        return open_stream(
            [channel._core for channel in channels],
            capacity=100,
            overflow="drop_oldest",
            last_event_id=last_event_id,
            heartbeat=None,
            initial=None,
            render=plain,
        )

    with opened() as stream:
        cursor = cursor_of(stream)
    for n in range(18):
        channels[n % 2].publish(n)
    with opened(cursor) as stream:
        assert read(stream, b"17}").count(b"data") == 18
        assert stream.reset is None


def test_what_was_lost_while_a_client_was_away_is_told_to_it(channel, monkeypatch):
    monkeypatch.setattr(rendering, "_CAPACITY", 3)
    begun, go_on = threading.Event(), threading.Event()

    def render(message):
        if message == 0:
            begun.set()
            assert go_on.wait(30)
        return message

    with channel.stream(render=render, key=1) as stream:
        seen = channel.publish("seen")
        assert read(stream, b"seen")
        channel.publish(0)
        assert begun.wait(30)
        for n in range(1, 9):
            channel.publish(n)
        go_on.set()
        assert b"stream-reset" in read(stream, b"data: 8")
    # The source has them all: they are rendered for it.
    with channel.stream(render=render, key=1, last_event_id=seen) as stream:
        assert read(stream, b"data: 8").count(b"data: ") == 9
        assert stream.reset is None


def test_what_was_missed_is_rendered_as_what_is_published_is(channel):
    asked = contextvars.ContextVar("asked", default="by nobody")
    seen = []

    def render(message):
        seen.append((message, asked.get(), threading.current_thread().name))
        return message

    with channel.stream() as stream:
        cursor = cursor_of(stream)
    channel.publish("missed")
    asked.set("by a client")
    with channel.stream(render=render, key=1, last_event_id=cursor) as stream:
        assert read(stream, b"missed")
        channel.publish("live")
        assert read(stream, b"live")
    thread = "sse-channel-render"
    assert seen == [(message, "by nobody", thread) for message in ("missed", "live")]


@pytest.mark.parametrize("is_request", [True, False])
def test_a_view_that_waits_for_an_asynchronous_render_is_not_in_its_way(script, is_request):
    out = script(
        """
import asyncio, contextlib, sys
import django
from django.conf import settings
settings.configure()
django.setup()
from asgiref.sync import ThreadSensitiveContext, sync_to_async
import sse_channel.django
from sse_channel import SSEChannel, configure

configure(bus="memory://")
channel = SSEChannel("a")

async def render(message):
    # As the ORM does it.
    return await sync_to_async(str)(message)

def view(cursor):
    return channel.stream(render=render, key=1, last_event_id=cursor)

async def main():
    cursor = await channel.apublish(0)
    await channel.apublish("missed")
    # A server has one for each request; elsewhere, all share one thread.
    is_request = sys.argv[1] == "True"
    async with ThreadSensitiveContext() if is_request else contextlib.AsyncExitStack():
        stream = await asyncio.wait_for(sync_to_async(view)(cursor), 60)
        given = await anext(stream) + await anext(stream)
        assert given.endswith(b"data: missed\\n\\n"), given
        stream.close()

asyncio.run(main())
print("opened")
""",
        str(is_request),
    )
    assert out == "opened\n"


def test_an_error_of_what_was_missed_is_told_to_who_opens_the_stream(channel, monkeypatch):
    def fail(*_):
        yield from ()
        raise BusError("as it was to")

    cursor = channel.publish(0)
    channel.publish(1)
    monkeypatch.setattr(rendering.Rendering, "catch_up", fail)
    with pytest.raises(BusError, match="as it was to"):
        channel.stream(render=plain, last_event_id=cursor)


@pytest.mark.parametrize("opened_on", ["threads", "asyncio"])
@pytest.mark.parametrize("slow_is", ["live", "missed"])
def test_a_slow_rendering_holds_up_one_thread(
    channel, name, options, monkeypatch, opened_on, slow_is
):
    # That one, and one for all others.
    options(render_threads=2)
    monkeypatch.setattr(rendering, "_desks", {})
    # It takes longer than that.
    monkeypatch.setattr(rendering, "_FIRST", 0.2)
    calls = []
    begun, go_on = threading.Event(), threading.Event()

    def slow(message):
        calls.append(message)
        if message == "slow":
            begun.set()
            assert go_on.wait(100)
        return message

    def opened(of, **given):
        async def on_loop():
            stream = of.stream(**given)
            return stream, await anext(stream)

        if opened_on == "asyncio":
            stream, first = asyncio.run(on_loop())
        else:
            stream = of.stream(**given)
            first = next(stream)
        return stream, first

    other = SSEChannel(f"{name}-other")
    cursors = [channel.publish(0), other.publish(0)]
    other.publish("missed")
    if slow_is == "missed":
        channel.publish("slow")
    channel.publish("first")
    many = 6
    expected = ["first", "slow"] if slow_is == "live" else ["slow", "first", "live"]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(many + 1))
        stack.callback(go_on.set)
        if slow_is == "live":
            live, _ = opened(channel, render=slow, key=1)
            stack.enter_context(live)
            channel.publish("slow")
            assert begun.wait(60)
        resumed = [
            pool.submit(opened, channel, render=slow, key=1, last_event_id=cursors[0])
            for _ in range(many)
        ]
        assert begun.wait(60)
        if slow_is == "missed":
            channel.publish("live")
        second = pool.submit(opened, other, render=str, last_event_id=cursors[1])
        stream, first = second.result(60)
        with stream:
            assert read(stream, b"missed", first)
        time.sleep(0.3)
        assert not any(each.done() for each in resumed)
        go_on.set()
        for each in resumed:
            stream, first = each.result(60)
            with stream:
                given = read(stream, expected[-1].encode(), first)
                assert re.findall(r"data: (.*)", given.decode()) == expected
    # Once, whoever was the first to ask.
    assert sorted(calls) == sorted(expected)


@pytest.fixture
def one_thread(options, monkeypatch):
    """A desk of its own, with one thread."""
    options(render_threads=1)
    monkeypatch.setattr(rendering, "_desks", {})


@pytest.mark.usefixtures("one_thread")
def test_who_waits_for_the_bus_takes_no_thread_from_the_others(channel, name, monkeypatch):
    waiting, go_on = threading.Semaphore(0), threading.Event()
    prepare = rendering.Rendering.prepare

    def prepares(self, *arguments):
        waiting.release()
        assert go_on.wait(100)
        return prepare(self, *arguments)

    monkeypatch.setattr(rendering.Rendering, "prepare", prepares)
    other = SSEChannel(f"{name}-other")
    cursor = channel.publish(0)
    channel.publish("missed")
    with ThreadPoolExecutor() as pool, other.stream(render=str) as live:
        next(live)
        resumed = [pool.submit(channel.stream, render=str, last_event_id=cursor) for _ in range(4)]
        for _ in resumed:
            assert waiting.acquire(timeout=60)
        other.publish("live")
        assert read(live, b"live")
        go_on.set()
        for each in resumed:
            with each.result(60) as stream:
                assert read(stream, b"missed")


@pytest.mark.usefixtures("one_thread")
def test_what_is_published_faster_than_rendered_holds_up_no_client_and_no_other(channel, name):
    other = SSEChannel(f"{name}-other")
    behind, stop = threading.Event(), threading.Event()

    def hot(message):
        # Each makes more.
        if not stop.is_set() and len(channel.listeners) < 3:
            channel.publish(message + 1)
            channel.publish(message + 1)
        behind.set()
        return str(message)

    cursor = channel.publish(0)
    channel.publish(0)
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        stack.callback(stop.set)
        live = stack.enter_context(channel.stream(render=hot, key=1))
        next(live)
        others = stack.enter_context(other.stream(render=str))
        next(others)
        channel.publish(1)
        assert behind.wait(60)
        resumed = pool.submit(channel.stream, render=hot, key=1, last_event_id=cursor)
        other.publish("live")
        assert read(others, b"live")
        stack.enter_context(resumed.result(60))


@pytest.mark.usefixtures("one_thread")
def test_what_one_render_activates_is_not_there_for_the_next(channel):
    language = contextvars.ContextVar("language", default="en")

    def render(message):
        before = language.get()
        language.set("de")
        return before

    async def arender(message):
        return render(message)

    opened = [channel.stream(render=each, key=1) for each in (render, arender)]
    with opened[0] as one, opened[1] as other:
        for stream in (one, other):
            next(stream)
        for _ in range(3):
            channel.publish("x")
            for stream in (one, other):
                assert read(stream, b"").endswith(b"data: en\n\n")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "how", ["here", "in a thread", "on a loop", "on the loop of the view", "three deep"]
)
def test_a_render_may_open_a_stream_of_what_another_has_missed(channel, name, how):
    other, third = SSEChannel(f"{name}-other"), SSEChannel(f"{name}-third")
    cursor, cursor_of_third = other.publish(0), third.publish(0)
    other.publish("missed")
    third.publish("missed")

    def of_third(message):
        with third.stream(render=str, last_event_id=cursor_of_third) as stream:
            return read(stream, b"missed") and message

    render_other = of_third if how == "three deep" else str

    def opens(message):
        with other.stream(render=render_other, key=1, last_event_id=cursor) as stream:
            return read(stream, b"missed").decode()

    async def opens_in_a_thread(message):
        return await asyncio.to_thread(opens, message)

    async def aopens(message):
        given = b""
        with other.stream(render=render_other, key=1, last_event_id=cursor) as stream:
            while not given.endswith(b"missed\n\n"):
                given += await anext(stream)
        return given.decode()

    async def view():
        with channel.stream(render=aopens, key=1) as stream:
            given = await anext(stream)
            await channel.apublish("x")
            while b"missed" not in given:
                given += await asyncio.wait_for(anext(stream), 60)

    if how == "on the loop of the view":
        asyncio.run(view())
        return
    render = {"here": opens, "in a thread": opens_in_a_thread}.get(how, aopens)
    with ThreadPoolExecutor(1) as pool, channel.stream(render=render, key=1) as stream:
        next(stream)
        channel.publish("x")
        assert b"missed" in pool.submit(next, stream).result(60)


def test_a_thread_that_is_ended_before_it_begins_leaves_the_work_to_another(script):
    out = script(
        """
import contextlib
from sse_channel import SSEChannel, configure, rendering

configure(bus="memory://", render_threads=1)
channel = SSEChannel("a")
ended = []

@contextlib.contextmanager
def surroundings():
    if not ended:
        ended.append(True)
        # As a greenlet is killed, and as quietly.
        raise SystemExit
    yield

rendering.render_within(surroundings)
cursor = channel.publish(0)
channel.publish("missed")
with channel.stream(render=str, last_event_id=cursor) as stream:
    given = b""
    while not given.endswith(b"data: missed\\n\\n"):
        given += next(stream)
print(ended)
"""
    )
    assert out == "[True]\n"


def test_what_ends_a_thread_that_renders_does_not_end_the_loop_that_waits_for_it(script):
    out = script(
        """
import asyncio, logging, threading
from sse_channel import SSEChannel, configure

configure(bus="memory://", render_threads=1)
logging.disable()
channel = SSEChannel("a")
threads = []

def render(message):
    threads.append(threading.current_thread())
    if len(threads) == 1:
        raise SystemExit(message)
    return message

async def opened(key):
    with channel.stream(render=render, key=key, last_event_id=cursor) as stream:
        given = await anext(stream)
        while b"data" not in given:
            given += await anext(stream)
        return given

async def main():
    global cursor
    cursor = await channel.apublish(0)
    await channel.apublish("missed")
    try:
        await opened(1)
    except RuntimeError as error:
        print(error)
    threads[0].join(30)
    assert not threads[0].is_alive()
    print((await opened(2)).split(b"\\n")[-3].decode())

asyncio.run(main())
"""
    )
    assert out == "the thread that rendered was ended: SystemExit('missed')\ndata: missed\n"


def test_a_stream_that_is_closed_while_what_it_missed_is_rendered_ends_at_once(channel):
    begun, go_on = threading.Event(), threading.Event()

    def slow(message):
        begun.set()
        assert go_on.wait(60)
        return message

    async def main():
        cursor = await channel.apublish(0)
        await channel.apublish("missed")
        try:
            for ends in ("closed", "cancelled"):
                begun.clear()
                stream = channel.stream(render=slow, key=ends, last_event_id=cursor)
                opening = asyncio.ensure_future(anext(stream))
                assert await asyncio.to_thread(begun.wait, 60)
                if ends == "closed":
                    stream.close()
                    with pytest.raises(StopAsyncIteration):
                        await asyncio.wait_for(opening, 30)
                else:
                    opening.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await asyncio.wait_for(opening, 30)
                    assert stream.closed
        finally:
            go_on.set()

    asyncio.run(main())
    until_(lambda: not rendering._desk()._jobs, "the end of what was begun for them")
    assert len(channel.listeners) == 0


@pytest.mark.usefixtures("one_thread")
def test_a_thread_that_has_nothing_to_do_holds_no_loop(channel):
    async def main():
        cursor = await channel.apublish(0)
        await channel.apublish("missed")
        with channel.stream(render=str, last_event_id=cursor) as stream:
            await anext(stream)

    with channel.stream(render=plain) as other:
        next(other)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        loop = weakref.ref(loop)
        until_(lambda: gc.collect() >= 0 and loop() is None, "the end of the loop")


@pytest.mark.usefixtures("one_thread")
def test_a_render_that_would_wait_for_itself_is_told(channel, caplog):
    def render(message):
        with channel.stream(render=render, key=1, last_event_id=cursor) as stream:
            return read(stream, b"missed").decode()

    cursor = channel.publish("missed")
    channel.publish("missed")
    with ThreadPoolExecutor(1) as pool, channel.stream(render=render, key=1) as stream:
        next(stream)
        channel.publish("x")
        assert b"stream-error" in pool.submit(next, stream).result(60)
    assert "would wait for itself" in caplog.text


def test_what_is_put_off_by_one_that_is_ready_meanwhile_is_done(channel, monkeypatch):
    monkeypatch.setattr(rendering, "_desks", {})
    done = threading.Event()
    with channel.stream(render=plain) as stream:
        next(stream)
        (its,) = rendering._desk()._renderings.values()
        # As for a thread that has just seen that another is at it.
        its.put_off(types.SimpleNamespace(run=done.set))
        assert done.wait(60)


def test_a_render_may_open_a_stream_that_another_thread_catches_up_for(channel, name):
    other = SSEChannel(f"{name}-other")
    begun, go_on, opening = threading.Event(), threading.Event(), threading.Event()

    def slow(message):
        begun.set()
        assert go_on.wait(60)
        return message

    def opens(message):
        opening.set()
        with other.stream(render=slow, key=1, last_event_id=cursor) as stream:
            return read(stream, b"missed").decode()

    cursor = other.publish(0)
    other.publish("missed")
    with ThreadPoolExecutor() as pool, channel.stream(render=opens, key=1) as stream:
        next(stream)
        first = pool.submit(other.stream, render=slow, key=1, last_event_id=cursor)
        assert begun.wait(60)
        channel.publish("x")
        assert opening.wait(60)
        time.sleep(0.1)
        go_on.set()
        assert b"data: missed" in read(stream, b"data: ")
        first.result(60).close()


@pytest.mark.parametrize("opens_on", ["a thread", "a loop"])
@pytest.mark.parametrize("waits", ["first", "put off", "in the queue"])
def test_who_waits_for_what_was_missed_does_not_hold_up_the_exit(script, opens_on, waits):
    script(
        """
import asyncio, sys, threading
from sse_channel import ChannelClosed, SSEChannel, configure, rendering

opens_on, waits = sys.argv[1:]
configure(bus="memory://", render_threads=1 if waits == "in the queue" else 2)
channel = SSEChannel("a")
cursor = channel.publish(0)
channel.publish(1)
begun = threading.Event()
refused = []

def stuck(message):
    begun.set()
    threading.Event().wait()

async def on_loop(key):
    with channel.stream(render=stuck, key=key, last_event_id=cursor) as stream:
        await anext(stream)

def opens(key):
    try:
        if opens_on == "a loop":
            asyncio.run(on_loop(key))
        else:
            channel.stream(render=stuck, key=key, last_event_id=cursor)
    except ChannelClosed:
        refused.append(key)

threads = [threading.Thread(target=opens, args=(1,))]
threads[0].start()
assert begun.wait(60)
if waits != "first":
    threads.append(threading.Thread(target=opens, args=(1 if waits == "put off" else 2,)))
    threads[1].start()
    while len(rendering._desk()._jobs) < 2:
        pass
    if waits == "put off":
        while not any(each._later for each in rendering._desk()._renderings.values()):
            pass

def look():
    for thread in threads:
        thread.join(60)
    assert len(refused) == len(threads), refused

threading.Thread(target=look).start()
""",
        opens_on,
        waits,
    )


def test_a_client_that_resumes_while_the_last_thread_ends_has_another(script):
    script(
        """
import asyncio, contextlib, threading
from sse_channel import SSEChannel, configure, rendering, stats

configure(bus="memory://")
rendering._REST = rendering._FIRST = rendering._LINGER = 0.05
channel = SSEChannel("a")
leaving, go_on = threading.Event(), threading.Event()

@contextlib.contextmanager
def surroundings():
    yield
    if not stats()["render"]["renderings"]:
        leaving.set()
        assert go_on.wait(60)

rendering.render_within(surroundings)

async def main():
    cursor = await channel.apublish(0)
    with channel.stream(render=str) as stream:
        await anext(stream)
    # Once more, so that the rendering notices that nobody is there.
    while not leaving.is_set():
        await channel.apublish("missed")
        await asyncio.sleep(0.02)
    stream = channel.stream(render=str, last_event_id=cursor)
    opening = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.1)
    go_on.set()
    await asyncio.wait_for(opening, 60)
    stream.close()

asyncio.run(main())
"""
    )


def test_a_thread_that_never_rests_gives_back_what_it_has(channel, monkeypatch):
    monkeypatch.setattr(rendering, "_REST", 0.05)
    entered = []

    @contextlib.contextmanager
    def surroundings():
        entered.append(threading.get_ident())
        yield

    monkeypatch.setattr(rendering, "_surroundings", [surroundings])
    with channel.stream(render=plain) as stream:
        next(stream)
        for n in range(10_000):
            channel.publish(n)
            next(stream)
            if entered.count(entered[-1]) >= 5:
                break
            time.sleep(0.005)
        else:
            pytest.fail(f"{len(entered)} times")


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("missed", [True, False])
def test_no_database_connection_of_a_render_stays_open(script, tmp_path, is_async, missed):
    out = script(
        """
import asyncio, sys, threading, time
import django
from django.conf import settings
database = {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}
settings.configure(DATABASES={"default": database})
django.setup()
from asgiref.sync import sync_to_async
from django.db import connection
from django.db.backends.signals import connection_created
import sse_channel.django
from sse_channel import SSEChannel, configure, rendering

configure(bus="memory://")
rendering._REST = 0.05
channel = SSEChannel("a")
created = []
connection_created.connect(lambda connection, **_: created.append(connection), weak=False)

def query(message):
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return message

async def aquery(message):
    return await sync_to_async(query)(message)

is_async, missed = (argument == "True" for argument in sys.argv[2:])
render = aquery if is_async else query
cursor = channel.publish(0)
if missed:
    channel.publish("hello")
with channel.stream(render=render, last_event_id=cursor) as stream:
    if not missed:
        channel.publish("hello")
    given = b""
    while not given.endswith(b"data: hello\\n\\n"):
        given += next(stream)
    deadline = time.monotonic() + 60
    while any(each.connection is not None for each in created):
        assert time.monotonic() < deadline, created
        time.sleep(0.01)
    assert created
    # Nor does the thread that had it.
    while any(thread.name.startswith("ThreadPool") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)
print("closed")
""",
        str(tmp_path / "database"),
        str(is_async),
        str(missed),
    )
    assert out == "closed\n"


def test_what_is_lost_while_an_event_is_taken_is_told_at_its_place(channel, monkeypatch):
    monkeypatch.setattr(rendering, "_CAPACITY", 5)
    ids = []
    take = rendering.Rendering.take

    def taken(self):
        event = take(self)
        if event is not None and not ids:
            ids.extend(channel.publish(n) for n in range(1, 11))
        return event

    monkeypatch.setattr(rendering.Rendering, "take", taken)
    with channel.stream(render=plain) as stream:
        next(stream)
        channel.publish(0)
        assert b"stream-reset" in read(stream, b"10}")
        # Another worker had the third, which was lost here.
        with channel.stream(render=plain, last_event_id=ids[2]) as second:
            if second.reset is None:
                # Then it is given all, rendered from what the source still has.
                assert read(second, b"10}").count(b"data: ") == 7


# --- The news example ------------------------------------------------------------------------

PATHS = ["/news/stream/?last_n=5", "/news/stream/?last_n=10"]


def queries_of(server: Server, clients: int) -> tuple[int, set[str]]:
    """Queries that ten articles cost with so many clients, and what these got."""
    with contextlib.ExitStack() as stack:
        streams = []
        for path in PATHS:
            streams += stack.enter_context(open_streams(server, path, clients // 2))
        until_(lambda: all(len(stream.events) == 1 for stream in streams), "the first payloads")
        before = server.queries()
        articles = [server.publish(f"Article {n}") for n in range(10)]
        until_(lambda: all(len(stream.events) == 11 for stream in streams), "each article")
        payloads = [[event.json() for event in stream.events[1:]] for stream in streams]
        for stream, own in zip(streams, payloads, strict=True):
            assert [payload["article"] for payload in own] == articles
            assert {payload["worker"] for payload in own} == {stream.worker}
        return server.queries() - before, {p["statistics"]["last_n"] for ps in payloads for p in ps}


@pytest.mark.parametrize("kind", ["gunicorn-sync-3", "gunicorn-gevent-3"])
def test_queries_for_an_article_do_not_grow_with_the_number_of_clients(tmp_path, kind):
    with Server(kind, tmp_path, offload=kind == "gunicorn-sync-3") as server:
        # Two for the statistics, of each value in each of three workers, and what saves it.
        most = 10 * (2 * 2 * 3 + 5)
        for clients in (6, 1000):
            queries, last_n = queries_of(server, clients)
            assert last_n == {5, 10}
            assert 10 * 2 * 2 <= queries <= most, clients
