"""Connections that left Python: what is written to them, and when they end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from handover import take
from parts import missing
from sse_channel import SSEChannel, stats

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
Until = Callable[..., None]


class Peer:
    """The client's end of a connection that was handed over."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.received = bytearray()
        self.is_ended = False
        self._numbers: list[int] = []
        self._parsed = 0
        connection.setblocking(False)

    def read(self) -> bytearray:
        """All that has come so far."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while not self.is_ended:
                data = self.socket.recv(1 << 16)
                self.is_ended = not data
                self.received += data
        return self.received

    def numbers(self) -> list[int]:
        """What was published, of the frames that are whole."""
        for found in re.compile(rb"\ndata: (\d+)x*\n\n").finditer(self.read(), self._parsed):
            self._numbers.append(int(found[1]))
            self._parsed = found.end()
        return self._numbers


@pytest.fixture
def take_over() -> Iterator[Callable[..., Peer]]:
    """Hand one end of a TCP connection over, with a stream of a channel."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def open_peer(
            channel: SSEChannel,
            *,
            chunked: bool = False,
            policy: str = "disconnect",
            frames: int = 1000,
            size: int = 1 << 20,
            heartbeat: float | None = None,
            last_event_id: str | None = None,
            body: bytes = b"",
            receive_buffer: int | None = None,
        ) -> Peer:
            client = stack.enter_context(socket.socket())
            if receive_buffer is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            client.connect(listener.getsockname())
            server, _ = listener.accept()
            with server:
                stream = channel.stream(heartbeat=heartbeat, last_event_id=last_event_id)
                assert take(
                    stream,
                    server.fileno(),
                    HEAD,
                    body,
                    chunked=chunked,
                    policy=policy,
                    frames=frames,
                    bytes=size,
                    threads=2,
                )
                assert stream.closed
                assert next(stream, None) is None
            return Peer(client)

        yield open_peer


def clients(channel: SSEChannel) -> int:
    return channel.stats()["clients"]["socket"]


def test_the_head_comes_first_then_the_opening_the_body_and_events(channel, take_over, until):
    before = channel.publish("before")
    peer = take_over(channel, body=b"data: first\n\n")
    event_id = channel.publish({"n": 1}, event="article")
    expected = (
        HEAD
        + f"retry: 3000\nid: {before}\n\ndata: first\n\n"
        f'id: {event_id}\nevent: article\ndata: {{"n":1}}\n\n'.encode()
    )
    until(lambda: len(peer.read()) >= len(expected))
    assert peer.received == expected
    until(lambda: channel.stats()["delivered"] == 1)
    assert channel.stats()["bytes"] == len(f'id: {event_id}\nevent: article\ndata: {{"n":1}}\n\n')
    assert sum(channel.stats()["delay"]["counts"]) == 1


def test_chunks_are_whole_frames(channel, take_over, until):
    peer = take_over(channel, chunked=True)
    for n in range(100):
        channel.publish(str(n))
    until(lambda: b"data: 99\n\n\r\n" in peer.read())
    rest = peer.received.removeprefix(HEAD)
    frames = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length - 2 : length + 2] == b"\n\n\r\n"
        frames += rest[:length]
        rest = rest[length + 2 :]
    assert re.findall(rb"data: (\d+)\n\n", frames) == [b"%d" % n for n in range(100)]


@pytest.mark.parametrize("count", [3, 64, 65, 900])
def test_a_client_that_comes_back_gets_what_it_missed_and_then_what_is_live(
    channel, take_over, until, count
):
    start = channel.publish("start")
    for n in range(count):
        channel.publish(n)
    peers = [take_over(channel, last_event_id=start) for _ in range(5)]
    for n in range(count, count + 50):
        channel.publish(n)
    for peer in peers:
        until(lambda peer=peer: len(peer.numbers()) >= count + 50)
        assert peer.numbers() == list(range(count + 50))
        assert b"stream-reset" not in peer.received


def test_connections_come_and_go_while_events_are_published(channel, take_over, until):
    start = channel.publish("start")
    peers = []
    for n in range(300):
        channel.publish(n)
        if n % 3 == 0:
            peers.append(take_over(channel, last_event_id=start))
        if n % 9 == 0:
            peers.pop(0).socket.close()
    for peer in peers:
        until(lambda peer=peer: len(peer.numbers()) >= 300)
        assert peer.numbers() == list(range(300))
    until(lambda: clients(channel) == len(peers))


def test_a_client_behind_history_is_told_of_the_gap(name, take_over, until):
    channel = SSEChannel(name, history=100)
    start = channel.publish("start")
    for n in range(200):
        channel.publish(n)
    peer = take_over(channel, last_event_id=start)
    until(lambda: peer.numbers()[-1:] == [199])
    assert peer.received.count(b"event: stream-reset\n") == 1
    assert peer.numbers() == list(range(100, 200))


def test_several_channels_are_one_stream_in_one_order(name, until):
    first, second = SSEChannel(name), SSEChannel(name + "-other")
    from sse_channel.stream import open_stream

    stream = open_stream(
        [first._core, second._core],
        capacity=100,
        overflow="drop_oldest",
        last_event_id=None,
        heartbeat=None,
        initial=None,
    )
    here, there = socket.socketpair()
    with here, there:
        assert take(stream, there.fileno())
        there.close()
        peer = Peer(here)
        for n in range(40):
            (first, second)[n % 2].publish(n)
        until(lambda: len(peer.numbers()) == 40)
        assert peer.numbers() == list(range(40))
        assert clients(first) == clients(second) == 1
    until(lambda: clients(first) == clients(second) == 0)


def test_a_peer_that_leaves_is_noticed_at_once(channel, take_over, until):
    peer = take_over(channel)
    assert clients(channel) == 1
    peer.socket.close()
    until(lambda: clients(channel) == 0)
    assert channel.stats()["disconnected"]["left"] == 1


def test_a_peer_that_talks_without_end_is_disconnected(channel, take_over, until):
    peer = take_over(channel)
    with contextlib.suppress(BlockingIOError, ConnectionError):
        for _ in range(100):
            peer.socket.send(b"x" * 4096)
            time.sleep(0.001)
    until(lambda: clients(channel) == 0)
    assert channel.stats()["disconnected"]["flood"] == 1


def test_a_heartbeat_comes_when_nothing_else_does(channel, take_over, until):
    busy, idle = take_over(channel, heartbeat=2), take_over(channel, heartbeat=0.3)
    never = take_over(channel)
    for _ in range(15):
        channel.publish("event")
        time.sleep(0.1)
    assert b": heartbeat" not in busy.read()
    until(lambda: idle.read().count(b": heartbeat\n\n") >= 3)
    assert b": heartbeat" not in never.read()


def test_heartbeats_of_clients_that_got_the_same_event_are_spread_in_time(
    channel, take_over, until
):
    peers = [take_over(channel, heartbeat=1) for _ in range(100)]
    channel.publish("for all of them at once")
    # When each was seen to have its first, second and third heartbeat.
    seen: list[dict[int, float]] = [{}, {}, {}]

    def all_have_three() -> bool:
        for number, peer in enumerate(peers):
            for count in range(min(peer.read().count(b": heartbeat\n\n"), 3)):
                seen[count].setdefault(number, time.monotonic())
        return len(seen[2]) == len(peers)

    until(all_have_three)
    # A quarter of the interval, in steps of 100 ms. A machine in a hurry may look too seldom once.
    assert any(max(times.values()) - min(times.values()) > 0.15 for times in seen)


@pytest.mark.parametrize("policy", ["disconnect", "drop_oldest", "drop_newest"])
@pytest.mark.parametrize("limit", ["frames", "size"])
def test_a_backlog_is_bounded(channel, take_over, until, policy, limit):
    text = "x" * 50_000
    limits = {"frames": 20} if limit == "frames" else {"size": 20 * 50_050}
    slow = take_over(channel, policy=policy, receive_buffer=4096, **limits)
    quick = take_over(channel)
    for n in range(400):
        channel.publish(f"{n}{text}")
        # The other one keeps up, whatever becomes of the first.
        until(lambda n=n: len(quick.numbers()) == n + 1)
    figures = channel.stats()
    if policy == "disconnect":
        until(lambda: clients(channel) == 1)
        assert channel.stats()["disconnected"]["overflow"] == 1
        return
    assert clients(channel) == 2
    dropped = figures["dropped"]
    assert dropped > 200
    until(lambda: len(slow.numbers()) == 400 - dropped)
    kept = slow.numbers()
    assert kept == sorted(kept)
    assert (kept[-1] == 399) == (policy == "drop_oldest")


def test_streams_of_a_private_channel_end_with_it(take_over, until):
    channel = SSEChannel()
    peer = take_over(channel, chunked=True)
    channel.publish("last words")
    del channel
    until(lambda: (peer.read(), peer.is_ended)[1])
    assert peer.received.endswith(b"data: last words\n\n\r\n0\r\n\r\n")


def test_an_object_without_a_wire_form_meets_no_offloaded_stream(take_over):
    channel = SSEChannel()
    take_over(channel)
    with pytest.raises(TypeError, match="JSON"):
        channel.publish(object())


def test_ten_thousand_events_in_a_burst_arrive_in_order(channel, take_over, until):
    peers = [take_over(channel, frames=20_000, size=1 << 24) for _ in range(3)]
    for n in range(10_000):
        channel.publish(n)
    for peer in peers:
        until(lambda peer=peer: peer.received.endswith(b"data: 9999\n\n") or not peer.read(), 60)
        assert peer.numbers() == list(range(10_000))
    until(lambda: channel.stats()["delivered"] == 30_000)


def test_connections_leave_no_descriptor_and_no_memory_behind(channel, take_over, until):
    import psutil

    process = psutil.Process()
    take_over(channel).socket.close()
    until(lambda: clients(channel) == 0)
    descriptors, threads = process.num_fds(), process.num_threads()
    for _ in range(20):
        peers = [take_over(channel) for _ in range(50)]
        channel.publish("for all")
        for peer in peers:
            peer.socket.close()
        until(lambda: clients(channel) == 0)
    assert process.num_fds() == descriptors
    assert process.num_threads() == threads
    assert stats()["offload"]["connections"] == 0


def test_a_forked_child_does_not_keep_connections_open(script):
    script(
        """
import os, time
from handover import taken
from sse_channel import SSEChannel, _sse_channel
channel = SSEChannel("news")
here = taken(channel)
read, write = os.pipe()
child = os.fork()
if child == 0:
    # It has no connection, and can have its own.
    assert channel.stats()["clients"]["socket"] == 0
    mine = taken(channel)
    channel.publish("in the child")
    mine.settimeout(30)
    found = b""
    while b"in the child" not in found:
        found += mine.recv(1000)
    os.write(write, b"x")
    time.sleep(60)
    os._exit(0)
os.read(read, 1)
here.settimeout(30)
found = b""
while b"in the child" not in found:
    found += here.recv(1000)
_sse_channel.end_streams(wait=True, retry=3000)
while data := here.recv(1000):
    found += data
assert found.endswith(b"\\n\\n") and b"retry: " in found, found
here.close()
os.kill(child, 9)
os.waitpid(child, 0)
"""
    )


def test_the_end_tells_each_client_when_to_come_back_and_not_all_at_once(script):
    out = script(
        """
import re
from handover import taken
from sse_channel import SSEChannel, _sse_channel
channel = SSEChannel("news")
peers = [taken(channel, chunked=True) for _ in range(50)]
channel.publish("last")
# Nobody reads yet: what is sent is sent all the same. This is what the interpreter's end does.
_sse_channel.close_all()
retries = set()
for peer in peers:
    received = b""
    while data := peer.recv(1000):
        received += data
    assert b"data: last" in received
    assert received.endswith(b"\\n\\n\\r\\n0\\r\\n\\r\\n"), received
    peer.close()
    retries.add(int(re.findall(rb"retry: (\\d+)", received)[-1]))
assert all(1500 <= retry <= 4500 for retry in retries), retries
print(len(retries))
""",
        SSE_CHANNEL_BUS="memory://",
    )
    assert int(out) > 40


def test_more_connections_than_the_soft_limit_of_descriptors_allows(script):
    script(
        """
import resource
from handover import taken
from sse_channel import SSEChannel
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
channel = SSEChannel("news")
peers = [taken(channel) for _ in range(300)]
assert channel.stats()["clients"]["socket"] == 300
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
for peer in peers:
    peer.close()
""",
        SSE_CHANNEL_BUS="memory://",
    )


def test_a_second_thread_begins_when_the_first_has_enough(script):
    script(
        """
import re, time
from pathlib import Path
from handover import taken
from sse_channel import SSEChannel

def threads():
    names = (task.read_text() for task in Path("/proc/self/task").glob("*/comm"))
    return sorted(name.strip() for name in names if name.startswith("sse-channel-io"))

channel = SSEChannel("news")
peers = [taken(channel, threads=2) for _ in range(1000)]
assert threads() == ["sse-channel-io0"]
peers.append(taken(channel, threads=2))
# A thread that has just begun may not have its name yet.
deadline = time.monotonic() + 30
while threads() != ["sse-channel-io0", "sse-channel-io1"]:
    assert time.monotonic() < deadline, threads()
    time.sleep(0.01)
peers += [taken(channel, threads=2) for _ in range(500)]
assert len(threads()) == 2
for n in range(5):
    channel.publish(n)
for peer in peers:
    received = b""
    while b"data: 4" not in received:
        received += peer.recv(10000)
    assert re.findall(rb"data: (\\d)", received) == [b"0", b"1", b"2", b"3", b"4"]
    peer.close()
""",
        SSE_CHANNEL_BUS="memory://",
    )


def test_without_a_descriptor_left_nothing_is_done(script):
    script(
        """
import resource, socket
from handover import take
from sse_channel import SSEChannel
channel = SSEChannel("news")
here, there = socket.socketpair()
assert take(channel.stream(), there.fileno())
resource.setrlimit(resource.RLIMIT_NOFILE, (there.fileno() + 1, there.fileno() + 1))
stream = channel.stream()
try:
    take(stream, there.fileno())
except OSError as error:
    print(error)
else:
    raise AssertionError("it has none")
# The stream is as it was, for the server to iterate.
assert not stream.closed
assert channel.stats()["clients"] == {"queue": 0, "stream": 1, "socket": 1}
event_id = channel.publish("one")
assert next(stream).startswith(b"retry: 3000")
assert next(stream) == f"id: {event_id}\\ndata: one\\n\\n".encode()
here.close()
there.close()
""",
        SSE_CHANNEL_BUS="memory://",
    )


def test_a_first_payload_larger_than_the_backlog_reaches_a_slow_client(channel, take_over, until):
    body = b"data: " + b"x" * (4 << 20) + b"\n\n"
    peer = take_over(channel, body=body, size=10_000, receive_buffer=4096)
    for n in range(3):
        channel.publish(n)
    until(lambda: len(peer.numbers()) == 3)
    assert body in peer.received
    assert clients(channel) == 1


def test_what_is_replayed_is_no_backlog(channel, take_over, until):
    start = channel.publish("start")
    for n in range(60):
        channel.publish(f"{n}{'x' * 20_000}")
    peer = take_over(channel, last_event_id=start, frames=10, receive_buffer=4096)
    channel.publish(60)
    until(lambda: len(peer.numbers()) == 61)
    assert peer.numbers() == list(range(61))


def test_no_event_waits_for_the_next_one(channel, take_over):
    """Nothing else wakes the thread: a ring that got lost would be waited for in vain."""
    peer = take_over(channel)
    end = time.monotonic() + 5
    number = 0
    while time.monotonic() < end:
        for _ in range(number % 7 + 1):
            channel.publish(number)
            number += 1
        # Less than the ten seconds after which a connection is looked after anyway.
        patience = time.monotonic() + 5
        while len(peer.numbers()) < number:
            assert time.monotonic() < patience, f"event {number - 1} was not written"
    assert peer.numbers() == list(range(number))


def test_listeners_count_offloaded_connections(channel, take_over, until):
    queue = channel.listen()
    peer = take_over(channel)
    assert len(channel.listeners) == 2
    assert list(channel.listeners) == list(reversed(channel.listeners)) == [queue]
    channel.unlisten(queue)
    assert channel.listeners
    peer.socket.close()
    until(lambda: not channel.listeners)


def test_a_stream_that_has_ended_is_not_taken(name):
    channel = SSEChannel(name, capacity=1, overflow="disconnect")
    stream = channel.stream()
    for n in range(2):
        channel.publish(n)
    here, there = socket.socketpair()
    with here, there:
        assert not take(stream, there.fileno())
    # It gives what it has, as if nobody had tried.
    assert next(stream).startswith(b"retry: 3000")
    assert b"data: 0\n\n" in next(stream)
    assert next(stream, None) is None


def inode(connection: socket.socket) -> int:
    return os.fstat(connection.fileno()).st_ino


def test_the_servers_number_is_never_a_second_way_to_the_connection(channel, until):
    here, there = socket.socketpair()
    dead, other = socket.socketpair()
    with here, there, dead, other:
        assert take(channel.stream(), there.fileno(), HEAD, instead=dead.fileno())
        assert inode(there) == inode(dead)
        assert not os.get_inheritable(there.fileno())
        there.sendall(b"from the server")
        assert other.recv(100) == b"from the server"
        peer = Peer(here)
        until(lambda: b"retry: " in peer.read())
        assert peer.received.startswith(HEAD)
        assert b"from the server" not in peer.received


def test_a_connection_that_is_not_taken_stays_the_servers(channel):
    stream = channel.stream()
    next(stream)
    here, there = socket.socketpair()
    dead, other = socket.socketpair()
    with here, there, dead, other:
        before = inode(there)
        assert not take(stream, there.fileno(), HEAD, instead=dead.fileno())
        assert inode(there) == before
        there.sendall(b"from the server")
        assert here.recv(100) == b"from the server"


def test_streams_that_begin_while_all_end_are_told_when_to_come_back(script):
    script(
        """
import re, socket, threading
from handover import take, taken
from sse_channel import SSEChannel, _sse_channel

channel, private = SSEChannel("news"), SSEChannel()
peer = taken(channel)
open_ones = [channel.stream(heartbeat=None), private.stream(heartbeat=None)]
for stream in open_ones:
    next(stream)
# It has no say in when streams come back.
queue = channel.listen()
results = [[], []]
threads = [threading.Thread(target=lambda s=s, r=r: r.extend(s), daemon=True)
           for s, r in zip(open_ones, results)]
for thread in threads:
    thread.start()
_sse_channel.end_streams(wait=False, retry=3000)
for thread in threads:
    thread.join(30)
def check(farewell):
    (retry,) = re.fullmatch(rb"retry: (\\d+)\\n\\n", farewell).groups()
    assert 1500 <= int(retry) <= 4500, retry
for (farewell,) in results:
    check(farewell)

(farewell,) = channel.stream(initial="not said any more")
check(farewell)
late = channel.stream()
late.close()
assert list(late) == []
here, there = socket.socketpair()
with here, there:
    assert not take(channel.stream(), there.fileno())
_sse_channel.end_streams(wait=True, retry=3000)
# Nobody holds them any more, and nobody is passed anything.
assert channel.stats()["clients"] == {"queue": 1, "stream": 0, "socket": 0}
assert channel.stats()["disconnected"]["exit"] == 2
peer.close()
# Queues go on, as ever.
channel.publish("still")
assert queue.get(timeout=10) == "still"

# Where the process goes on, it can serve again.
stream = channel.stream()
assert next(stream).startswith(b"retry: 3000\\n")
channel.publish("again")
assert b"data: again" in next(stream)
with taken(channel) as here:
    assert here.recv(100).startswith(b"retry: 3000")
""",
        SSE_CHANNEL_BUS="memory://",
    )


VANISHED = """
import socket, subprocess, time
from handover import take
from sse_channel import SSEChannel

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
channel = SSEChannel("news")
with socket.create_server(("127.0.0.1", 0)) as listener:
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
with client, server:
    assert take(channel.stream(heartbeat=1), server.fileno())
    assert client.recv(100).startswith(b"retry: ")
    # No packet comes through any more, and nobody says so.
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    deadline = time.monotonic() + 90
    while channel.stats()["clients"]["socket"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
print(channel.stats()["disconnected"]["timeout"])
"""


def test_a_peer_that_vanishes_without_a_word_is_given_up(script):
    """Without TCP_USER_TIMEOUT that takes the kernel a quarter of an hour."""
    if shutil.which("ip") is None or os.getuid() != 0:
        missing("ip (iproute2) and the right to make a network namespace")
    out = script(VANISHED, command=["unshare", "--net"], SSE_CHANNEL_BUS="memory://")
    assert out == "1\n"


def test_streams_of_threads_get_their_farewell_however_late_they_look(script):
    script(
        """
import threading
from sse_channel import SSEChannel, _sse_channel

channel = SSEChannel()
streams = [channel.stream(heartbeat=None) for _ in range(20)]
for stream in streams:
    next(stream)
channel.publish("last")
_sse_channel.end_streams(wait=True, retry=3000)
for stream in streams:
    last, farewell = stream
    assert b"data: last" in last
    assert farewell.startswith(b"retry: "), farewell
""",
    )


def test_the_first_stream_of_all_may_come_when_all_end(script):
    script(
        """
from sse_channel import SSEChannel, _sse_channel

_sse_channel.end_streams(wait=False, retry=3000)
(farewell,) = SSEChannel().stream()
assert 1500 <= int(farewell.removeprefix(b"retry: ")) <= 4500, farewell
""",
    )
