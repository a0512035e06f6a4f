"""Queues on asyncio, on every kind of loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import queue
import sys
import threading
import time
import weakref

import pytest

from parts import missing
from sse_channel import ChannelClosed, waiting


class WithoutReaders(asyncio.SelectorEventLoop):
    """A loop that cannot watch descriptors, as Windows' proactor loop."""

    def add_reader(self, fd, callback, *args):
        # The loop's own wake-up pipe is watched by another method.
        raise NotImplementedError


def uvloop_loop():
    try:
        import uvloop
    except ImportError:
        missing("uvloop")
    return uvloop.new_event_loop()


LOOPS = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop_loop,
    "without add_reader": WithoutReaders,
}


@pytest.fixture(params=LOOPS)
def run(request):
    """Run a coroutine on each kind of loop."""

    def run(coroutine):
        loop = LOOPS[request.param]()
        try:
            return loop.run_until_complete(coroutine)
        finally:
            loop.close()

    return run


def test_a_publish_from_the_loop_a_thread_and_before_reaches_a_waiting_task(channel, run):
    async def main():
        q = channel.listen()
        channel.publish("before")
        assert await q.aget() == "before"
        asyncio.get_running_loop().call_later(0.05, channel.publish, "loop")
        assert await q.aget(timeout=30) == "loop"
        thread = threading.Timer(0.05, channel.publish, ["thread"])
        thread.start()
        assert await q.aget() == "thread"
        thread.join()

    run(main())


def test_timeouts_raise_empty_and_lose_nothing(channel, run):
    async def main():
        q = channel.listen()
        start = time.monotonic()
        with pytest.raises(queue.Empty):
            await q.aget(timeout=0.05)
        assert time.monotonic() - start >= 0.05
        with pytest.raises(queue.Empty):
            await q.aget(timeout=0)
        with pytest.raises(ValueError, match="non-negative"):
            await q.aget(timeout=-1)
        with pytest.raises(TypeError, match="'timeout' must be a number"):
            await q.aget(timeout="1")
        channel.publish("x")
        assert await q.aget(timeout=0) == "x"

    run(main())


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_cancelled_wait_leaves_the_message_for_the_next(channel, run, turns):
    """However far the wake-up has come when the cancellation meets it."""

    async def main():
        q = channel.listen()
        for number in range(50):
            first, second = (asyncio.create_task(q.aget()) for _ in range(2))
            await asyncio.sleep(0)
            channel.publish(number)
            for _ in range(turns):
                await asyncio.sleep(0)
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await first == number
                channel.publish(number)
            assert await asyncio.wait_for(second, 30) == number
            assert q.empty()

    run(main())


def test_only_those_who_have_something_are_woken(name, run):
    from sse_channel import SSEChannel

    channels = [SSEChannel(f"{name}-{number}") for number in range(20)]

    async def main():
        tasks = [asyncio.create_task(each.listen().aget()) for each in channels]
        await asyncio.sleep(0)
        parking = waiting._parkings[asyncio.get_running_loop()]
        assert (len(parking), parking.resumed) == (20, 0)
        channels[7].publish("x")
        assert await asyncio.wait_for(tasks[7], 30) == "x"
        assert (len(parking), parking.resumed) == (19, 1)
        assert not any(task.done() for task in tasks[:7] + tasks[8:])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(parking) == 0

    run(main())


def test_iteration_ends_with_the_close(channel, run):
    async def main():
        q = channel.listen()
        channel.publish(1)
        channel.publish(2)
        asyncio.get_running_loop().call_later(0.05, q.close)
        assert [message async for message in q] == [1, 2]
        with pytest.raises(ChannelClosed):
            await q.aget()
        # Later it waits, so that a loop that takes it for Empty does not spin.
        start = time.monotonic()
        with pytest.raises(ChannelClosed):
            await q.aget(timeout=0.1)
        # uvloop's clock ticks in milliseconds.
        assert time.monotonic() - start > 0.09

    run(main())


def test_five_hundred_waiting_tasks_cost_one_descriptor_and_no_thread_each(channel, run):
    async def main():
        queues = [channel.listen() for _ in range(500)]
        descriptors = len(os.listdir("/proc/self/fd"))
        threads = len(os.listdir("/proc/self/task"))
        tasks = [asyncio.create_task(q.aget(timeout=60)) for q in queues]
        await asyncio.sleep(0.05)
        assert len(os.listdir("/proc/self/fd")) - descriptors <= 1
        # The timer's, and the bell's where the loop cannot watch it.
        assert len(os.listdir("/proc/self/task")) - threads <= 2
        channel.publish("x")
        assert await asyncio.wait_for(asyncio.gather(*tasks), 30) == ["x"] * 500

    run(main())


def test_loops_in_several_threads_are_woken_each_by_its_own_bell(channel):
    results = []
    ready = threading.Barrier(5)

    def work():
        async def main():
            q = channel.listen()
            waiting_task = asyncio.create_task(q.aget(timeout=60))
            await asyncio.sleep(0)
            await asyncio.get_running_loop().run_in_executor(None, ready.wait)
            results.append(await waiting_task)

        asyncio.run(main())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    ready.wait()
    channel.publish("x")
    for thread in threads:
        thread.join(60)
    assert results == ["x"] * 4


def test_a_closed_loop_leaves_no_descriptor_and_no_object(channel):
    async def main():
        with contextlib.suppress(queue.Empty):
            await channel.listen().aget(timeout=0.01)
        return weakref.ref(asyncio.get_running_loop())

    asyncio.run(main())
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    loops = [asyncio.run(main()) for _ in range(10)]
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert [loop() for loop in loops] == [None] * 10


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_closed_over_waiting_tasks_is_let_go_of(channel, kind):
    """With its descriptor and, where it has one, its thread; and it swallows no wake-up."""
    q = channel.listen()

    def close_over_a_waiting_task():
        loop = LOOPS[kind]()
        task = loop.create_task(q.aget())
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        # Otherwise asyncio complains, rightly, that it is destroyed.
        task._log_destroy_pending = False
        return weakref.ref(loop)

    def count():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    async def timed():
        # Begins the timer's thread, which stays.
        with pytest.raises(queue.Empty):
            await q.aget(timeout=0.01)

    asyncio.run(timed())
    close_over_a_waiting_task()
    before = count()
    loops = [close_over_a_waiting_task() for _ in range(10)]

    async def next_loop():
        with pytest.raises(queue.Empty):
            await q.aget(timeout=0.01)
        reader = asyncio.create_task(q.aget())
        await asyncio.sleep(0)
        channel.publish("x")
        assert await asyncio.wait_for(reader, 30) == "x"

    asyncio.run(next_loop())
    deadline = time.monotonic() + 30
    while count() > before or sum(loop() is not None for loop in loops):
        assert time.monotonic() < deadline, (before, count(), loops)
        time.sleep(0.05)


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("closed", ["before it is woken", "woken", "resumed"])
def test_a_loop_closed_over_a_task_that_is_kept_swallows_no_wake_up(channel, kind, closed):
    q = channel.listen()
    loop = LOOPS[kind]()
    # Kept: nobody closes its coroutine, which would pass the wake-up on.
    task = loop.create_task(q.aget())
    loop.run_until_complete(asyncio.sleep(0.01))
    got = []
    if closed == "before it is woken":
        loop.close()
        publish = threading.Timer(0.1, channel.publish, ["x"])
        publish.start()
        began = time.monotonic()
        got.append(q.get(timeout=30))
        assert time.monotonic() - began < 15
        publish.join()
    else:
        parked = threading.Event()

        async def read():
            reader = asyncio.create_task(q.aget(timeout=30))
            await asyncio.sleep(0.01)
            parked.set()
            got.append(await asyncio.wait_for(reader, 15))

        other = threading.Thread(target=asyncio.run, args=(read(),))
        other.start()
        parked.wait()
        channel.publish("x")
        if closed == "resumed":
            # One turn: its future is resolved, its task would be the next one's.
            loop.call_soon(loop.stop)
            loop.run_forever()
        is_done = task.done()
        assert not is_done or kind == "uvloop"
        if is_done:
            # Its turn goes on to what is ready.
            channel.publish("x")
        loop.close()
        other.join()
    assert got == ["x"]
    task._log_destroy_pending = False


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_timed_waits_of_many_tasks_share_the_one_timer(channel):
    async def main():
        q = channel.listen()
        tasks = [asyncio.create_task(q.aget(timeout=0.05 + n / 1000)) for n in range(50)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, queue.Empty) for each in done)

    asyncio.run(main())
    threads = len(os.listdir("/proc/self/task"))
    asyncio.run(main())
    assert len(os.listdir("/proc/self/task")) == threads
