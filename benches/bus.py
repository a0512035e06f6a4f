"""The buses side by side in one run: local:// and Redis through redis-py.

Two questions. How long from the publish call in one process until a blocked reader of another has
the message, at a calm and at a busy rate? And how many publishes a second do three processes get
that contend, and how long does each wait? Every run checks that all messages arrived, in order.

python benches/bus.py [--rounds N]      needs redis-server and the group `bench`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RATES = {50: 3.0, 5000: 3.0}  # publishes a second, and for how many seconds
PUBLISHERS = 3
CONTENDING = 3.0  # seconds
PAYLOAD = "x" * 200

# What a Redis user writes: a stream for history and a message for who listens, in one step.
SCRIPT = """
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', 1000, '*', 'd', ARGV[1])
redis.call('PUBLISH', KEYS[1], ARGV[1])
return id
"""


# --- What each side does, in a process of its own ------------------------------------------


class Local:
    def __init__(self) -> None:
        from sse_channel import SSEChannel

        self.channel = SSEChannel("bench", capacity=1_000_000)

    def listen(self) -> None:
        self.queue = self.channel.listen()

    def get(self) -> str:
        return self.queue.get(timeout=30)

    def publish(self, text: str) -> None:
        self.channel.publish(text)


class Redis:
    def __init__(self) -> None:
        import redis

        self.client = redis.Redis(port=int(os.environ["BENCH_REDIS_PORT"]))
        self.script = self.client.register_script(SCRIPT)
        self.client.ping()

    def listen(self) -> None:
        self.pubsub = self.client.pubsub(ignore_subscribe_messages=True)
        self.pubsub.subscribe("bench")
        while not self.pubsub.subscribed or self.pubsub.get_message(timeout=0.1):
            pass

    def get(self) -> str:
        while True:
            message = self.pubsub.get_message(ignore_subscribe_messages=True, timeout=30)
            if message is not None:
                return message["data"].decode()

    def publish(self, text: str) -> None:
        self.script(keys=["bench"], args=[text])


BUSES = {"local": Local, "redis": Redis}


def reader(bus: str, count: int) -> None:
    """Read `count` messages; print the nanoseconds that each was under way."""
    side = BUSES[bus]()
    side.listen()
    print("ready", flush=True)
    delays, expected = [], 0
    while len(delays) < count:
        number, sent = side.get().split(" ")[:2]
        delays.append(time.monotonic_ns() - int(sent))
        assert int(number) == expected, f"{number} instead of {expected}"
        expected += 1
    print(json.dumps(delays), flush=True)


def publisher(bus: str, rate: int, count: int) -> None:
    """Publish at a steady rate."""
    side = BUSES[bus]()
    begin = time.monotonic() + 0.1
    for number in range(count):
        while (ahead := begin + number / rate - time.monotonic()) > 0:
            time.sleep(ahead)
        side.publish(f"{number} {time.monotonic_ns()} {PAYLOAD}")


def contender(bus: str, name: str, seconds: float) -> None:
    """Publish as fast as it goes; print how long each took in nanoseconds."""
    side = BUSES[bus]()
    side.publish(f"warm {name}")
    print("ready", flush=True)
    sys.stdin.readline()
    taken, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.monotonic_ns()
        side.publish(f"{name} {len(taken)} {PAYLOAD}")
        taken.append(time.monotonic_ns() - begun)
    print(json.dumps(taken), flush=True)


def counter(bus: str, publishers: int) -> None:
    """Read until told how many there are; check that each publisher's come in order."""
    side = BUSES[bus]()
    side.listen()
    print("ready", flush=True)
    expected = int(sys.stdin.readline())
    seen: dict[str, int] = {}
    while sum(seen.values()) < expected:
        name, number = side.get().split(" ")[:2]
        if name == "warm":
            continue
        assert int(number) == seen.get(name, 0), f"{name}: {number} after {seen.get(name)}"
        seen[name] = int(number) + 1
    print(json.dumps(seen), flush=True)


ROLES = {"reader": reader, "publisher": publisher, "contender": contender, "counter": counter}


# --- The run -------------------------------------------------------------------------------


def start(role: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, role, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout.readline() == "ready\n"


def latency(bus: str, rate: int, seconds: float) -> list[float]:
    """Milliseconds from each publish call to its receipt."""
    count = int(rate * seconds)
    reading = start("reader", bus, count)
    ready(reading)
    publishing = start("publisher", bus, rate, count)
    delays = json.loads(reading.stdout.readline())
    assert publishing.wait() == 0
    assert reading.wait() == 0
    return [delay / 1e6 for delay in delays]


def contention(bus: str) -> tuple[float, list[float]]:
    """Publishes a second of all publishers, and milliseconds that each publish took."""
    counting = start("counter", bus, PUBLISHERS)
    ready(counting)
    contenders = [start("contender", bus, f"p{n}", CONTENDING) for n in range(PUBLISHERS)]
    for process in contenders:
        ready(process)
    for process in contenders:
        process.stdin.write("\n")
        process.stdin.flush()
    taken = [json.loads(process.stdout.readline()) for process in contenders]
    total = sum(map(len, taken))
    counting.stdin.write(f"{total}\n")
    counting.stdin.flush()
    seen = json.loads(counting.stdout.readline())
    assert seen == {f"p{n}": len(mine) for n, mine in enumerate(taken)}
    for process in (*contenders, counting):
        assert process.wait() == 0
    return total / CONTENDING, [each / 1e6 for mine in taken for each in mine]


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    server = shutil.which("redis-server")
    if server is None:
        print("redis-server is missing: apt-get install redis-server", file=sys.stderr)
        return 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as redis_directory:
        redis = subprocess.Popen(
            [server, "--port", str(port), "--save", "", "--dir", redis_directory],
            stdout=subprocess.DEVNULL,
        )
        place = tempfile.mkdtemp(prefix="sse-bench-", dir="/dev/shm")
        os.environ["BENCH_REDIS_PORT"] = str(port)
        os.environ["SSE_CHANNEL_BUS"] = f"local://{place}/bus"
        try:
            time.sleep(0.5)
            report(rounds)
        finally:
            redis.terminate()
            redis.wait()
            shutil.rmtree(place)
    return 0


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(rounds: int) -> None:
    delays: dict[tuple[str, int], list[list[float]]] = {}
    publishes: dict[str, list[tuple[float, list[float]]]] = {}
    steps = [(number, bus) for number in range(rounds) for bus in BUSES]
    # From calm to busy: what a burst leaves to be forgotten is not what a calm channel meets.
    for rate, seconds in RATES.items():
        for number, bus in steps:
            progress(f"{rate} a second, round {number + 1} of {rounds}: {bus}")
            delays.setdefault((bus, rate), []).append(latency(bus, rate, seconds))
    for number, bus in steps:
        progress(f"contention, round {number + 1} of {rounds}: {bus}")
        publishes.setdefault(bus, []).append(contention(bus))
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"sse_channel {version('sse-channel')}, redis-py {version('redis')}, {commit()}")
    print(f"Medians of {rounds} rounds in one run; messages of {len(PAYLOAD)} bytes, in ms.\n")
    print("publish call to receipt in another process")
    print("| a second | bus | p50 | p99 | max | p50 of Redis's |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for rate in RATES:
        base = statistics.median(quantile(each, 0.5) for each in delays["redis", rate])
        for bus in BUSES:
            p50, p99, largest = (
                statistics.median(quantile(each, q) for each in delays[bus, rate])
                for q in (0.5, 0.99, 1.0)
            )
            print(f"| {rate} | {bus} | {p50:.3f} | {p99:.3f} | {largest:.2f} | {p50 / base:.2f} |")
    print(f"\n{PUBLISHERS} processes publish as fast as they can")
    print("| bus | publishes/s | p50 | p99 | max of all rounds |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for bus in BUSES:
        each = publishes[bus]
        rate = statistics.median(round_[0] for round_ in each)
        p50, p99 = (statistics.median(quantile(r[1], q) for r in each) for q in (0.5, 0.99))
        largest = max(max(round_[1]) for round_ in each)
        print(f"| {bus} | {rate:,.0f} | {p50:.3f} | {p99:.3f} | {largest:.1f} |")


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "no commit"


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ROLES:
        role, *rest = sys.argv[1:]
        convert = {"reader": (str, int), "publisher": (str, int, int)}.get(role)
        convert = convert or {"contender": (str, str, float), "counter": (str, int)}[role]
        ROLES[role](*(kind(text) for kind, text in zip(convert, rest, strict=True)))
    else:
        sys.exit(main())
