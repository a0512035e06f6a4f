"""Cases for gevent, each run in a process of its own: python greenlet_cases.py CASE [patched]."""

from __future__ import annotations

import os
import sys

if "patched" in sys.argv:
    from gevent import monkey

    monkey.patch_all()

import asyncio
import contextvars
import gc
import logging
import queue
import time
import traceback
import warnings

import gevent
import gevent.event
import gevent.hub
import gevent.monkey
import gevent.queue
import greenlet

from sse_channel import ChannelClosed, SSEChannel, _sse_channel, configure

# A real thread, patched or not.
start_thread = gevent.monkey.get_original("_thread", "start_new_thread")
real_sleep = gevent.monkey.get_original("time", "sleep")

channel = SSEChannel("greenlets", capacity=100_000)


def parking():
    """The one parking of this process; those of the loops of other tests are elsewhere."""
    return next(each for each in gc.get_objects() if isinstance(each, _sse_channel.Parking))


def join(*greenlets):
    gevent.joinall(greenlets, timeout=60, raise_error=True)
    assert all(each.dead for each in greenlets)


def case_others_run_while_one_waits():
    q, ticks = channel.listen(), []

    def tick():
        while len(ticks) < 100:
            ticks.append(1)
            gevent.sleep(0)
        channel.publish("done")

    gevent.spawn(tick)
    assert q.get(timeout=60) == "done"
    assert len(ticks) == 100


def case_a_native_thread_wakes_greenlets():
    q = channel.listen()
    readers = [gevent.spawn(channel.listen().get) for _ in range(50)]
    reader = gevent.spawn(q.get, timeout=60)
    gevent.sleep(0.01)
    start_thread(lambda: (real_sleep(0.1), channel.publish("thread")), ())
    join(reader, *readers)
    assert [each.value for each in (reader, *readers)] == ["thread"] * 51


def case_a_greenlet_wakes_threads_and_loops():
    import asyncio

    got = []
    queues = [channel.listen() for _ in range(2)]

    def thread():
        # No hub runs in this thread: it blocks, and only itself.
        got.append(queues[0].get(timeout=60))

    def loop():
        own = asyncio.new_event_loop()
        message = own.run_until_complete(queues[1].aget(timeout=60))
        own.close()
        got.append(message)

    start_thread(thread, ())
    if "patched" not in sys.argv:
        start_thread(loop, ())
    else:
        queues[1].close()
        got.append("greenlet")
    gevent.sleep(0.2)
    channel.publish("greenlet")
    while len(got) < 2:
        gevent.sleep(0.01)
    assert got == ["greenlet"] * 2


def case_timeouts_raise_either_empty_and_lose_nothing():
    assert gevent.queue.Empty is queue.Empty
    q = channel.listen()
    start = time.monotonic()
    try:
        q.get(timeout=0.05)
        raise AssertionError("nothing was published")
    except gevent.queue.Empty:
        assert time.monotonic() - start >= 0.05
    for _ in range(20):
        reader = gevent.spawn(q.get, timeout=0.02)
        gevent.sleep(0.0199)
        channel.publish("x")
        reader.join(60)
        # Either the reader has it or it is still there.
        assert reader.value == "x" if reader.successful() else q.get_nowait() == "x"
        assert q.empty()
    q.put_nowait(1)
    assert q.get(timeout=0) == 1


def case_a_killed_wait_leaves_the_message_for_the_next():
    q = channel.listen()
    for late in (False, True):
        first, second = gevent.spawn(q.get), gevent.spawn(q.get)
        gevent.sleep(0)
        channel.publish("x")
        if late:
            # Dead before the bell is heard, and after its own wake-up was due.
            first.kill(block=False)
        else:
            first.kill()
        join(second) if first.value != "x" else channel.publish("x")
        join(second)
        assert second.value == "x"
        assert q.empty()
    with gevent.Timeout(0.05, False):
        q.get()
    channel.publish("y")
    assert q.get_nowait() == "y"


def case_only_those_who_have_something_are_woken():
    channels = [SSEChannel(f"greenlets-{number}") for number in range(20)]
    readers = [gevent.spawn(each.listen().get, timeout=60) for each in channels]
    gevent.sleep(0.01)
    assert (len(parking()), parking().resumed) == (20, 0)
    channels[7].publish("x")
    readers[7].join(60)
    assert readers[7].value == "x"
    gevent.sleep(0.05)
    assert (len(parking()), parking().resumed) == (19, 1)
    gevent.killall(readers)
    assert len(parking()) == 0


def case_ten_thousand_waiting_cost_one_descriptor_and_one_thread():
    # What the bus and the figures of a process cost is counted elsewhere.
    configure(bus="memory://")
    assert len(channel.listeners) == 0

    def count(what):
        return len(os.listdir(f"/proc/self/{what}"))

    gevent.sleep(0)
    descriptors, threads = count("fd"), count("task")
    queues = [channel.listen() for _ in range(10_000)]
    readers = [gevent.spawn(q.get, timeout=100) for q in queues]
    gevent.sleep(0.01)
    assert count("fd") - descriptors <= 1
    # The timer's.
    assert count("task") - threads <= 1
    channel.publish("x")
    join(*readers)
    assert all(each.value == "x" for each in readers)


def case_waiting_polls_nothing():
    readers = [gevent.spawn(channel.listen().get, timeout=60) for _ in range(100)]
    readers += [gevent.spawn(next, channel.stream(heartbeat=60)) for _ in range(100)]
    gevent.sleep(0.1)

    def switches():
        """How often a thread of this process was scheduled so far."""
        count = 0
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/status") as status:
                count += sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)
        return count

    # The sleep wakes the hub once; others on a busy machine may push it aside a few times.
    def quiet():
        before = switches()
        gevent.sleep(1)
        return switches() - before < 10

    assert any(quiet() for _ in range(10))
    gevent.killall(readers)


def case_messages_of_many_publishers_arrive_once_and_in_order():
    got = [[] for _ in range(50)]

    def read(q, mine):
        while len(mine) < 400:
            mine.append(q.get(timeout=60))

    readers = [gevent.spawn(read, channel.listen(), mine) for mine in got]
    gevent.sleep(0)

    def publish(who):
        for number in range(100):
            channel.publish([who, number])
            if number % 7 == 0:
                gevent.sleep(0)

    start_thread(publish, ("thread",)) if "patched" not in sys.argv else gevent.spawn(publish, "t")
    for who in range(3):
        gevent.spawn(publish, who)
    join(*readers)
    assert all(mine == got[0] for mine in got)
    by_publisher = {}
    for who, number in got[0]:
        by_publisher.setdefault(str(who), []).append(number)
    assert list(by_publisher.values()) == [list(range(100))] * 4


def case_the_loop_lives_while_somebody_waits_and_ends_after():
    q = channel.listen()
    start_thread(lambda: (real_sleep(0.2), channel.publish("late")), ())
    # Without a watcher that counts, the hub would find nothing to wait for: LoopExit.
    assert q.get() == "late"
    with gevent.Timeout(0.01, False):
        q.get()
    assert gevent.wait(timeout=30), "nobody waits, and the loop would not end"


def case_a_callback_of_the_hub_does_not_wait():
    q, seen = channel.listen(), []

    def callback():
        try:
            q.get(timeout=60)
        except queue.Empty:
            seen.append("empty")

    gevent.get_hub().loop.run_callback(callback)
    gevent.sleep(0.01)
    assert seen == ["empty"]
    channel.publish("x")
    gevent.get_hub().loop.run_callback(lambda: seen.append(q.get()))
    gevent.sleep(0.01)
    assert seen == ["empty", "x"]


def case_an_error_after_the_wait_is_reported_and_the_others_go_on():
    class Failure(Exception):
        pass

    reported = []
    gevent.get_hub().handle_error = lambda context, kind, value, tb: reported.append(kind)

    def read(q):
        q.get(timeout=60)
        raise Failure

    raw = [greenlet.greenlet(read, gevent.get_hub()) for _ in range(3)]
    for each in raw:
        gevent.get_hub().loop.run_callback(each.switch, channel.listen())
    readers = [gevent.spawn(channel.listen().get, timeout=60) for _ in range(3)]
    failing = [gevent.spawn(read, channel.listen()) for _ in range(3)]
    gevent.sleep(0.01)
    channel.publish("x")
    gevent.joinall(readers + failing, timeout=60)
    assert [each.value for each in readers] == ["x"] * 3
    assert all(isinstance(each.exception, Failure) for each in failing)
    assert reported == [Failure] * 6
    assert len(parking()) == 0


def case_a_close_wakes_and_a_closed_queue_does_not_spin():
    q = channel.listen()
    ends = []

    def read():
        try:
            q.get()
        except ChannelClosed:
            ends.append(1)

    readers = [gevent.spawn(read) for _ in range(3)]
    gevent.sleep(0.01)
    channel.unlisten(q)
    join(*readers)
    assert ends == [1, 1, 1]
    start, ticks = time.monotonic(), []
    ticker = gevent.spawn(lambda: [(ticks.append(1), gevent.sleep(0)) for _ in range(100)])
    try:
        q.get(timeout=0.1)
        raise AssertionError("it is closed")
    except queue.Empty:
        assert time.monotonic() - start >= 0.1
    join(ticker)


def case_streams_wait_as_queues_do():
    def read():
        stream = channel.stream(heartbeat=0.05)
        opening = next(stream)
        # On a busy machine one or more come before the event, too.
        event = next(step for step in stream if step != b": heartbeat\n\n")
        return opening, event, next(stream)

    readers = [gevent.spawn(read) for _ in range(20)]
    while len(channel.listeners) < len(readers):
        gevent.sleep(0.01)
    channel.publish("x")
    join(*readers)
    for each in readers:
        opening, event, heartbeat = each.value
        assert opening.startswith(b"retry: ")
        assert event.endswith(b"\ndata: x\n\n")
        assert heartbeat == b": heartbeat\n\n"
    assert len(channel.listeners) == 0
    waiting = channel.stream(heartbeat=None)
    next(waiting)
    killed = gevent.spawn(next, waiting)
    gevent.sleep(0.01)
    killed.kill()
    assert len(channel.listeners) == 0


def case_what_renders_knows_nothing_of_the_greenlet_that_was_first():
    of_request = contextvars.ContextVar("of_request", default=None)
    seen = []

    def render(message):
        seen.append(of_request.get())
        return message

    def view(cursor):
        of_request.set("the first client's")
        stream = channel.stream(render=render, key=1, last_event_id=cursor)
        given = next(stream)
        while b"data: live" not in given:
            given += next(stream)
        stream.close()

    cursor = channel.publish("missed")
    channel.publish("missed")
    viewer = gevent.spawn(view, cursor)
    while not seen:
        gevent.sleep(0.01)
    channel.publish("live")
    join(viewer)
    assert seen == [None, None]


def case_an_asynchronous_render_is_refused_where_greenlets_are_threads():
    async def render(message):
        return message

    async def on_loop():
        # It has a loop to run on.
        with channel.stream(render=render, key=1) as stream:
            await anext(stream)
            channel.publish("x")
            assert b"data: x" in await anext(stream)

    def rendered(render):
        with channel.stream(render=render, key=2) as stream:
            next(stream)
            channel.publish("x")
            return next(stream)

    logging.disable()
    if "patched" in sys.argv:
        refused = None
        try:
            rendered(render)
        except TypeError as error:
            refused = str(error)
        assert "make render a plain function" in refused
        # Nobody can know it of this one before.
        assert b"stream-error" in rendered(lambda message: render(message))
    else:
        assert b"data: x" in rendered(render)
        asyncio.run(on_loop())


def case_long_work_of_woken_greenlets_lets_the_loop_serve_others():
    """Woken greenlets share turns with the loop's other work."""
    spins = []

    def read(q):
        q.get(timeout=60)
        end = time.perf_counter() + 0.001
        while time.perf_counter() < end:
            pass
        spins.append(1)

    readers = [gevent.spawn(read, channel.listen()) for _ in range(200)]
    gevent.sleep(0.01)
    seen = []
    pipe_read, pipe_write = os.pipe()
    watcher = gevent.get_hub().loop.io(pipe_read, 1)
    watcher.start(lambda: (seen.append(len(spins)), watcher.stop()))
    os.write(pipe_write, b"x")
    channel.publish("x")
    join(*readers)
    assert len(spins) == 200
    assert seen
    assert seen[0] < 200


def case_hubs_of_several_threads_have_each_its_own_bell():
    got, ready = [], []

    def work():
        readers = [gevent.spawn(channel.listen().get, timeout=60) for _ in range(10)]
        gevent.sleep(0)
        ready.append(1)
        gevent.joinall(readers)
        got.extend(each.value for each in readers)
        gevent.get_hub().destroy(destroy_loop=True)

    gevent.sleep(0)
    for number in range(3):
        start_thread(work, ())
        # One at a time: hubs import while they are made, and patched import locks meet badly.
        while len(ready) <= number:
            gevent.sleep(0.01)
    channel.publish("x")
    while len(got) < 30:
        gevent.sleep(0.01)
    assert got == ["x"] * 30


def case_a_destroyed_hub_leaves_no_descriptor():
    def read(q):
        try:
            q.get(timeout=0.001)
        except queue.Empty:
            channel.unlisten(q)

    def work(done):
        gevent.spawn(read, channel.listen()).join()
        gevent.get_hub().destroy(destroy_loop=True)
        done.append(1)

    def rounds(count):
        for _ in range(count):
            done = []
            start_thread(work, (done,))
            while not done:
                real_sleep(0.002)
        real_sleep(0.1)
        gc.collect()

    rounds(3)
    before = len(os.listdir("/proc/self/fd"))
    rounds(10)
    assert len(os.listdir("/proc/self/fd")) <= before, os.listdir("/proc/self/fd")


def case_a_hub_that_is_gone_swallows_no_wake_up():
    gone_readers = []
    # Before other hubs are made: see above.
    gevent.sleep(0)

    def end_over_a_waiting_greenlet(q, destroy):
        reader = gevent.spawn(q.get)
        gone_readers.append(reader)
        gevent.sleep(0.01)
        if destroy:
            gevent.get_hub().destroy(destroy_loop=True)

    for destroy in (False, True):
        for late in (False, True):
            q, ended, go = channel.listen(), [], []

            def work(q=q, destroy=destroy, late=late, ended=ended, go=go):
                # Frames are gone before the thread is.
                end_over_a_waiting_greenlet(q, destroy)
                ended.append(os.readlink("/proc/thread-self"))
                while late and not go:
                    real_sleep(0.01)

            start_thread(work, ())
            while not ended:
                gevent.sleep(0.01)
            second = gevent.spawn(q.get, timeout=60)
            gevent.sleep(0.01)
            if late:
                # Woken first, and gone then.
                channel.publish("x")
                go.append(1)
            while os.path.exists(f"/proc/{ended[0]}"):
                gevent.sleep(0.01)
            if not late:
                channel.publish("x")
            began = time.monotonic()
            join(second)
            assert second.value == "x"
            assert time.monotonic() - began < 20
            channel.unlisten(q)


def in_child(work):
    """Run `work` in a forked child; a descriptor from which the child's "ok" can be read.

    Not by waitpid: gevent reaps children itself, or misses the end of one it does not watch.
    """
    # Python 3.12+ warns of what these cases are about: the timer's thread.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    readable, writable = os.pipe()
    if (gevent.os.fork() if "patched" in sys.argv else os.fork()) == 0:
        try:
            os.close(readable)
            work()
            os.write(writable, b"ok")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writable)
    return readable


def case_a_forked_child_does_not_hear_its_parents_bell():
    # On another bus, each would hear what the other publishes.
    configure(bus="memory://")
    q = channel.listen()

    def read():
        try:
            return q.get(timeout=60)
        except ChannelClosed:
            return "closed"

    reader = gevent.spawn(read)
    gevent.sleep(0.01)

    def work():
        # The child's own loop runs, with the parent's descriptor still in the family.
        mine = channel.listen()
        assert len(channel.listeners) == 1
        other = gevent.spawn(mine.get, timeout=60)
        gevent.sleep(0.3)
        channel.publish("child")
        other.join(60)
        assert other.value == "child"
        assert reader.value == "closed"

    child = in_child(work)
    for number in range(20):
        gevent.sleep(0.02)
        channel.publish(number)
        assert reader.get(timeout=30) == number
        reader = gevent.spawn(read)
        gevent.sleep(0)
    assert os.read(child, 2) == b"ok"
    reader.kill()


def case_a_greenlet_that_waits_through_a_fork_ends_in_the_child():
    q = channel.listen()
    ends = []

    def read():
        try:
            q.get(timeout=60)
        except ChannelClosed:
            ends.append("closed")

    reader = gevent.spawn(read)
    gevent.sleep(0.01)

    def work():
        reader.join(30)
        assert ends == ["closed"]

    assert os.read(in_child(work), 2) == b"ok"
    channel.publish("x")
    join(reader)
    assert ends == []


def case_the_interpreter_ends_while_greenlets_wait():
    for _ in range(3):
        gevent.spawn(channel.listen().get)
        gevent.spawn(list, channel.stream())
    gevent.sleep(0.01)
    # The main greenlet goes on from within the hub's callback, which never returns.
    q = channel.listen()
    start_thread(lambda: (real_sleep(0.05), channel.publish("x")), ())
    assert q.get(timeout=60) == "x"


if __name__ == "__main__":
    globals()["case_" + sys.argv[1]]()
