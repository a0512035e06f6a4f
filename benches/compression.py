"""What compressing events once for all clients saves, and what it costs: bytes and processor time.

First the sizes of single frames: short quotes, and articles as `examples/news` has them, with the
sentences of this project's documents. Then connections over loopback, handed over to the I/O
threads, that get events 20 ms apart. Another process reads them; it checks that one can be read to
its end and has all of it, and that the others have as many bytes. Told is the median of ROUNDS.

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


def read(address: str, port: int, clients: int, events: int, compressed: bool) -> None:
    """The other process: connect, read all, say how many bytes that was."""
    selector = selectors.DefaultSelector()
    connections = [socket.create_connection((address, port)) for _ in range(clients)]
    first = connections[0]
    whole: list[bytes] = []
    for connection in connections:
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, [])
    lengths = []
    while len(lengths) < clients:
        for key, _ in selector.select(60):
            data = key.fileobj.recv(1 << 18)
            if data:
                # Read when all are through, so that it costs nothing meanwhile.
                key.data.append(data if key.fd == first.fileno() else len(data))
            else:
                selector.unregister(key.fileobj)
                lengths.append(len(b"".join(key.data)) if key.fileobj is first else sum(key.data))
                whole = key.data if key.fileobj is first else whole
    text = b"".join(whole)
    if compressed:
        text = zlib.decompress(text, 31)
    assert text.count(b"\ndata: ") == events
    assert len(set(lengths)) == 1, set(lengths)
    print(sum(lengths), flush=True)


def run(size: int, clients: int, count: int, compressed: bool) -> tuple[int, float]:
    """Bytes that all clients read, and seconds of processor time of this process for the events."""
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
    begun = time.process_time()
    for text in texts:
        channel.publish(text)
        time.sleep(0.02)
    used = time.process_time() - begun
    del channel
    out, _ = reader.communicate()
    assert reader.returncode == 0
    return int(out), used


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
    print(f"\n{given.clients} clients, {given.events} events: bytes in all | processor time")
    for size in given.sizes:
        rounds: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
        for _ in range(given.rounds):
            for compressed, done in rounds.items():
                done.append(run(size, given.clients, given.events, compressed))
        for compressed, done in rounds.items():
            used = statistics.median(used for _, used in done)
            what = "compressed" if compressed else "plain"
            print(f"{size} B {what} | {done[0][0] / 1e6:.1f} MB | {used:.2f} s")


if __name__ == "__main__":
    main()
