"""What applications' tests use, with the library's own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.contrib.contenttypes.models import ContentType
from django.db import connection
from django.http import HttpResponse, StreamingHttpResponse
from django.test import (
    AsyncClient,
    AsyncRequestFactory,
    Client,
    RequestFactory,
    TestCase,
    TransactionTestCase,
)

from processes import Process
from sse_channel import Event, SSEChannel, config, sse_channel, stats
from sse_channel.django import EventStreamResponse
from sse_channel.testing import (
    AsyncEventReader,
    EventReader,
    PublishedEvent,
    aconnect,
    capture,
    connect,
    memory_bus,
    parse,
)
from urls import stream as stream_view

SOON = 0.05  # seconds, for what must not come


@pytest.fixture(autouse=True, scope="module")
def database():
    """The tables."""
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    yield
    connection.close()


# --- capture ------------------------------------------------------------------------------


def test_capture_tells_messages_names_and_ids_of_several_channels_in_order(name):
    one, other = SSEChannel(name + "a"), SSEChannel(name + "b")
    one.publish("before")
    with capture(one, name + "b") as published:
        ids = [
            one.publish({"n": 1}),
            other.publish("5", event="price"),
            one.publish(5),
            other.publish(Event([1], event="list", comment="c")),
        ]
        one.publish(Event(comment="nothing for a page"))
        assert len(published) == 4
    one.publish("after")
    assert published.messages == [{"n": 1}, "5", 5, [1]]
    assert published.events == ["message", "price", "message", "list"]
    assert published.ids == ids
    assert published[1] == PublishedEvent(name + "b", "5", "price", ids[1])
    assert [event.channel for event in published] == [name + each for each in "abab"]
    assert "'price'" in repr(published)


def test_capture_is_empty_again_after_clear(channel):
    with capture(channel) as published:
        channel.publish("x")
        assert published.messages == ["x"]
        published.clear()
        assert not published
        channel.publish("y")
    assert published.messages == ["y"]
    assert len(channel.listeners) == 0


def test_capture_without_channels_means_the_default_one():
    with capture() as published:
        sse_channel.publish("x")
    assert published.messages == ["x"]


def test_capture_of_a_private_channel_has_the_object():
    private = SSEChannel()
    thing = object()
    with capture(private) as published:
        event_id = private.publish(thing)
    assert published[0] == PublishedEvent(None, thing, "message", event_id)


def test_capture_keeps_more_than_a_channels_capacity(name):
    small = SSEChannel(name, capacity=2)
    with capture(small) as published:
        for number in range(50):
            small.publish(number)
    assert published.messages == list(range(50))


def test_capture_waits_for_what_another_process_publishes(channel):
    with capture(channel) as published, Process(config.options().bus) as other:
        other(f"SSEChannel({channel.name!r}).publish('from there', event='far')")
        assert published.wait(1, timeout=30)[0].event == "far"
        with pytest.raises(TimeoutError, match=r"1 of 2 events within 0.05 s: .*from there"):
            published.wait(2, timeout=SOON)


def test_capture_refuses_what_is_no_channel():
    with pytest.raises(TypeError, match="channels or their names, not int"):
        capture(7)


# --- connect ------------------------------------------------------------------------------


def test_connect_reads_a_views_events_and_closes_it(channel, name):
    with connect(Client(), f"/stream/{name}/") as stream:
        assert stream.read() == []
        assert stream.retry == 3000
        channel.publish({"n": 1}, event="number")
        event = stream.next()
        assert (event.type, event.json()) == ("number", {"n": 1})
        ids = [channel.publish(str(n)) for n in range(3)]
        assert [event.last_event_id for event in stream.read(2)] == ids[:2]
        assert [event.data for event in stream.read()] == ["2"]
        assert [event.data for event in stream.events[1:]] == ["0", "1", "2"]
        assert stream.last_event_id == ids[-1]
        assert len(channel.listeners) == 1
    assert len(channel.listeners) == 0


def test_a_read_that_times_out_says_what_came_and_can_go_on(channel, name):
    with connect(Client(), f"/stream/{name}/") as stream:
        channel.publish("one")
        with pytest.raises(TimeoutError, match=r"no event within 0.05 s; received so far: .*'one'"):
            stream.read(2, timeout=SOON)
        channel.publish("two")
        assert [event.data for event in stream.read(2)] == ["one", "two"]
        with pytest.raises(TimeoutError):
            stream.next(timeout=SOON)
        threading.Timer(0.1, channel.publish, ["late"]).start()
        assert stream.next(timeout=30).data == "late"


def test_an_ended_stream_says_so(channel, name):
    with connect(Client(), f"/stream/{name}/") as stream:
        channel.publish("last")
        stream.read(1)
        for client in channel.listeners:
            channel.unlisten(client)
        with pytest.raises(EOFError, match=r"has ended; received so far: .*'last'"):
            stream.next()
        assert stream.is_ended


def test_connect_goes_on_where_a_client_was(channel, name):
    ids = [channel.publish(str(number)) for number in range(3)]
    with connect(Client(), f"/stream/{name}/", headers={"Last-Event-ID": ids[0]}) as stream:
        assert [event.data for event in stream.read()] == ["1", "2"]


def test_connect_says_what_else_was_answered(name):
    with pytest.raises(
        AssertionError, match=r"(?s)/nowhere/ answered 404 with text/html.*Not Found"
    ):
        connect(Client(), "/nowhere/")


def test_a_compressed_stream_is_read_as_a_browser_does(channel, name):
    request = RequestFactory().get("/", headers={"Accept-Encoding": "gzip"})
    with EventReader(EventStreamResponse(request, name, compress=True)) as stream:
        assert stream.response.headers["Content-Encoding"] == "gzip"
        assert stream.read() == []
        channel.publish("x" * 1000)
        assert stream.next().data == "x" * 1000
        with pytest.raises(TimeoutError):
            stream.next(timeout=SOON)
        channel.publish("y")
        assert [event.data for event in stream.read()] == ["y"]


def test_the_responses_of_a_view_can_be_read_without_a_client(channel, name):
    with EventReader(stream_view(RequestFactory().get("/"), name)) as stream:
        channel.publish("x")
        assert stream.next().data == "x"
    assert len(channel.listeners) == 0


def test_a_response_of_channel_stream_can_be_read_too(channel):
    response = StreamingHttpResponse(channel.stream(), content_type="text/event-stream")
    with EventReader(response) as stream:
        channel.publish("x")
        assert stream.next().data == "x"
        with pytest.raises(TimeoutError):
            stream.next(timeout=SOON)
    assert len(channel.listeners) == 0


def test_a_full_process_is_seen_as_a_browser_sees_it(name):
    with (
        config.overridden(max_clients=1),
        connect(Client(), f"/stream/{name}/"),
        connect(Client(), f"/stream/{name}/") as full,
    ):
        with pytest.raises(EOFError):
            full.next()
        assert full.retry == 30_000


def test_what_cannot_be_read_is_refused(name):
    with pytest.raises(TypeError, match="needs a streaming response"):
        EventReader(HttpResponse("x"))
    with pytest.raises(TypeError, match="neither an EventStreamResponse nor"):
        EventReader(StreamingHttpResponse(iter([b"x"])))
    response = EventStreamResponse(AsyncRequestFactory().get("/"), name)
    with pytest.raises(TypeError, match="is asynchronous"):
        EventReader(response)
    response.close()
    response = EventStreamResponse(RequestFactory().get("/"), name)
    with pytest.raises(TypeError, match="is synchronous"):
        AsyncEventReader(response)
    response.close()


class InATestCase(TestCase):
    def test_a_first_payload_sees_the_tests_transaction(self):
        ContentType.objects.create(app_label="only", model="here")
        count = ContentType.objects.count()
        with connect(self.client, "/database/in-a-test-case/") as stream:
            assert stream.next().json() == {"types": count}
        # Neither the stream nor its end has closed the test's connection.
        assert ContentType.objects.filter(app_label="only").exists()

    async def test_an_asynchronous_one_too(self):
        await ContentType.objects.acreate(app_label="only", model="here")
        count = await ContentType.objects.acount()
        async with aconnect(self.async_client, "/database/in-a-test-case/") as stream:
            assert (await stream.next()).json() == {"types": count}
        assert await ContentType.objects.filter(app_label="only").aexists()


def count_types(message):
    return ContentType.objects.count()


class RenderedInATestCase(TestCase):
    def rendered(self):
        """Types before and after one was made, and how many `render=` finds then."""
        before = ContentType.objects.count()
        made = ContentType.objects.create(app_label="only", model="here")
        name = type(self).__name__
        response = EventStreamResponse(RequestFactory().get("/"), name, render=count_types)
        with EventReader(response) as stream:
            SSEChannel(name).publish("x")
            found = stream.next(timeout=30).json()
        made.delete()
        return before, before + 1, found

    def test_a_rendering_sees_nothing_of_the_tests_transaction(self):
        before, _, found = self.rendered()
        assert found == before


class RenderedInATransactionTestCase(TransactionTestCase):
    available_apps = ()
    rendered = RenderedInATestCase.rendered

    def test_a_rendering_sees_what_the_test_has_written(self):
        _, after, found = self.rendered()
        assert found == after


def test_aconnect_reads_an_asynchronous_response(channel, name):
    async def main():
        async with aconnect(AsyncClient(), f"/stream/{name}/") as stream:
            assert await stream.read() == []
            await channel.apublish("one", event="first")
            assert (await stream.next()).type == "first"
            with pytest.raises(TimeoutError, match="no event within"):
                await stream.next(timeout=SOON)
            await channel.apublish("two")
            await channel.apublish("three")
            assert [event.data for event in await stream.read(2)] == ["two", "three"]
            asyncio.get_running_loop().call_later(0.1, channel.publish, "late")
            assert (await stream.next(timeout=30)).data == "late"
            assert len(channel.listeners) == 1
        assert len(channel.listeners) == 0
        with pytest.raises(AssertionError, match="answered 404"):
            async with aconnect(AsyncClient(), "/nowhere/"):
                pass
        with pytest.raises(TypeError, match="is asynchronous"):
            parse(await AsyncClient().get(f"/stream/{name}/"))
        async with AsyncEventReader(stream_view(AsyncRequestFactory().get("/"), name)) as stream:
            await channel.apublish("x")
            assert (await stream.next()).data == "x"
            for client in channel.listeners:
                channel.unlisten(client)
            with pytest.raises(EOFError):
                await stream.next()

    asyncio.run(main())


# --- parse --------------------------------------------------------------------------------


def test_parse_takes_bytes_text_and_responses(channel, name):
    text = "id: 1-0\nevent: a\ndata: x\n\n: c\n\ndata: y\n\ndata: unfinished"
    assert parse(text) == parse(text.encode()) == [("a", "x", "1-0"), ("message", "y", "1-0")]
    assert parse(HttpResponse(text)) == parse(text)
    first = channel.publish("zero")
    channel.publish("one")
    response = Client().get(f"/stream/{name}/", {"last_event_id": first})
    assert [event.data for event in parse(response)] == ["one"]
    assert len(channel.listeners) == 0
    with pytest.raises(TypeError, match="a stream's bytes or a response can be parsed, not int"):
        parse(7)


# --- the bus ------------------------------------------------------------------------------


def test_a_memory_bus_is_fresh_and_leaves_the_other_as_it_was(channel):
    before = stats()["bus"]["url"]
    channel.publish("kept")
    q = channel.listen()
    for _ in range(2):
        with memory_bus():
            assert q.closed
            assert channel.stats()["published"] == 0
            assert stats()["bus"]["url"] == "memory://"
            assert channel.stats()["history"]["events"] == 0
            inside = channel.listen()
            channel.publish("inside")
            assert inside.get_nowait() == "inside"
        assert inside.closed
    assert config.options().bus == before
    resumed = channel.listen(last_event_id="0-0")
    assert resumed.get_nowait() == "kept"
    assert resumed.empty()
    channel.unlisten(resumed)


def test_a_memory_bus_ends_who_waits_in_threads(channel):
    with ThreadPoolExecutor() as threads:
        with memory_bus(), contextlib.closing(channel.stream()) as stream:
            waiting = threads.submit(list, stream)
        assert b"retry: 3000" in b"".join(waiting.result(timeout=30))


def test_a_memory_bus_decorates(channel):
    @memory_bus()
    def run():
        return stats()["bus"]["url"]

    assert run() == "memory://"
    assert stats()["bus"]["url"] != "memory://"


def bus_now():
    return stats()["bus"]["url"]


def test_a_memory_bus_decorates_a_coroutine_function_until_it_has_ended(channel):
    @memory_bus()
    async def run():
        before = bus_now()
        q = channel.listen()
        await asyncio.sleep(0)
        await channel.apublish("x")
        return before, bus_now(), q.get_nowait()

    @memory_bus()
    async def wait(steps):
        for _ in range(steps):
            await asyncio.sleep(0)
            assert bus_now() == "memory://"

    async def main():
        # At once, and the one that began first ends first.
        await asyncio.gather(wait(1), wait(3))

    assert asyncio.run(run()) == ("memory://", "memory://", "x")
    assert bus_now() != "memory://"
    asyncio.run(main())
    assert bus_now() != "memory://"


def test_a_memory_bus_decorates_a_generator_until_it_is_closed():
    @memory_bus()
    def fixture():
        assert bus_now() == "memory://"
        got = yield bus_now()
        assert got == "sent"
        yield bus_now()

    generator = fixture()
    assert bus_now() != "memory://"
    assert [next(generator), generator.send("sent")] == ["memory://"] * 2
    generator.close()
    assert bus_now() != "memory://"


def test_a_memory_bus_is_taken_back_after_an_error():
    @memory_bus()
    async def fails():
        await asyncio.sleep(0)
        raise LookupError(bus_now())

    with pytest.raises(LookupError, match="memory://"):
        asyncio.run(fails())
    assert bus_now() != "memory://"


def test_what_a_memory_bus_cannot_decorate_is_refused():
    async def generator():
        yield

    class Plain:
        pass

    for refused, says in [
        (generator, "asynchronous generator generator; write `with memory_bus"),
        (Plain, "functions and TestCases, not Plain"),
        (5, "functions, not int"),
    ]:
        with pytest.raises(TypeError, match=says):
            memory_bus()(refused)


@memory_bus()
class OnAMemoryBus(TestCase):
    def setUp(self):
        assert bus_now() == "memory://"
        self.channel = SSEChannel("on-a-memory-bus")
        assert self.channel.stats()["published"] == 0
        self.channel.publish("setUp")
        self.addCleanup(self.still_on_it)

    def still_on_it(self):
        assert bus_now() == "memory://"

    tearDown = still_on_it

    def test_one(self):
        assert self.channel.stats()["history"]["events"] == 1

    async def test_another(self):
        await self.channel.apublish("x")
        assert self.channel.stats()["history"]["events"] == 2


class AfterAMemoryBus(TestCase):
    def test_the_bus_is_the_other_one(self):
        assert bus_now() != "memory://"


def test_many_fresh_buses_leave_nothing_behind(script):
    out = script(
        """
import psutil
from sse_channel import SSEChannel
from sse_channel.testing import memory_bus
channel = SSEChannel("x")
def once():
    with memory_bus():
        q = channel.listen()
        channel.publish("x")
        assert q.get(timeout=1) == "x"
process = psutil.Process()
for _ in range(10):
    once()
before = process.num_threads(), process.num_fds()
for _ in range(100):
    once()
after = process.num_threads(), process.num_fds()
print(before == after, before, after)
"""
    )
    assert out.startswith("True"), out


OVERRIDES = """
import os
os.environ.pop("SSE_CHANNEL_BUS")
from django.conf import settings
settings.configure(SSE_CHANNEL={"BUS": "memory://", "RETRY": 5})
import django
django.setup()
from django.test import override_settings
from sse_channel import SSEChannel, stats
channel = SSEChannel("x")
def retry():
    with channel.stream() as stream:
        return next(stream).split()[1].decode()
"""


def test_overridden_settings_take_effect_and_are_taken_back(script, short_path):
    script(
        OVERRIDES
        + f"""
channel.publish("x")
q = channel.listen()
assert retry() == "5"
with override_settings(SSE_CHANNEL={{"BUS": "memory://", "RETRY": 7}}):
    assert retry() == "7"
    assert not q.closed, "the bus is the same"
with override_settings(SSE_CHANNEL={{"BUS": "local://{short_path}/bus"}}):
    assert q.closed
    assert retry() == "3000"
    channel.publish("y")
    assert stats()["bus"]["url"] == "local://{short_path}/bus"
assert retry() == "5"
assert stats()["bus"]["url"] == "memory://"
assert channel.stats()["history"]["events"] == 0
with override_settings(SSE_CHANNEL={{"RETYR": 7}}):
    try:
        retry()
    except ValueError as error:
        assert "did you mean 'RETRY'" in str(error)
    else:
        raise AssertionError("not refused")
assert retry() == "5"
"""
    )


@pytest.mark.parametrize("above", ["environment", "configure"])
def test_an_overridden_setting_that_something_else_hides_is_refused(script, above):
    begin = (
        'os.environ["SSE_CHANNEL_RETRY"] = "9"\n'
        if above == "environment"
        else "from sse_channel import configure\nconfigure(retry=9)\n"
    )
    out = script(
        OVERRIDES
        + begin
        + """
assert retry() == "9"
with override_settings(SSE_CHANNEL={"RETRY": 9}):
    assert retry() == "9"
try:
    with override_settings(SSE_CHANNEL={"RETRY": 7}):
        raise AssertionError("not refused")
except ValueError as error:
    print(error)
assert settings.SSE_CHANNEL["RETRY"] == 5
"""
    )
    says = {
        "environment": "the variable SSE_CHANNEL_RETRY",
        "configure": r"configure\(\) or memory_bus\(\)",
    }[above]
    assert re.match(rf"SSE_CHANNEL\['RETRY'\] = 7 has no effect: {says} says 9, which", out)


def test_a_function_that_gives_a_coroutine_is_refused_by_a_memory_bus():
    async def asynchronous():
        raise AssertionError("it was begun")

    @memory_bus()
    def gives():
        return asynchronous()

    with pytest.raises(TypeError, match=r"make .*gives an `async def`"):
        gives()


def test_a_memory_bus_and_overridden_settings_in_either_order(script, short_path):
    other = f"local://{short_path}/bus"
    script(
        OVERRIDES
        + f"""
from sse_channel import config
from sse_channel.testing import memory_bus

def in_force():
    return config.options().bus, retry(), stats()["bus"]["url"]

settings.SSE_CHANNEL = {{"BUS": {other!r}, "RETRY": 5}}
base = ({other!r}, "5", {other!r})

# Within a memory bus that is this process's first use of anything.
with memory_bus():
    try:
        with override_settings(SSE_CHANNEL={{"BUS": {other!r}, "RETRY": 7}}):
            raise AssertionError("not refused")
    except ValueError as error:
        assert "memory_bus() says 'memory://'" in str(error), error
    assert in_force() == ("memory://", "5", "memory://"), in_force()
    kept = channel.listen()
    with override_settings(SSE_CHANNEL={{"RETRY": 7}}):
        assert in_force() == ("memory://", "7", "memory://"), in_force()
    with override_settings(SSE_CHANNEL={{"BUS": "memory://", "RETRY": 8}}):
        assert in_force() == ("memory://", "8", "memory://"), in_force()
    assert not kept.closed
    assert in_force() == ("memory://", "5", "memory://"), in_force()
assert in_force() == base, in_force()

with override_settings(SSE_CHANNEL={{"BUS": {other!r} + "2", "RETRY": 7}}):
    with memory_bus():
        assert in_force() == ("memory://", "7", "memory://"), in_force()
    assert in_force() == ({other!r} + "2", "7", {other!r} + "2"), in_force()
assert in_force() == base, in_force()

# The one that began first ends first.
override, bus = override_settings(SSE_CHANNEL={{"RETRY": 7}}), memory_bus()
for first, second in [(override, bus), (bus, override)]:
    first.__enter__()
    second.__enter__()
    assert in_force() == ("memory://", "7", "memory://"), in_force()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert in_force() == base, in_force()
"""
    )


# --- pytest -------------------------------------------------------------------------------


def test_the_fixtures_of_the_pytest_plugin(tmp_path, script):
    (tmp_path / "conftest.py").write_text(
        textwrap.dedent("""
            import os
            from django.conf import settings
            os.environ.pop("SSE_CHANNEL_BUS", None)
            pytest_plugins = ["sse_channel.testing.pytest_plugin"]
            def pytest_configure():
                settings.configure(ROOT_URLCONF="urls", ALLOWED_HOSTS=["testserver"],
                    SSE_CHANNEL={"BUS": "memory://"},
                    INSTALLED_APPS=["django.contrib.contenttypes"])
                import django
                django.setup()
        """)
    )
    (tmp_path / "test_app.py").write_text(
        textwrap.dedent("""
            import pytest
            from django.test import Client
            from sse_channel import SSEChannel

            @pytest.mark.parametrize("turn", [1, 2])
            def test_a_fresh_bus(sse_memory_bus, sse_capture, sse_connect, turn):
                published = sse_capture("news")
                stream = sse_connect(Client(), "/stream/news/?last_event_id=0-0")
                SSEChannel("news").publish(turn)
                assert published.messages == [turn]
                assert [event.json() for event in stream.read()][-1:] == [turn]

            def test_all_are_closed():
                assert len(SSEChannel("news").listeners) == 0
        """)
    )
    out = script("import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))", "-q", str(tmp_path))
    assert "3 passed" in out


def test_who_does_not_use_the_plugin_does_not_import_pytest(script):
    script(
        "import sys, sse_channel.testing, sse_channel.django\n"
        "assert not {'pytest', 'django.test', 'rest_framework'} & set(sys.modules)"
    )


def test_what_is_rendered_is_read_on_each_fresh_bus(name):
    def double(message):
        return message * 2

    for number in (1, 2):
        with memory_bus():
            response = EventStreamResponse(RequestFactory().get("/"), name, render=double)
            with EventReader(response) as stream:
                SSEChannel(name).publish(number)
                assert stream.next(timeout=30).json() == 2 * number
