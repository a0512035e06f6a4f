"""What the processes of several hosts answer when one of them asks: presence over Redis.

Processes in different working directories share no files, so that to each other they are as those
of other hosts.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from buses import BUSES, bus_of
from handover import taken
from processes import Process
from redis_server import RedisServer
from sse_channel import SSEChannel, apresence, presence, stats
from sse_channel.survey import Survey


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with contextlib.closing(RedisServer(tmp_path / "redis")) as server:
        server.start()
        yield server


@pytest.fixture
def on_host(redis: RedisServer, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Begin a process on a host of that name."""

    with contextlib.ExitStack() as stack:

        def begin(host: str, **options: Any) -> Process:
            home = tmp_path / host
            home.mkdir(exist_ok=True)
            return stack.enter_context(Process(redis.url(), cwd=home, **options))

        yield begin


def ask(process: Process, expression: str) -> Any:
    return ast.literal_eval(process(expression))


def test_the_clients_of_all_hosts_are_counted_and_of_a_killed_process_no_more(on_host, until):
    one, other, far = on_host("a"), on_host("a"), on_host("b")
    for each, count in ((one, 2), (other, 3), (far, 4)):
        each(f"streams = [SSEChannel('a').stream() for _ in range({count})]")
        each("both = sse_channel.listen(), SSEChannel('b').stream(render=str)")
    # A process that never had a stream asks as well.
    reader = on_host("c")
    assert ask(reader, "presence()") == {"a": 9, "b": 3}
    assert ask(far, "presence('a')") == ask(reader, "presence(SSEChannel('a'))") == 9
    assert ask(far, "presence('nobody')") == 0
    far("del streams[0]")
    assert ask(one, "presence('a')") == 8
    far.kill()
    began = time.monotonic()
    until(lambda: ask(reader, "presence('a')") == 5)
    assert time.monotonic() - began < 2, "a killed process's clients count for no more than that"
    # What a host counts is its own all the same.
    assert ask(one, "host_stats()['clients']['stream']") == 7
    other("del streams, both")
    one("del streams, both")
    assert ask(reader, "presence()") == {}


def test_presence_is_awaited_on_asyncio(on_host):
    far = on_host("b", begin="import asyncio; streams = [SSEChannel('a').stream() for _ in '12']")
    reader = on_host("c", begin="import asyncio")
    assert ask(reader, "asyncio.run(apresence('a'))") == 2
    assert ask(far, "asyncio.run(apresence())") == {"a": 2}


def test_a_process_that_is_stopped_is_not_counted_and_that_is_said(on_host):
    one = on_host("a", begin="stream = SSEChannel('a').stream()")
    stopped = on_host("b", begin="stream = SSEChannel('a').stream()")
    one("import logging; said = []; handler = logging.Handler(); handler.emit = said.append")
    one("logging.getLogger('sse_channel').addHandler(handler)")
    assert ask(one, "presence('a')") == 2
    stopped.kill(signal.SIGSTOP)
    assert ask(one, "presence('a')") == 1
    (said,) = ask(one, "[record.getMessage() for record in said]")
    assert said.startswith("1 of 2 processes did not tell")
    stopped.kill(signal.SIGCONT)
    assert ask(one, "presence('a')") == 2


def test_nobody_is_missing_after_redis_was_lost_and_found_again(redis, on_host, until):
    processes = [on_host(host, begin="s = SSEChannel('a').stream()") for host in "abcd"]
    for _ in range(3):
        redis.kill()
        redis.start()
        # As soon as this one is back; the others come back when they do.
        until(lambda: not processes[0]("presence('a')").startswith("BusError"))
        assert ask(processes[0], "presence('a')") == 4


def test_what_is_no_answer_is_left_alone(on_host):
    one = on_host("a", begin="stream = SSEChannel('a').stream()")
    one("from sse_channel import _sse_channel")
    asker = on_host("b", begin="from sse_channel import survey")
    for text in ("5", "[1]", "null", '{"x": 1}', '{"form": 0, "token": "t"}'):
        asker("asked = survey.Survey()")
        for name in ("answers", "questions"):
            one(f"channel = _sse_channel.Channel('sse_channel.{name}', 1)")
            tell = "limit=10**6, timeout=10, message=None, event=None, retry=None, comment=None"
            assert "Error" not in one(f"channel.publish({text!r}, json=True, {tell})")
        assert ask(asker, "asked.ask('clients').given[0]['clients']") == {"a": 1}


def test_without_redis_presence_is_an_error_that_names_it(redis, on_host):
    one = on_host("a", environment={"SSE_CHANNEL_PUBLISH_TIMEOUT": "1"})
    assert ask(one, "presence()") == {}
    redis.kill()
    assert one("presence()").startswith("BusError: ")
    redis.start()
    one("streams = [SSEChannel('a').stream()]")
    assert ask(one, "presence()") == {"a": 1}


def test_surveys_leave_nothing_to_see_and_little_to_store(redis, on_host):
    one = on_host("a", begin="stream = SSEChannel('a').stream()")
    for _ in range(300):
        one("presence()")
    assert ask(one, "list(stats()['channels'])") == ["a"]
    assert ask(one, "list(host_stats()['channels'])") == ["a"]
    streams = [f"sse_channel:{{sse_channel.{name}}}" for name in ("questions", "answers")]
    sizes = [redis.call("XLEN", stream) for stream in streams]
    # Redis trims whole nodes of a stream, of a hundred entries.
    assert all(0 < size < 250 for size in sizes), sizes


@pytest.mark.parametrize("bus", BUSES)
def test_figures_name_the_clients_that_are_behind(bus, tmp_path):
    with bus_of(bus) as shared, contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(Process(shared.url, cwd=tmp_path)) for _ in range(2))
        one("from sse_channel.survey import Survey; survey = Survey()")
        one("quick, slow = SSEChannel('a').stream(), SSEChannel('a').stream()")
        one("_ = [next(each) for each in (quick, slow)]")
        one("_ = [SSEChannel('a').publish(n) for n in '01234'] + [next(slow)]")
        one("_ = [SSEChannel('a').publish(5), next(quick)]")
        other("stream = SSEChannel('b').stream()")
        facts = ask(
            one,
            "survey.ask('figures', patience=5, known={('nobody', 0)} if "
            f"{bus == 'redis'} else {{(os.uname().nodename, os.getpid()), "
            f"(os.uname().nodename, {other.pid})}}).given",
        )
        told = {each["process"]: each for each in facts}
        assert told.keys() == {one.pid, other.pid}
        assert told[other.pid]["slowest"] == []
        assert told[other.pid]["totals"]["clients"] == {"queue": 0, "stream": 1, "socket": 0}
        (slow,) = told[one.pid]["slowest"]
        assert slow["frames"] == 1
        assert slow["channels"] == ["a"]
        assert slow["kind"] == "stream"
        assert 0 <= slow["behind"] < 60
        totals = told[one.pid]["totals"]
        assert totals["published"] == 6
        assert totals["delivered"] == 11
        (channel,) = told[one.pid]["channels"]
        assert channel["name"] == "a"
        assert channel["clients"] == {"queue": 0, "stream": 2, "socket": 0}


def test_the_largest_channels_are_told_and_how_many_more_there_are():
    names = [f"survey-{n:03}" for n in range(130)]
    before = stats()["channels"]
    channels = [SSEChannel(name) for name in names]
    with contextlib.ExitStack() as stack:
        for channel in channels[:100]:
            channel.publish("x")
        for channel in channels[100:]:
            stack.enter_context(channel.stream())
            stack.enter_context(channel.stream())
        with Survey() as survey:
            answers = survey.ask("figures", patience=0.5).given
    (answer,) = answers
    told = [channel["name"] for channel in answer["channels"]]
    # Those of other tests may have clients as well.
    assert [name for name in told if name not in before][:30] == names[100:]
    assert len(told) == 100
    assert answer["more_channels"] == len(stats()["channels"]) - 100
    assert answer["totals"]["published"] == stats()["published"]


THREADS = """
import threading
from sse_channel import SSEChannel, configure, disconnect
from sse_channel.survey import Survey
configure(bus="memory://")
stream = SSEChannel("a").stream()
done = []
def ask():
    with Survey() as survey:
        for _ in range(200):
            survey.ask("clients", patience=0.0)
    done.append(1)
def end():
    for n in range(500):
        disconnect(user=str(n))
    done.append(1)
threads = [threading.Thread(target=each, daemon=True) for each in (ask, end) * 3]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
assert len(done) == 6, done
"""


def test_threads_that_ask_and_disconnect_at_one_time_all_get_through(script):
    # On this bus every thread delivers what it publishes.
    script(THREADS)


def test_a_private_channel_s_clients_are_told_nobody(name, until):
    private = SSEChannel()
    with SSEChannel(name).stream():
        connection = taken(private)
        until(lambda: private.stats()["clients"]["socket"] == 1)
        # More than its socket takes.
        for _ in range(100):
            private.publish("x" * 50_000)
        with Survey() as survey:
            (answer,) = survey.ask("figures", patience=0.5).given
        assert all("" not in slow["channels"] for slow in answer["slowest"])
        connection.close()


def test_who_asks_on_one_host_reads_files(name, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("it asks")

    for function in ("ask", "ask_later"):
        monkeypatch.setattr(f"sse_channel._sse_channel.{function}", refuse)
    with SSEChannel(name).stream():
        assert presence(name) == asyncio.run(apresence(name)) == 1
        assert asyncio.run(apresence())[name] == 1
    with pytest.raises(ValueError, match="stats"):
        asyncio.run(apresence(SSEChannel()))
