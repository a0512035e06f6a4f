"""Forks: a child has none of its parent's clients, and works."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time

import pytest

from sse_channel import ChannelClosed, SSEChannel, stats

pytestmark = pytest.mark.filterwarnings(
    # Python 3.12+ warns of what these tests are about.
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def in_child(work) -> int:
    """Run `work` in a forked child; its exit status, 0 when it returned."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_begins_without_clients_and_uses_the_same_channel(channel):
    event_id = channel.publish("before")
    channel.publish("missed")
    q, stream = channel.listen(), channel.stream(heartbeat=None)
    next(stream)

    def work():
        assert len(channel.listeners) == 0
        assert stats()["published"] == 0
        assert q not in channel.listeners
        assert q.closed
        with pytest.raises(ChannelClosed, match="forked"):
            q.get(timeout=60)
        with pytest.raises(queue.Empty):
            q.get_nowait()
        with pytest.raises(ChannelClosed, match="forked"):
            q.put_nowait("x")
        assert list(stream) == []
        q.close()
        stream.close()
        channel.unlisten(q)
        mine = channel.listen(last_event_id=event_id)
        assert mine.reset is None
        assert mine.get(timeout=60) == "missed"
        channel.publish("child")
        assert mine.get(timeout=60) == "child"
        threading.Timer(0.05, channel.publish, ["timer"]).start()
        assert mine.get(timeout=60) == "timer"

    assert in_child(work) == 0
    assert len(channel.listeners) == 2
    channel.publish("parent")
    assert [q.get(timeout=60) for _ in range(3)] == ["child", "timer", "parent"]
    assert b"".join(next(stream) for _ in range(1)).endswith(b"\n\n")
    stream.close()


def test_a_private_channel_works_in_the_child_too():
    channel = SSEChannel()
    q = channel.listen()

    def work():
        mine = channel.listen()
        channel.publish({"a": 1})
        assert mine.get(timeout=60) == {"a": 1}

    assert in_child(work) == 0
    assert q.empty()


def test_a_fork_while_threads_wait_and_publish(channel):
    """Whatever the other threads hold at that moment, the child is not stuck on it."""
    stop = threading.Event()

    def work_on():
        q = channel.listen()
        while not stop.is_set():
            channel.publish("x")
            q.get(timeout=0.001)
            with channel.stream() as stream:
                next(stream)

    threads = [threading.Thread(target=work_on) for _ in range(4)]
    for thread in threads:
        thread.start()

    def work():
        # The parent's threads go on publishing to the other one.
        own = SSEChannel(f"{channel.name}-{os.getpid()}")
        mine = own.listen()
        own.publish("child")
        assert mine.get(timeout=60) == "child"
        with pytest.raises(queue.Empty):
            mine.get(timeout=0.001)

    try:
        assert [in_child(work) for _ in range(30)] == [0] * 30
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_timed_waits_on_a_loop_work_in_the_child(channel):
    """The timer's thread stays with the parent; the child starts its own."""
    import asyncio

    def wait_a_little():
        async def main():
            with pytest.raises(queue.Empty):
                await channel.listen().aget(timeout=0.01)

        asyncio.run(main())

    wait_a_little()
    assert in_child(wait_a_little) == 0


def test_a_child_lets_go_of_its_parents_objects_without_touching_their_locks():
    """The parent's threads wait on the clients that the child drops."""
    channel = SSEChannel()
    q = channel.listen()
    stop = threading.Event()

    def wait_shortly():
        while not stop.is_set():
            with pytest.raises(queue.Empty):
                q.get(timeout=1e-6)

    threads = [threading.Thread(target=wait_shortly) for _ in range(2)]
    for thread in threads:
        thread.start()
    objects = [channel, q, channel.stream()]
    del channel
    try:
        # The signal of in_child ends a child that is stuck.
        assert [in_child(objects.clear) for _ in range(200)] == [0] * 200
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_a_childs_child(channel):
    def work():
        channel.publish("child")
        assert in_child(lambda: channel.listen().close()) == 0
        assert channel.stats()["published"] == 1

    assert in_child(work) == 0


def test_multiprocessing_by_fork(channel, script):
    out = script(
        """
import multiprocessing
from sse_channel import sse_channel
def work(number):
    q = sse_channel.listen()
    sse_channel.publish(number)
    return q.get(timeout=30) == number
if __name__ == "__main__":
    q = sse_channel.listen()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(work, range(4)), q.qsize())
""",
        SSE_CHANNEL_BUS="memory://",
    )
    assert out == "[True, True, True, True] 0\n"


def test_multiprocessing_by_fork_on_one_bus(script):
    out = script(
        """
import multiprocessing
from sse_channel import SSEChannel
channel = SSEChannel("by fork")
def work(number):
    channel.publish(number)
if __name__ == "__main__":
    q = channel.listen()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(work, range(10))
    print(sorted(q.get(timeout=30) for _ in range(10)), q.qsize())
"""
    )
    assert out == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9] 0\n"


def test_a_killed_thread_of_the_parent_is_not_waited_for(channel):
    blocked = threading.Thread(target=lambda: channel.listen().get(timeout=2), daemon=True)
    blocked.start()
    time.sleep(0.05)
    start = time.monotonic()
    assert in_child(lambda: channel.publish("x")) == 0
    assert time.monotonic() - start < 60
    channel.publish("x")
    blocked.join(60)
