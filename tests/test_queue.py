"""The queue on plain threads: `queue.Queue`'s reading side, with the GIL released."""

from __future__ import annotations

import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sse_channel import ChannelClosed, ClientQueue, SSEChannel


def test_it_reads_as_queue_queue_does(channel):
    q = channel.listen()
    assert isinstance(q, ClientQueue)
    assert (q.empty(), q.full(), q.qsize(), q.maxsize) == (True, False, 0, 1000)
    for number in range(3):
        channel.publish(number)
    assert (q.empty(), q.qsize()) == (False, 3)
    assert [q.get(), q.get(False), q.get(True, 1)] == [0, 1, 2]
    for call in (q.get_nowait, lambda: q.get(False), lambda: q.get(block=False, timeout=-1)):
        with pytest.raises((queue.Empty, ValueError)):
            call()
    with pytest.raises(queue.Empty):
        q.get(timeout=0)
    # Any truth value, as there.
    channel.publish("x")
    assert q.get(1) == "x"
    for nothing in (0, "", None):
        with pytest.raises(queue.Empty):
            q.get(nothing)


def test_timeouts(channel):
    q = channel.listen()
    start = time.monotonic()
    with pytest.raises(queue.Empty):
        q.get(timeout=0.05)
    assert time.monotonic() - start >= 0.05
    for timeout in (-1, -0.1, math.nan, -math.inf):
        with pytest.raises(ValueError, match="non-negative"):
            q.get(timeout=timeout)
    with pytest.raises(TypeError, match="'timeout' must be a number of seconds or None, not str"):
        q.get(timeout="1")
    for endless in (None, math.inf, 1e300, 2**70):
        channel.publish("x")
        assert q.get(timeout=endless) == "x"


@pytest.mark.parametrize("endless", [None, math.inf, 1e300])
def test_a_wait_without_end_ends_with_a_message(channel, endless):
    q = channel.listen()
    got = []
    reader = threading.Thread(target=lambda: got.append(q.get(timeout=endless)))
    reader.start()
    channel.publish("x")
    reader.join(30)
    assert got == ["x"]


@pytest.mark.parametrize("where", ["main thread", "other thread"])
def test_waiting_releases_the_gil(channel, where):
    """Somebody else publishes what this thread waits for: with the GIL held nobody could."""
    q, ready, got = channel.listen(), threading.Event(), []

    def wait():
        ready.set()
        got.append(q.get(timeout=60))

    def publish():
        ready.wait()
        for number in range(100_000):
            # Python code that runs while the other thread waits.
            number += 1
        channel.publish(number)

    first, second = (wait, publish) if where == "main thread" else (publish, wait)
    other = threading.Thread(target=second)
    other.start()
    first()
    other.join(60)
    assert got == [100_000]


def context_switches(tid: int) -> int:
    status = Path(f"/proc/self/task/{tid}/status").read_text()
    return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)


@pytest.mark.skipif(sys.platform != "linux", reason="counts context switches in /proc")
@pytest.mark.parametrize("timeout", [None, 60])
def test_waiting_polls_nothing(channel, until, timeout):
    """A blocked thread is not scheduled until it has something."""
    q = channel.listen()
    reader = threading.Thread(target=lambda: q.get(timeout=timeout))
    reader.start()
    tid = reader.native_id

    def asleep():
        before = context_switches(tid)
        time.sleep(0.2)
        return context_switches(tid) == before

    until(asleep)
    before = context_switches(tid)
    time.sleep(1)
    assert context_switches(tid) == before
    channel.publish("x")
    reader.join(30)
    assert not reader.is_alive()


INTERRUPTED = """
import signal, sys, threading
from sse_channel import SSEChannel
channel = SSEChannel("x")
client = channel.listen() if sys.argv[1] == "queue" else channel.stream(heartbeat=None)
if sys.argv[1] == "stream":
    next(client)
# CI systems start processes with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
print("waiting", flush=True)
try:
    client.get(**eval(sys.argv[2])) if sys.argv[1] == "queue" else next(client)
except KeyboardInterrupt:
    channel.publish("after")
    if sys.argv[1] == "queue":
        assert client.get(timeout=1) == "after"
    print("interrupted", len(channel.listeners), flush=True)
"""


@pytest.mark.parametrize(
    ("kind", "timeout", "listeners"),
    [("queue", "{}", 1), ("queue", "{'timeout': 1000}", 1), ("stream", "{}", 0)],
)
def test_ctrl_c_interrupts_a_wait(kind, timeout, listeners, until):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, kind, timeout], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "waiting\n"
    # Asleep in the wait, not still on its way to it.
    until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "S")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out == f"interrupted {listeners}\n"
    assert process.returncode == 0


def test_a_signal_whose_handler_returns_does_not_end_a_wait(channel):
    q, handled = channel.listen(), []
    previous = signal.signal(signal.SIGUSR1, lambda *_: handled.append(1))
    try:

        def interrupt_and_publish():
            os.kill(os.getpid(), signal.SIGUSR1)
            while not handled:
                time.sleep(0.01)
            channel.publish("x")

        threading.Timer(0.2, interrupt_and_publish).start()
        assert q.get(timeout=60) == "x"
        assert handled == [1]
    finally:
        signal.signal(signal.SIGUSR1, previous)


@pytest.mark.parametrize(
    ("overflow", "kept", "dropped", "closed"),
    [
        ("drop_oldest", [2, 3, 4], 2, False),
        ("drop_newest", [0, 1, 2], 2, False),
        ("disconnect", [0, 1, 2], 1, True),
    ],
)
def test_overflow_policies_keep_what_they_say_and_count(name, overflow, kept, dropped, closed):
    channel = SSEChannel(name, capacity=3, overflow=overflow)
    q = channel.listen()
    for number in range(5):
        channel.publish(number)
    assert q.full() != closed or closed
    assert (q.dropped, q.closed, q in channel.listeners) == (dropped, closed, not closed)
    assert [q.get_nowait() for _ in range(3)] == kept
    with pytest.raises(ChannelClosed if closed else queue.Empty):
        q.get(timeout=0.01)
    stats = channel.stats()
    assert stats["dropped"] == dropped
    assert stats["disconnected"]["overflow"] == int(closed)


def test_a_message_that_a_blocked_reader_has_in_hand_takes_no_room(name):
    """Nothing is counted as dropped that was not, however slowly the reader gets on."""
    channel = SSEChannel(name, capacity=1)
    q, got = channel.listen(), []

    def read():
        while (message := q.get(timeout=60)) is not None:
            got.append(message)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20_000):
        channel.publish(number)
        if number % 50 == 0:
            time.sleep(0)
    while reader.is_alive():
        q.full() or channel.publish(None)
        time.sleep(0.01)
    reader.join()
    # The None that ended the reader, and what came after it.
    not_counted = 1 + q.qsize()
    assert len(got) + q.dropped + not_counted == channel.stats()["published"]


def test_put_nowait_reaches_one_queue_until_it_is_full(name):
    channel = SSEChannel(name, capacity=2)
    q, other = channel.listen(), channel.listen()
    marker = object()
    q.put_nowait(marker)
    q.put_nowait(2)
    assert q.full()
    with pytest.raises(queue.Full):
        q.put_nowait(3)
    assert q.get_nowait() is marker
    assert (q.get_nowait(), q.dropped, other.empty()) == (2, 0, True)
    q.close()
    with pytest.raises(ChannelClosed):
        q.put_nowait(4)


def test_iteration_ends_with_the_close(channel):
    q = channel.listen()
    for number in range(3):
        channel.publish(number)
    threading.Timer(0.1, q.close).start()
    assert list(q) == [0, 1, 2]
    assert list(q) == []


@pytest.mark.parametrize("ending", ["close", "unlisten"])
def test_a_close_wakes_every_blocked_reader(channel, until, ending):
    q, ends = channel.listen(), []

    def read():
        try:
            q.get()
        except ChannelClosed:
            ends.append(1)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    q.close() if ending == "close" else channel.unlisten(q)
    for reader in readers:
        reader.join(30)
    assert ends == [1, 1, 1]
    assert len(channel.listeners) == 0


def test_an_old_loop_does_not_spin_on_a_closed_queue(channel):
    """It takes ChannelClosed for Empty and sends a heartbeat; the second has to wait."""
    q = channel.listen()
    q.close()
    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(queue.Empty):
            q.get(timeout=0.1)
    assert time.monotonic() - start >= 0.2


def test_several_threads_share_a_queue_without_loss_or_double(channel):
    q, got = channel.listen(), [[] for _ in range(4)]

    def read(mine):
        while True:
            message = q.get(timeout=60)
            if message is None:
                return
            mine.append(message)

    readers = [threading.Thread(target=read, args=(mine,)) for mine in got]
    for reader in readers:
        reader.start()
    for number in range(900):
        channel.publish(number)
    for _ in readers:
        channel.publish(None)
    for reader in readers:
        reader.join(60)
    assert sorted(message for mine in got for message in mine) == list(range(900))
    assert all(mine == sorted(mine) for mine in got)


def test_an_idle_queue_takes_under_two_kilobytes_whatever_its_capacity(script):
    grown = script(
        """
import gc, os
from sse_channel import SSEChannel
def resident():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
channel = SSEChannel(capacity=10_000_000)
queues = [channel.listen() for _ in range(1000)]
before = resident()
queues += [channel.listen() for _ in range(20_000)]
print((resident() - before) / 20_000)
"""
    )
    assert 0 < float(grown) < 2048


def test_clients_that_come_and_go_leave_nothing(script):
    out = script(
        """
import gc, os, queue, threading
from sse_channel import SSEChannel
def resident():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
channel = SSEChannel("x")
def rounds(count):
    for _ in range(count):
        q = channel.listen(); stream = channel.stream()
        channel.publish("message " * 10)
        q.get(timeout=5); next(stream); next(stream)
        channel.unlisten(q); stream.close()
rounds(2000)
descriptors, memory = len(os.listdir("/proc/self/fd")), resident()
rounds(20_000)
print(len(os.listdir("/proc/self/fd")) - descriptors, resident() - memory,
      threading.active_count(), len(channel.listeners))
""",
        # SQLite's cache fills up to its own bound.
        SSE_CHANNEL_BUS="memory://",
    )
    descriptors, memory, threads, listeners = map(int, out.split())
    assert (descriptors, threads, listeners) == (0, 1, 0)
    # 20,000 clients: less than a page each hundred.
    assert memory < 1 << 20
