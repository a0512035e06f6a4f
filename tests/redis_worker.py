"""A process that the tests of the Redis bus direct: one JSON list a line, `[function, argument…]`.

It answers with `[problem, value]`, one line each.
"""

from __future__ import annotations

import sys

if "gevent" in sys.argv:
    import gevent.monkey

    gevent.monkey.patch_all()

import asyncio
import json
import os
import queue
import threading
import time
import traceback
from typing import Any

import psutil

from sse_channel import BusError, SSEChannel, disconnect, stats
from sse_channel.queue import ClientQueue

queues: dict[str, ClientQueue] = {}
streams: dict[str, Any] = {}
followed: dict[str, list[str]] = {}
# What each publisher did: the message, its id or its error.
published: list[tuple[str, str | None, str | None]] = []
publishers: list[threading.Thread] = []
stopping = threading.Event()


def publish(name: str, message: Any) -> str:
    return SSEChannel(name).publish(message)


def publish_together(name: str, count: int) -> list[str]:
    """The ids of so many events, 0 to `count` - 1, none of which waits for another."""
    channel = SSEChannel(name)

    async def publish_all() -> list[str]:
        return await asyncio.gather(*(channel.apublish(number) for number in range(count)))

    return asyncio.run(publish_all())


def refused(name: str, message: Any) -> str:
    """The error of a publish that must fail, and how long that took."""
    try:
        SSEChannel(name).publish(message)
    except BusError as error:
        return str(error)
    raise AssertionError("it was published")


def listen(name: str, last_event_id: str | None = None, label: str = "") -> str | None:
    client = SSEChannel(name, capacity=100_000).listen(last_event_id=last_event_id)
    queues[label or name] = client
    return client.reset


def listen_to_all(channels: list[tuple[str, str]]) -> None:
    """Listen to many channels at once, each after an event of it."""
    threads = [threading.Thread(target=listen, args=channel) for channel in channels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def unlisten(label: str) -> None:
    queues.pop(label).close()


def got(label: str) -> list[Any]:
    """What a queue has now."""
    messages = []
    while True:
        try:
            messages.append(queues[label].get_nowait())
        except queue.Empty:
            return messages


def get(label: str, count: int, patience: float = 60) -> list[Any]:
    """So many messages, when they have come."""
    return [queues[label].get(timeout=patience) for _ in range(count)]


def echo(name: str, count: int) -> int:
    """How many of one's own events are there when the publish returns."""
    channel = SSEChannel(name)
    client = channel.listen()
    found = 0
    for number in range(count):
        channel.publish(number)
        found += client.get_nowait() == number
    client.close()
    return found


def open_stream(name: str, last_event_id: str | None = None) -> str:
    """The first bytes of a stream."""
    stream = SSEChannel(name).stream(last_event_id=last_event_id, heartbeat=None)
    streams[name] = stream
    return next(stream).decode()


def read_stream(name: str) -> str:
    return next(streams[name]).decode()


def follow_stream(name: str) -> None:
    """Read a stream in a thread from now on."""
    stream = SSEChannel(name).stream(heartbeat=None)
    next(stream)
    followed[name] = []

    def read() -> None:
        followed[name].extend(chunk.decode() for chunk in stream)
        followed[name].append("end")

    threading.Thread(target=read, daemon=True).start()


def followed_so_far(name: str) -> list[str]:
    return followed[name]


def disconnect_and_publish(name: str, message: Any) -> None:
    """End all streams of a channel, and publish to it."""
    disconnect(channel=name)
    SSEChannel(name).publish(message)


def start_publishing(name: str, tag: str, count: int, pause: float, threads: int) -> None:
    """Publish `count` events from each thread, or until `stop_publishing` when it is 0."""

    def run(which: int) -> None:
        channel = SSEChannel(name)
        number = 0
        while not stopping.is_set() and (not count or number < count):
            message = f"{tag}.{which}.{number}"
            try:
                published.append((message, channel.publish(message), None))
            except BusError as error:
                published.append((message, None, str(error)))
            number += 1
            if pause:
                time.sleep(pause)

    for which in range(threads):
        thread = threading.Thread(target=run, args=(which,))
        publishers.append(thread)
        thread.start()


def stop_publishing() -> list[tuple[str, str | None, str | None]]:
    """What the publishers did."""
    stopping.set()
    return join_publishers()


def join_publishers() -> list[tuple[str, str | None, str | None]]:
    for thread in publishers:
        thread.join(90)
        assert not thread.is_alive()
    return published


def acknowledged() -> int:
    return sum(event_id is not None for _, event_id, _ in published)


def ticks_while_publishing(name: str, seconds: float) -> tuple[int, str | None]:
    """How often another greenlet runs while a publish waits."""
    import gevent

    def tick() -> None:
        nonlocal ticks
        while True:
            gevent.sleep(0.01)
            ticks += 1

    ticks = 0
    ticker = gevent.spawn(tick)
    waiting = gevent.spawn(publish, name, "waits")
    gevent.sleep(seconds)
    assert not waiting.ready()
    ticker.kill()
    return ticks, None


def flood(name: str, count: int) -> tuple[int, str]:
    """How many of so many publishes at once are refused at once, and why."""
    import gevent

    def one(number: int) -> None:
        try:
            channel.publish(number)
        except BusError as error:
            refusals.append(str(error))

    channel = SSEChannel(name)
    refusals: list[str] = []
    greenlets = [gevent.spawn(one, number) for number in range(count)]
    gevent.sleep(0)
    early = sum(greenlet.ready() for greenlet in greenlets)
    why = refusals[0] if refusals else ""
    gevent.joinall(greenlets)
    return early, why


def connections_in_child() -> list[int]:
    """How many TCP connections this process has, and how many a forked child inherits."""

    def count() -> int:
        return len(psutil.Process().net_connections("tcp"))

    mine = count()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, str(count()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        return [mine, int(answer.read())]


def fork_and_echo(name: str, count: int) -> int:
    """The same as `echo` in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, str(echo(name, count)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return int(text)


def bus() -> dict[str, Any]:
    return stats()["bus"]


def wakeups() -> list[int]:
    """How often the threads of the bus have slept so far."""
    counts = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status") as status:
            lines = {name: value.strip() for name, _, value in (s.partition(":") for s in status)}
        if lines["Name"].startswith("sse-channel"):
            counts.append(int(lines["voluntary_ctxt_switches"]))
    return counts


def main() -> None:
    functions = dict(globals())
    for line in iter(sys.stdin.readline, ""):
        name, *arguments = json.loads(line)
        problem = value = None
        try:
            value = functions[name](*arguments)
        except BaseException:
            problem = traceback.format_exc()
        print(json.dumps([problem, value]), flush=True)


if __name__ == "__main__":
    main()
