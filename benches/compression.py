"""What compressing events once for all clients saves, and what it costs: bytes and processor time.

First the sizes of single frames: short quotes, and articles as `examples/news` has them, with the
sentences of this project's documents. Then connections over loopback, handed over to the I/O
threads, that get events 20 ms apart. Two other processes read them: one takes each twentieth
connection and notes when it has each event, the other reads the rest now and then, so that it
costs little; both check that one can be read to its end and has all of it, and that the others have
as many bytes. Told is the median of ROUNDS, plain and compressed in turns.

python benches/compression.py [--clients N] [--events N] [--rounds N] [--sizes BYTES …]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ["SSE_CHANNEL_BUS"] = "memory://"

from handover import take  # noqa: E402
from sse_channel import SSEChannel  # noqa: E402

SOURCES = {"World": "Meridian Press", "Business": "Ledger Daily", "Science": "Orbit Weekly"}


def messages(size: int, count: int) -> list[str]:
    """JSON of about `size` bytes each: quotes where that is too short for an article."""
    chance = random.Random(size)
    prose = " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    words = re.findall(r"[A-Za-z][a-z]*[,.]?", prose)

    def text(length: int) -> str:
        start = chance.randrange(len(words) - length // 2 - 100)
        return " ".join(words[start : start + length // 2 + 100])[:length]

    made = []
    for number in range(count):
        at = f"2026-03-01T12:{number % 60:02}:09.{chance.randrange(1000):03}Z"
        if size < 200:
            quote = {"symbol": chance.choice(["ACME", "INIT", "GLOB", "NEWS"]), "at": at}
            quote |= {"price": chance.randrange(100_000) / 100, "volume": chance.randrange(10**6)}
            made.append(json.dumps(quote, separators=(",", ":")))
            continue
        category = chance.choice(list(SOURCES))
        article = {"id": 1000 + number, "headline": text(60), "summary": ""}
        article |= {"source": SOURCES[category], "category": category, "published_at": at}
        article["summary"] = text(size - len(json.dumps(article, separators=(",", ":"))))
        made.append(json.dumps(article, separators=(",", ":")))
    return made


# --- Sizes ---------------------------------------------------------------------------------


def frames(texts: list[str], compressed: bool) -> tuple[float, float]:
    """Bytes of a frame on the wire, and the microseconds of processor time that it takes."""
    channel = SSEChannel("sizes", history=1)
    stream = channel.stream(heartbeat=None)
    if compressed:
        stream._compress()
    next(stream)
    size = used = 0.0
    for text in texts:
        channel.publish(text)
        begun = time.thread_time_ns()
        size += len(next(stream))
        used += time.thread_time_ns() - begun
    stream.close()
    return size / len(texts), used / len(texts) / 1000


def sizes(wanted: list[int]) -> None:
    print("event | frame | compressed | ratio | to compress it once")
    for size in wanted:
        texts = messages(size, 200)
        frames(texts, True)
        plain, _ = frames(texts, False)
        compressed, used = frames(texts, True)
        print(
            f"{size} B | {plain:.0f} | {compressed:.0f} | {compressed / plain:.0%} | {used:.0f} us"
        )


# --- Clients -------------------------------------------------------------------------------


#: Each so manieth connection tells when it has what.
PROBE_EVERY = 20


def read(address: str, port: int, clients: int, events: int, compressed: bool) -> None:
    """The other processes: connect, read all, say how many bytes that was and when they came."""
    connections = [socket.create_connection((address, port)) for _ in range(clients)]
    probes = connections[::PROBE_EVERY]
    rest = [each for at, each in enumerate(connections) if at % PROBE_EVERY]
    child = os.fork()
    mine = probes if child else rest
    received: dict[int, list[tuple[int, bytes]]] = {each.fileno(): [] for each in mine}
    with selectors.DefaultSelector() as selector:
        for connection in mine:
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(60):
                data = key.fileobj.recv(1 << 18)
                received[key.fd].append((time.monotonic_ns(), data))
                if not data:
                    selector.unregister(key.fileobj)
            if not child:
                time.sleep(0.2)
    bodies = [b"".join(data for _, data in its) for its in received.values()]
    text = zlib.decompress(bodies[0], 31) if compressed else bodies[0]
    assert text.count(b"\ndata: ") == events
    assert len({len(body) for body in bodies}) == 1
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    # What a stream begins with, the events, what ends it where it is compressed, the end. One that
    # got two at once says nothing about either.
    parts = 1 + events + int(compressed) + 1
    clean = [its for its in received.values() if len(its) == parts]
    whole = [[at for at, _ in its[1 : 1 + events]] for its in clean]
    print(json.dumps([clients * len(bodies[0]), whole]), flush=True)


def run(size: int, clients: int, count: int, compressed: bool) -> tuple[int, float, list[float]]:
    """Bytes that all clients read, seconds of processor time of this process for the events, and
    seconds from each publish to each arrival that was noted."""
    texts = messages(size, count)
    # Private: it ends with the object, and its clients with it.
    channel = SSEChannel()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        arguments = [*listener.getsockname(), clients, count, int(compressed)]
        reader = subprocess.Popen(
            [sys.executable, __file__, "--read", *map(str, arguments)], stdout=subprocess.PIPE
        )
        for _ in range(clients):
            connection, _ = listener.accept()
            with connection:
                stream = channel.stream(heartbeat=None)
                if compressed:
                    stream._compress()
                assert take(stream, connection.fileno())
    time.sleep(0.5)
    published = []
    begun = time.process_time()
    for text in texts:
        published.append(time.monotonic_ns())
        channel.publish(text)
        time.sleep(0.02)
    used = time.process_time() - begun
    del channel
    out, _ = reader.communicate()
    assert reader.returncode == 0
    size, arrivals = json.loads(out)
    assert len(arrivals) > clients / PROBE_EVERY / 2, "too few connections got one event at a time"
    delays = [(at - of) / 1e9 for its in arrivals for at, of in zip(its, published, strict=True)]
    return size, used, delays


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--events", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--read", nargs=5)
    given = parser.parse_args()
    if given.read:
        address, *numbers = given.read
        port, clients, events, compressed = map(int, numbers)
        read(address, port, clients, events, bool(compressed))
        return
    print(f"{platform.platform()}, Python {platform.python_version()}")
    sizes([100, 500, 2000, 10_000])
    print(
        f"\n{given.clients} clients, {given.events} events: "
        "bytes in all | processor time | delay p50 | p99"
    )
    for size in given.sizes:
        rounds: dict[bool, list[tuple[int, float, list[float]]]] = {False: [], True: []}
        for _ in range(given.rounds):
            for compressed, done in rounds.items():
                done.append(run(size, given.clients, given.events, compressed))
        for compressed, done in rounds.items():
            used = statistics.median(used for _, used, _ in done)
            cuts = [statistics.quantiles(delays, n=100) for _, _, delays in done]
            p50, p99 = (statistics.median(its[at] for its in cuts) * 1000 for at in (49, 98))
            what = "compressed" if compressed else "plain"
            print(
                f"{size} B {what} | {done[0][0] / 1e6:.1f} MB | {used:.2f} s "
                f"| {p50:.2f} ms | {p99:.2f} ms"
            )


if __name__ == "__main__":
    main()
