"""Publishing to many queues, beside the class that sse_channel replaces and beside culsans.

    python benches/queues.py [--clients 10000] [--rounds 9]

Every measurement runs in a process of its own, in turns so that a change in the machine's mood
meets all of them, and the median of the rounds counts. Each checks its own correctness: every
client got every message, in order, once.

idle      publish onto queues that nobody waits on
publish   publish to queues with a greenlet waiting in ``get(timeout=10)`` on each
last      from that publish until the last of the greenlets has the message
memory    resident bytes per waiting client, the greenlet included
empty     resident bytes per queue that nobody ever used
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time

MESSAGE = {"id": 1, "headline": "Something happened", "summary": "x" * 120}


def channel_of(kind):
    """The channel under test: a fresh object with listen, unlisten and publish."""
    if kind == "sse_channel":
        from sse_channel import SSEChannel

        return SSEChannel("bench")
    if kind == "sse_channel, private":
        from sse_channel import SSEChannel

        return SSEChannel()
    if kind == "gevent.queue":
        from gevent.queue import Queue
    elif kind == "queue.Queue":
        from queue import Queue
    else:
        from culsans import Queue as Dual

        def Queue(maxsize):
            return Dual(maxsize).green_proxy

    return Replaced(Queue)


class Replaced:
    """The pattern that is replaced: a list of queues, and a put on each."""

    def __init__(self, make):
        self.make = make
        self.listeners = []

    def listen(self):
        queue = self.make(maxsize=1000)
        self.listeners.append(queue)
        return queue

    def publish(self, message):
        for queue in self.listeners:
            queue.put_nowait(message)


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_idle(kind, clients):
    channel = channel_of(kind)
    gc.collect()
    before = resident()
    queues = [channel.listen() for _ in range(clients)]
    empty = (resident() - before) / clients
    times = []
    for _ in range(9):
        start = time.perf_counter()
        channel.publish(MESSAGE)
        times.append(time.perf_counter() - start)
        got = [queue.get_nowait() for queue in queues]
        assert got == [MESSAGE] * clients, "a client missed the message"
    return {"idle": statistics.median(times), "empty": empty}


def measure_waiting(kind, clients):
    import gevent
    from gevent.event import Event

    channel = channel_of(kind)
    gc.collect()
    before = resident()
    rounds, got, all_have_it = 9, [], Event()

    def reader(queue):
        for _ in range(rounds):
            got.append(queue.get(timeout=10))
            if len(got) == clients:
                all_have_it.set()

    greenlets = [gevent.spawn(reader, channel.listen()) for _ in range(clients)]
    gevent.sleep(0.5)
    memory = (resident() - before) / clients
    publish, last = [], []
    for _ in range(rounds):
        got.clear()
        all_have_it.clear()
        start = time.perf_counter()
        channel.publish(MESSAGE)
        publish.append(time.perf_counter() - start)
        assert all_have_it.wait(timeout=30), "a client missed the message"
        last.append(time.perf_counter() - start)
        assert got == [MESSAGE] * clients, "a client got something else"
        gevent.sleep(0.05)
    gevent.joinall(greenlets, raise_error=True, timeout=30)
    return {
        "publish": statistics.median(publish),
        "last": statistics.median(last),
        "memory": memory,
    }


def measure_switch(kind, clients):
    import greenlet

    def run():
        main = greenlet.getcurrent().parent
        while True:
            main.switch()

    greenlets = [greenlet.greenlet(run) for _ in range(clients)]
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for each in greenlets:
            each.switch()
        times.append(time.perf_counter() - start)
    return {"last": statistics.median(times)}


KINDS = ["sse_channel", "sse_channel, private", "gevent.queue", "queue.Queue", "culsans"]
MEASURES = {"idle": measure_idle, "waiting": measure_waiting, "switch": measure_switch}


def run(measure, kind, clients):
    command = [sys.executable, __file__, "--child", measure, kind, "--clients", str(clients)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output)


def commit():
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.abspath(__file__)),
    )
    return told.stdout.strip() or "unknown"


def conditions():
    from importlib.metadata import version

    packages = ["sse-channel", "gevent", "greenlet", "culsans"]
    return ", ".join(
        [
            f"{os.cpu_count()} cores",
            platform.platform(),
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in packages),
            f"commit {commit()}",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, metavar=("MEASURE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure, kind = options.child
        print(json.dumps(MEASURES[measure](kind, options.clients)))
        return
    samples = {}
    for turn in range(options.rounds):
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
        jobs = [("idle", kind) for kind in KINDS]
        # A queue.Queue would block the whole hub: nobody can wait on it in a greenlet.
        jobs += [("waiting", kind) for kind in KINDS if kind != "queue.Queue"]
        jobs.append(("switch", "bare greenlet switch"))
        for measure, kind in jobs:
            for key, value in run(measure, kind, options.clients).items():
                samples.setdefault(kind, {}).setdefault(key, []).append(value)
    medians = {
        kind: {key: statistics.median(values) for key, values in by_key.items()}
        for kind, by_key in samples.items()
    }
    print(f"{options.clients} clients; {conditions()}\n")
    keys = ["idle", "publish", "last", "empty", "memory"]
    units = {key: "ms" if key in ("idle", "publish", "last") else "bytes" for key in keys}
    print("".join(["| |", *(f" {key}, {units[key]} |" for key in keys)]))
    print("| --- |" + " ---: |" * len(keys))
    peer = medians["gevent.queue"]
    for kind, values in medians.items():
        cells = []
        for key in keys:
            if key not in values:
                cells.append("")
                continue
            shown = f"{values[key] * 1e3:.2f}" if units[key] == "ms" else f"{values[key]:.0f}"
            if kind != "gevent.queue" and key in peer and peer[key] and values[key]:
                shown += f" ({peer[key] / values[key]:.2f}x)"
            cells.append(shown)
        print(f"| {kind} | " + " | ".join(cells) + " |")
    print("\n(2.00x: half the time or memory of gevent.queue in the same run)")


if __name__ == "__main__":
    main()
