"""Figures that all processes of a host share, also after some of them were killed."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from buses import bus_of
from parts import small_file_system
from processes import Process
from redis_server import RedisServer
from sse_channel import SSEChannel, host_stats, presence
from sse_channel._sse_channel import REASONS

FIGURES = "figures1-*-[0-9]*"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where a bus of its own lies."""
    with bus_of("local") as bus:
        yield Path(bus.url.removeprefix("local://"))


@pytest.fixture
def process(directory: Path) -> Iterator[Callable[..., Process]]:
    """Begin a process on that bus."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(
            Process(f"local://{directory}", *arguments, **options)
        )


def ask(process: Process, expression: str) -> Any:
    return ast.literal_eval(process(expression))


def killed(process: Process) -> None:
    process.kill()
    process._process.wait()


def test_presence_counts_streams_and_not_queues(name, channel):
    assert presence(channel) == 0
    with channel.stream(), SSEChannel(name).stream():
        q = channel.listen()
        assert presence(channel) == presence(name) == presence()[name] == 2
        assert host_stats()["channels"][name]["clients"] == {"queue": 1, "stream": 2, "socket": 0}
        channel.unlisten(q)
    assert presence(channel) == 0
    assert name not in presence()
    with pytest.raises(ValueError, match="stats"):
        presence(SSEChannel())
    with pytest.raises(TypeError, match="channel must be"):
        presence(5)


def test_the_clients_of_all_processes_are_counted_and_of_a_killed_one_no_more(process):
    one, other, reader = process(), process(), process()
    for each, count in ((one, 2), (other, 3)):
        each(f"streams = [SSEChannel('a').stream() for _ in range({count})]")
        each("both = sse_channel.listen(), SSEChannel('b').stream()")
    assert ask(reader, "presence()") == {"a": 5, "b": 2}
    assert ask(one, "presence('a')") == ask(other, "presence('a')") == 5
    other("del streams[0]")
    assert ask(reader, "presence('a')") == 4
    # It asks nobody: one that is stopped is counted as well.
    one.kill(signal.SIGSTOP)
    assert ask(reader, "presence('a')") == 4
    one.kill(signal.SIGCONT)
    killed(other)
    assert ask(reader, "presence()") == {"a": 2, "b": 1}


def test_sums_do_not_run_backwards_when_processes_die(process, directory):
    reader = process("count = lambda: host_stats()['channels'].get('a', {'published': 0})")
    published = 0
    for number in range(4):
        publisher = process()
        publisher("q, channel = SSEChannel('a').listen(), SSEChannel('a')")
        publisher("_ = [(channel.publish(n), q.get()) for n in range(10)]")
        published += 10
        assert ask(reader, "count()['published']") == published
        if number % 2:
            killed(publisher)
        else:
            publisher.end()
        for _ in range(2):
            figures = ask(reader, "count()")
            assert figures["published"] == figures["delivered"] == published
            assert sum(figures["delay"]["counts"]) == published
            assert figures["clients"]["queue"] == 0
    total = ask(reader, "host_stats()")
    assert (total["published"], total["trouble"]) == (40, None)
    assert total["departed"]["channels"]["a"]["published"] == 40
    # The reader has used no channel, and those that are gone leave one file.
    assert total["processes"] == []
    assert list(directory.glob(FIGURES)) == []


def test_a_file_that_was_added_and_not_removed_is_not_added_again(process, directory):
    publisher = process("SSEChannel('a').publish(1)")
    (path,) = directory.glob(FIGURES)
    figures = path.read_bytes()
    killed(publisher)
    reader = process()
    for _ in range(3):
        assert ask(reader, "host_stats()['published']") == 1
        # As if who added it had been killed before it could remove it.
        path.write_bytes(figures)
    process("SSEChannel('b').publish(1)")
    assert not path.exists()
    assert ask(reader, "host_stats()['published']") == 2


def test_sums_are_right_while_processes_die_and_several_read(process, directory):
    code = "import os; from sse_channel import SSEChannel; SSEChannel('a').publish(1); os._exit(0)"
    readers = [process("sums = []; done = False") for _ in range(2)]
    read = "sums.extend(host_stats()['published'] for _ in range(50))"
    environment = {**os.environ, "SSE_CHANNEL_BUS": f"local://{directory}"}
    for _ in range(6):
        dying = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
        for reader in readers:
            reader.send(read)
        for each in dying:
            assert each.wait(60) == 0
        for reader in readers:
            reader.answer()
    for reader in readers:
        sums = ask(reader, "[*sums, host_stats()['published']]")
        assert sums == sorted(sums)
        assert sums[-1] == 18


def test_a_forked_child_counts_in_a_file_of_its_own(process):
    parent, reader = process(), process()
    parent("channel = SSEChannel('a'); stream = channel.stream(); r, w = os.pipe()")
    parent(
        "pid = os.fork() or (channel.publish(1), channel.stream(), "
        "os.write(w, repr((presence('a'), len(host_stats()['processes']))).encode()), "
        "time.sleep(600))"
    )
    assert ask(parent, "os.read(r, 100).decode()") == "(2, 2)"
    assert ask(reader, "presence('a')") == 2
    assert ask(reader, "sorted(p['process'] for p in host_stats()['processes'])") == sorted(
        [parent.pid, ask(parent, "pid")]
    )
    # The child's copies of the parent's descriptors neither free its lock nor keep it.
    parent("os.kill(pid, 9); os.waitpid(pid, 0)")
    assert ask(reader, "presence('a')") == 1
    assert ask(reader, "host_stats()['channels']['a']['published']") == 1
    parent("pid = os.fork() or time.sleep(600)")
    child = ask(parent, "pid")
    try:
        killed(parent)
        assert ask(reader, "presence('a')") == 0
    finally:
        os.kill(child, signal.SIGKILL)


def test_two_projects_do_not_mix(tmp_path):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.closing(RedisServer(tmp_path / "redis")))
        server.start()
        homes = [tmp_path / "one", tmp_path / "other"]
        for home in homes:
            home.mkdir()
        buses = [("local://", homes[0]), ("local://", homes[1])]
        buses += [(f"{server.url()}?prefix=a:", homes[0]), (f"{server.url()}?prefix=b:", homes[0])]
        processes = [stack.enter_context(Process(bus, cwd=home)) for bus, home in buses]
        for number, each in enumerate(processes):
            each(f"streams = [SSEChannel('a').stream() for _ in range({number} + 1)]")
            each("_ = SSEChannel('a').publish('x')")
        for number, each in enumerate(processes):
            assert ask(each, "(presence(), host_stats()['published'])") == ({"a": number + 1}, 1)
        again = stack.enter_context(Process(buses[2][0], cwd=homes[0]))
        assert ask(again, "presence()") == {"a": 3}


def test_without_a_directory_all_goes_on_and_it_is_told(process, directory):
    # Not in `tmp_path`: the path has room for 76 bytes.
    file = directory.parent / "file"
    file.write_text("")
    with Process(f"local://{file}/bus") as broken:
        assert "BusError" in broken("SSEChannel('a').publish(1)")
        assert ask(broken, "presence()") == {}
        trouble = ask(broken, "host_stats()['trouble']")
        assert "cannot be used" in trouble
    user = process("stream = SSEChannel('a').stream()")
    for path in directory.glob(FIGURES):
        path.unlink()
    assert "start the process again" in ask(user, "host_stats()['trouble']")
    assert ask(user, "presence('a')") == 1


def test_a_full_file_system_ends_no_process(directory):
    place = directory.parent / "small"
    with (
        small_file_system(place, "100k"),
        Process(f"local://{place}/bus") as user,
        Process(f"local://{place}/bus") as late,
    ):
        user("channels = [SSEChannel(f'{n}') for n in range(1000)]")
        user("_ = [channel.listeners.__len__() for channel in channels]")
        assert ask(user, "len(host_stats()['channels'])") == 1000
        shared = 1000 - ask(user, "host_stats()['processes'][0]['unshared']")
        assert 8 <= shared < 200
        late("SSEChannel('late').listeners.__len__()")
        assert "No space left" in ask(late, "host_stats()['trouble']")
        assert ask(late, "len(host_stats()['channels'])") == shared + 1


def test_a_process_costs_little_memory_and_one_descriptor(process, directory):
    user = process("SSEChannel('a').publish(1); count = lambda: len(os.listdir('/proc/self/fd'))")
    (path,) = directory.glob(FIGURES)
    assert path.stat().st_blocks * 512 <= 8192
    before = ask(user, "count()")
    user("channels = [SSEChannel(f'c{n}') for n in range(1000)]")
    user("_ = [channel.listeners.__len__() for channel in channels]")
    assert path.stat().st_blocks * 512 <= 8192 + 1000 * 576
    ask(user, "(presence(), host_stats()['published'])")
    assert ask(user, "count()") == before
    assert ask(user, "len(host_stats()['processes'][0]['channels'])") == 1001


def test_more_channels_than_can_be_shared_are_counted_where_they_are(process):
    user, reader = process(), process()
    user("channels = [SSEChannel(f'{n}') for n in range(16_400)]")
    user("_ = [channel.listeners.__len__() for channel in channels]")
    user("stream = channels[-1].stream()")
    assert ask(user, "presence()") == {"16399": 1}
    assert ask(reader, "presence()") == {}
    assert ask(reader, "host_stats()['processes'][0]['unshared']") == 16


def test_the_sums_have_the_form_of_stats(channel):
    its = channel.stats()
    del its["history"]
    figures = host_stats()
    assert figures["disconnected"].keys() == set(REASONS)
    assert figures["channels"][channel.name].keys() == its.keys()
