"""The monitor under load: what its page shows, beside what is true, and what it costs.

The news example runs in three workers. CLIENTS streams of three channels listen, most of them
offloaded, some in Python, a few that hardly read, and some come and go; 50 events a second are
published. The monitor's page is open in Chromium. Told are the figures that the page shows beside
those that were made, and the processor time of the workers with and without a watcher. With
--screenshots the page is also drawn, in its dark and its light form.

python benches/monitor.py [--clients N] [--seconds N] [--screenshots DIRECTORY]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import load_generator  # noqa: E402
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

import sse_channel as library  # noqa: E402
from browsers import ARGUMENTS  # noqa: E402
from parts import chromium  # noqa: E402
from ports import HOST  # noqa: E402
from servers import Server, open_streams  # noqa: E402

#: Events a second of each channel.
RATES = {"prices": 30, "news": 15, "alerts": 5}


class Publisher(threading.Thread):
    """Publishes to all channels until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.is_ending = threading.Event()
        self.published = 0
        self._counts = dict.fromkeys(RATES, 0)

    def run(self) -> None:
        begin = time.monotonic()
        while not self.is_ending.wait(0.01):
            elapsed = time.monotonic() - begin
            for name, rate in RATES.items():
                while self._counts[name] < elapsed * rate:
                    self._publish(name)

    def _publish(self, name: str) -> None:
        message = {"n": self._counts[name], "t": time.monotonic_ns(), "text": "x" * 1500}
        library.SSEChannel(name).publish(message)
        self._counts[name] += 1
        self.published += 1


class Laggards(threading.Thread):
    """Clients that take a few bytes now and then, as those in a tunnel do."""

    def __init__(self, server: Server, count: int) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._count = count
        self.is_ending = threading.Event()

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            sockets = [self._open() for _ in range(self._count)]
            while not self.is_ending.wait(0.2):
                for number, each in enumerate(sockets):
                    try:
                        is_open = bool(each.recv(2000 * (number + 1)))
                    except BlockingIOError:
                        continue
                    except ConnectionResetError:
                        is_open = False
                    if not is_open:
                        # It was too slow, and comes back.
                        each.close()
                        sockets[number] = self._open()
            stack.callback(lambda: [each.close() for each in sockets])

    def _open(self) -> socket.socket:
        each = socket.socket()
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        each.connect((HOST, self._server.port))
        each.sendall(b"GET /channels/prices/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        each.setblocking(False)
        return each


class Visitors(threading.Thread):
    """Clients that come, and leave after a while."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.is_ending = threading.Event()

    def run(self) -> None:
        chance = random.Random(1)
        while not self.is_ending.is_set():
            with open_streams(self._server, "/channels/news/", chance.randint(5, 60)):
                self.is_ending.wait(chance.uniform(2, 9))


@contextlib.contextmanager
def load(server: Server, clients: int) -> Iterator[None]:
    """Streams of `prices`, read by the load generator, which checks their order."""
    command = [
        str(load_generator.LOAD),
        "clients",
        f"{HOST}:{server.port}",
        "/channels/prices/",
        str(clients),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    print(f"{clients} streams of prices:", process.stdout.readline().strip())
    process.stdin.write("expect 1000000\n")
    process.stdin.flush()
    try:
        yield
        assert process.poll() is None, "the load generator has ended"
    finally:
        process.kill()
        process.wait()


def processor_time(server: Server) -> float:
    times = [process.cpu_times() for process in server.workers]
    return sum(its.user + its.system for its in times)


def cost(server: Server, seconds: float) -> float:
    before = processor_time(server)
    time.sleep(seconds)
    return (processor_time(server) - before) / seconds


def opened(browser: Browser, server: Server, scheme: str, **size: int) -> Page:
    page = browser.new_page(color_scheme=scheme, viewport=size, device_scale_factor=1)
    page.on("console", lambda line: print("console:", line.type, line.text))
    page.goto(f"{server.url}/monitor/")
    page.wait_for_selector("body[data-state=live]")
    return page


def shown(page: Page, figure: str) -> float:
    value = page.get_attribute(f"[data-figure='{figure}']", "data-value")
    return float(value or "nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=60, help="until the page is drawn")
    parser.add_argument("--screenshots", type=Path, help="a directory to put them in")
    arguments = parser.parse_args()
    load_generator.build()
    in_python, laggards = arguments.clients // 20, 4
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(Server("gunicorn-gevent-3", directory))
        library.configure(bus=server.bus)
        few = arguments.clients // 20
        stack.enter_context(load(server, arguments.clients - in_python - laggards - 2 * few))
        stack.enter_context(open_streams(server, "/channels/news/", few))
        stack.enter_context(open_streams(server, "/channels/alerts/", few))
        stack.enter_context(open_streams(server, "/compressed/", in_python))
        threads = [Laggards(server, laggards), Publisher()]
        for thread in threads:
            thread.start()
            stack.callback(thread.is_ending.set)
        time.sleep(3)
        print(library.presence())
        time.sleep(2)
        without = cost(server, 15)
        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=chromium(), args=ARGUMENTS
        )
        page = opened(browser, server, "dark", width=1440, height=1000)
        time.sleep(5)
        watched = cost(server, 15)
        print(f"processor time of the workers: {without:.3f} s a second, {watched:.3f} watched")
        publisher = threads[1]
        assert isinstance(publisher, Publisher)
        before, begin = publisher.published, time.monotonic()
        time.sleep(5)
        rate = (publisher.published - before) / (time.monotonic() - begin)
        true = {"clients": arguments.clients, "events": rate}
        for figure, value in true.items():
            print(f"{figure}: {value:g}, the page shows {shown(page, figure):g}")
        visitors = Visitors(server)
        visitors.start()
        stack.callback(visitors.is_ending.set)
        time.sleep(arguments.seconds)
        if arguments.screenshots:
            page.screenshot(path=arguments.screenshots / "monitor-dark.png", full_page=True)
            light = opened(browser, server, "light", width=1440, height=1000)
            time.sleep(3)
            light.screenshot(path=arguments.screenshots / "monitor-light.png", full_page=True)
        report = {
            "machine": f"{psutil.cpu_count()} cores",
            "clients": arguments.clients,
            "processor seconds a second": {"without": without, "watched": watched},
        }
        print(json.dumps(report))
        browser.close()


if __name__ == "__main__":
    main()
