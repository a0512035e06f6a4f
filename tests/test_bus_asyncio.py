"""Waiting for the bus on asyncio: the loop runs others meanwhile, nothing is sent half."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from parts import preloaded

HOLD = """
import fcntl, sys
with open(sys.argv[1], "r+b") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sse-", dir="/tmp") as path:
        yield Path(path) / "bus"


BEGIN = """
import asyncio, contextlib, subprocess, sys, time
from sse_channel import BusError, SSEChannel, configure, stats

@contextlib.contextmanager
def held():
    # Another process at the store, for as long as it likes.
    with subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\\n"
        yield holder
        holder.stdin.close()

async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)

channel = SSEChannel("news")
"""


@pytest.fixture
def run(script, directory: Path):
    def run(code: str) -> str:
        bus = f"local://{directory}"
        whole = f"{BEGIN}\nasync def main():\n{code}\nasyncio.run(main())\n"
        return script(whole, HOLD, str(directory / "lock"), SSE_CHANNEL_BUS=bus)

    return run


def test_the_loop_runs_while_a_publish_waits_for_another_process(run):
    out = run("""
    queue = await channel.alisten()
    await channel.apublish("first")
    with held():
        waiting = [asyncio.ensure_future(channel.apublish(n)) for n in range(10)]
        await until(lambda: stats()["bus"]["waiting"] == 10)
        print(any(task.done() for task in waiting))
    ids = await asyncio.gather(*waiting)
    print(ids == sorted(ids), [await queue.aget(timeout=30) for _ in range(11)])
    print(stats()["channels"]["news"]["published"])
""")
    assert out == "False\nTrue ['first', 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n11\n"


def test_a_cancelled_publish_that_has_not_begun_is_not_sent(run):
    out = run("""
    queue = await channel.alisten()
    await channel.apublish("first")
    with held():
        kept = asyncio.ensure_future(channel.apublish("kept"))
        cancelled = asyncio.ensure_future(channel.apublish("cancelled"))
        await until(lambda: stats()["bus"]["waiting"] == 2)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        print(cancelled.cancelled())
    await kept
    await channel.apublish("last")
    print([await queue.aget(timeout=30) for _ in range(3)], queue.qsize())
""")
    assert out == "True\n['first', 'kept', 'last'] 0\n"


def test_a_publish_that_takes_too_long_says_who_is_in_the_way(run):
    out = run("""
    await channel.apublish("first")
    configure(publish_timeout=0.2)
    with held():
        try:
            await channel.apublish("never")
        except BusError as error:
            print(error)
    print(len(await channel.apublish("last")) > 0)
""")
    assert "nothing was sent: within 0.2 s (PUBLISH_TIMEOUT)" in out
    assert "holds the lock" in out
    assert out.endswith("True\n")


def test_a_timeout_does_not_wait_for_who_holds_the_interpreter(run):
    # The first error must not have the thread of all timeouts wait for the GIL: the second would
    # come when the bus has begun already.
    out = run("""
    import ctypes
    await channel.apublish("first")
    waiting = []
    with held() as holder:
        for timeout in (0.2, 0.5):
            configure(publish_timeout=timeout)
            waiting.append(asyncio.ensure_future(channel.apublish("never")))
            await asyncio.sleep(0)
        with subprocess.Popen(["sleep", "1.5"], stdout=holder.stdin):
            holder.stdin.close()
            ctypes.PyDLL(None).usleep(2_500_000)
    print(await asyncio.gather(*waiting, return_exceptions=True))
""")
    assert out.count("nothing was sent: within 0.2 s") == 1
    assert out.count("nothing was sent: within 0.5 s") == 1


def test_a_stream_that_has_to_wait_for_the_bus_is_opened_by_its_first_step(run):
    out = run("""
    channel.publish("before")
    with held():
        stream = channel.stream(heartbeat=None, initial=lambda: "initial")
        closed = channel.stream(heartbeat=None)
        never_iterated = channel.stream()
        first = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0.1)
        print(first.done(), len(channel.listeners))
        closed.close()
    opening = await first
    print(opening.startswith(b"retry: "), await stream.__anext__())
    await channel.apublish("live")
    print((await stream.__anext__()).endswith(b"data: live\\n\\n"), len(channel.listeners))
    print([chunk async for chunk in closed])
    stream.close()
    print(len(channel.listeners))
""")
    assert out == ("False 0\nTrue b'data: initial\\n\\n'\nTrue 1\n[]\n0\n")


def test_such_a_stream_can_be_iterated_by_a_thread(run):
    out = run("""
    channel.publish("before")
    with held():
        stream = channel.stream(heartbeat=None)
    print((await asyncio.to_thread(next, stream)).startswith(b"retry: "))
    stream.close()
""")
    assert out == "True\n"


def test_a_loop_that_ends_with_a_publish_under_way_ends(script, directory):
    """The publish is withdrawn or done; nothing hangs, nothing is raised where nobody looks."""
    out = script(
        BEGIN
        + """
async def main():
    await channel.apublish("first")
    with held():
        asyncio.ensure_future(channel.apublish("under way"))
        await until(lambda: stats()["bus"]["waiting"] == 1)

asyncio.run(main())
print("over")
""",
        HOLD,
        str(directory / "lock"),
        SSE_CHANNEL_BUS=f"local://{directory}",
    )
    assert out == "over\n"


def test_an_answer_that_comes_when_its_loop_is_closed_is_dropped(script, directory):
    """A stream never iterated waits in no task, so that nothing cancels it at the loop's end."""
    out = script(
        BEGIN
        + """
async def main():
    channel.publish("before")
    hold.enter_context(held())
    pending.extend([channel.stream(), channel.stream()])

class Loop(asyncio.SelectorEventLoop):
    def call_soon_threadsafe(self, *arguments, **options):
        try:
            return super().call_soon_threadsafe(*arguments, **options)
        except RuntimeError:
            refused.append(time.monotonic())
            raise

pending, refused, hold = [], [], contextlib.ExitStack()
loop = Loop()
loop.run_until_complete(main())
loop.close()
hold.close()
# A moment more, for what might be printed.
while len(refused) < 2 or time.monotonic() < refused[-1] + 0.2:
    time.sleep(0.01)
print(asyncio.run(channel.apublish("after")) is not None)
""",
        HOLD,
        str(directory / "lock"),
        SSE_CHANNEL_BUS=f"local://{directory}",
    )
    assert out == "True\n"


def test_a_stream_that_is_closed_while_it_opens_ends(run):
    out = run("""
    channel.publish("before")
    with held():
        stream = channel.stream(heartbeat=None)
        first = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0.1)
        stream.close()
    try:
        await first
    except StopAsyncIteration:
        print("ended", len(channel.listeners))
""")
    assert out == "ended 0\n"


def test_the_interpreter_may_end_while_results_are_handed_over(run):
    """The threads that do it need the interpreter, which does not take them down with it."""
    for _ in range(10):
        out = run("""
    await channel.apublish("first")
    configure(publish_timeout=0.05)
    with held():
        results = await asyncio.gather(
            *[channel.apublish(n) for n in range(20)], return_exceptions=True
        )
    print({type(result) for result in results} == {BusError})
""")
        assert out == "True\n"


def test_a_name_server_that_is_silent_holds_up_no_answer(script, tmp_path):
    """Lookups cannot be ended: those that were given up must be in nobody's way."""
    out = script(
        """
import asyncio, os, time
from pathlib import Path
from sse_channel import BusError, SSEChannel

async def main():
    channel = SSEChannel("news")
    for pause in (0, 7, 6):
        await asyncio.sleep(pause)
        began = time.monotonic()
        try:
            await channel.apublish("text")
        except BusError as error:
            # Twice its PUBLISH_TIMEOUT, on a slow machine; a lookup takes a minute.
            assert time.monotonic() - began < 25, time.monotonic() - began
            assert "redis.slow" in str(error), error
        else:
            raise AssertionError("it was published")

asyncio.run(main())
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
print(names.count("sse-channel-dns\\n"), flush=True)
os._exit(0)
""",
        SSE_CHANNEL_BUS="redis://redis.slow:6379/0",
        SSE_CHANNEL_PUBLISH_TIMEOUT="1",
        LD_PRELOAD=str(preloaded("slow_names.c", tmp_path)),
    )
    assert out == "1\n", "lookups beside each other"
