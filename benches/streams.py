"""Streams side by side in one run: this library, what it replaces, its peers, and the floor.

For each server: COUNT clients of `benches/load` connect; then one event a second, published by a
thread or task of the server (nchan has it posted), and the delay from the publish call until each
client has read it; then 40 events at once. Every client checks that it gets every event, once and
in order; a server that fails it is named. What is told: the delay's quantiles, deliveries a second
of the burst, connects a second, memory a client (proportional set size of the server's processes,
over what they took before), and processor time per 1,000 deliveries.

python benches/streams.py [--clients 1000 10000 50000] [--rounds N] [--only NAME …]
    [--json FILE] [--plot FILE]

needs cargo, the group `bench`, and for nchan Debian's nginx-light and libnginx-mod-nchan.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load_generator
import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HOST = "127.0.0.1"
SECONDS = 10  # of one event each
BURST = 40  # events at once
TEXT = "x" * 200


# --- The servers ---------------------------------------------------------------------------


@dataclass
class Kind:
    """A server, and how to start it."""

    command: list[str]
    stream: str = "/stream/"
    publish: str = "/publish/"
    environment: dict[str, str] = field(default_factory=dict)
    least: int = 0
    "Clients that it is given at least: fewer are others' to show."
    largest: int = 19_000
    "Clients that it is given at the most: more take it too long, or too many descriptors."


def gunicorn(worker: str, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "gunicorn", "--no-control-socket", "-k", worker, "-b", "{address}"),
        *("--worker-connections", "30000", "--backlog", "2048", "--log-level", "error", *more),
    ]


def uvicorn(app: str, loop: str = "uvloop") -> list[str]:
    return [
        *(sys.executable, "-m", "uvicorn", app, "--loop", loop, "--host", HOST, "--port", "{port}"),
        *("--log-level", "error", "--no-access-log", "--backlog", "2048"),
    ]


WSGI, ASGI = "django_app:wsgi", "django_app:asgi"
OFF = {"BENCH_OFFLOAD": "0"}
KINDS = {
    "floor": Kind([str(load_generator.LOAD), "floor", "{port}"]),
    "offloaded, sync": Kind([*gunicorn("sync"), WSGI]),
    "offloaded, gthread": Kind([*gunicorn("gthread", "--threads", "4"), WSGI]),
    "offloaded, gevent": Kind([*gunicorn("gevent"), WSGI]),
    "offloaded, sync, 2 I/O threads": Kind(
        [*gunicorn("sync"), WSGI], environment={"BENCH_IO_THREADS": "2"}
    ),
    "offloaded, 2 sync workers": Kind(
        [*gunicorn("sync", "-w", "2"), WSGI],
        environment={"BENCH_BUS": "local://{directory}/bus"},
    ),
    "offloaded, 4 sync workers": Kind(
        [*gunicorn("sync", "-w", "4"), WSGI],
        environment={"BENCH_BUS": "local://{directory}/bus"},
        least=19_001,
        largest=76_000,
    ),
    "offloaded, uvicorn": Kind(uvicorn(ASGI)),
    "not offloaded, gevent": Kind([*gunicorn("gevent"), WSGI], environment=OFF),
    "not offloaded, uvicorn": Kind(uvicorn(ASGI), environment=OFF),
    "nchan, 1 worker": Kind(["nginx", "1"]),
    "nchan, 2 workers": Kind(["nginx", "2"]),
    "nchan, 4 workers": Kind(["nginx", "4"], least=19_001, largest=76_000),
    "replaced: gevent.queue": Kind(
        [*gunicorn("gevent"), WSGI], stream="/replaced/", publish="/publish-replaced/"
    ),
    "sse-starlette, uvicorn": Kind(uvicorn("starlette_app:app")),
    "django-eventstream, uvicorn": Kind(uvicorn("eventstream_app:asgi"), largest=1000),
}

NGINX = """
user root;
load_module /usr/lib/nginx/modules/ngx_nchan_module.so;
daemon off; master_process on; worker_processes {workers};
pid {directory}/pid; error_log {directory}/error.log error;
events {{ worker_connections 19000; }}
http {{
    access_log off;
    nchan_max_reserved_memory 256m;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen {address} backlog=2048;
        location /stream/ {{
            nchan_subscriber eventsource; nchan_channel_id bench;
            nchan_subscriber_first_message newest;
        }}
        location /publish/ {{
            nchan_publisher; nchan_channel_id bench; nchan_message_buffer_length 100;
        }}
    }}
}}
"""


class Server:
    """A server that runs."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.kind = name, KINDS[name]
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = probe.getsockname()[1]
        # Of more clients than one address has ports for.
        address = f"{'0.0.0.0' if self.kind.least else HOST}:{self.port}"
        command = self.kind.command
        if command[0] == "nginx":
            nginx = shutil.which("nginx") or "/usr/sbin/nginx"
            config = directory / "nginx.conf"
            config.write_text(
                NGINX.format(workers=command[1], directory=directory, address=address)
            )
            command = [nginx, "-c", str(config), "-p", str(directory)]
        self.process = subprocess.Popen(
            [word.format(address=address, port=self.port) for word in command],
            cwd=HERE / "servers",
            env={
                **os.environ,
                **{
                    name: value.format(directory=directory)
                    for name, value in self.kind.environment.items()
                },
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 30
        while True:
            with suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
                break
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start")
            time.sleep(0.05)
        time.sleep(1)

    def publish(self, first: int, count: int, pause: float = 0) -> None:
        """Have it publish `count` events, by itself where it can, with a pause after each."""
        if self.name == "floor":
            for n in range(first, first + count) if pause else [first]:
                self.process.stdin.write(f"publish {n} {1 if pause else count}\n")
                self.process.stdin.flush()
                time.sleep(pause)
            return
        if self.kind.command[0] != "nginx":
            self.get(f"{self.kind.publish}?first={first}&count={count}&pause={pause}")
            return
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        for n in range(first, first + count):
            text = json.dumps({"n": n, "t": time.monotonic_ns(), "text": TEXT})
            connection.request("POST", self.kind.publish, text)
            answer = connection.getresponse()
            answer.read()
            assert answer.status < 300, answer.status
            time.sleep(pause)
        connection.close()

    def get(self, path: str) -> bytes:
        """What it answers to one request."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status == 200, (answer.status, body[:500])
        return body

    def _processes(self) -> list[psutil.Process]:
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def memory(self) -> int:
        """Bytes of all its processes, what they share counted once."""
        return sum(process.memory_full_info().pss for process in self._processes())

    def processor(self) -> float:
        """Seconds that its processes have computed."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(each.user + each.system for each in times)

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()


class Load:
    """The load generator with its clients: several processes where one has too few descriptors."""

    LARGEST = 19_000

    def __init__(self, server: Server, clients: int, *more: str) -> None:
        count = -(-clients // self.LARGEST)
        shares = [clients // count + (part < clients % count) for part in range(count)]
        self.processes = [
            subprocess.Popen(
                [
                    # Each has some 28,000 ports to one address.
                    *(load_generator.LOAD, "clients", f"127.0.0.{1 + part}:{server.port}"),
                    *(server.kind.stream, str(share), *more),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for part, share in enumerate(shares)
        ]
        for process in self.processes:
            # Always on the same core, and not in the servers' way by chance.
            psutil.Process(process.pid).cpu_affinity([os.cpu_count() - 1])
        self.opened = self.answer()

    def answer(self) -> dict[str, Any]:
        """What all of them say: sums, and the worst of each quantile."""
        answers = [json.loads(process.stdout.readline()) for process in self.processes]
        whole: dict[str, Any] = {}
        for key, first in answers[0].items():
            values = [answer[key] for answer in answers]
            if isinstance(first, dict):
                failures: Counter[str] = Counter()
                for value in values:
                    failures.update(value)
                whole[key] = dict(failures)
            elif isinstance(first, float):
                whole[key] = max(values)
            else:
                whole[key] = {"begun": min, "last": max}.get(key, sum)(values)
        return whole

    def tell(self, line: str) -> dict[str, Any]:
        for process in self.processes:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


# --- The run -------------------------------------------------------------------------------


@contextmanager
def served(name: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as directory:
        server = Server(name, Path(directory))
        try:
            yield server
        finally:
            server.stop()


def measure(name: str, clients: int) -> dict[str, Any]:
    with served(name) as server:
        # One client, one event: what is begun at first use is not counted as a client's.
        first = Load(server, 1)
        try:
            first.tell("expect 1")
            server.publish(0, 1)
            first.answer()
        finally:
            first.stop()
        time.sleep(0.5)
        idle = server.memory()
        load = Load(server, clients)
        try:
            opened = load.opened
            if opened["open"] < clients:
                return {"failure": f"{opened['open']} of {clients} connected: {opened['failures']}"}
            time.sleep(1)
            memory = server.memory() - idle
            load.tell(f"expect {SECONDS}")
            computed = server.processor()
            server.publish(0, SECONDS, pause=1)
            calm = load.answer()
            computed = server.processor() - computed
            time.sleep(1)
            load.tell(f"expect {BURST}")
            server.publish(SECONDS, BURST)
            burst = load.answer()
        finally:
            load.stop()
    wrong = {**calm["failures"], **burst["failures"]}
    missing = SECONDS * clients - calm["deliveries"]
    if missing or wrong:
        return {"failure": f"{missing} events missing, {wrong}"}
    lost = BURST * clients - burst["deliveries"]
    return {
        **{key: calm[key] for key in ("p50", "p90", "p99", "max")},
        "lost": lost / (BURST * clients),  # of the burst
        "burst": burst["deliveries"] / ((burst["last"] - burst["begun"]) / 1e9),
        "connects": clients / opened["seconds"],
        "memory": memory / clients,
        "computed": computed * 1000 / (calm["deliveries"] / 1000),  # milliseconds
    }


def slow_tenth(clients: int) -> None:
    """What a tenth of the clients that stops reading does to the others, and what becomes of it."""
    slow, rate, seconds = clients // 10, 5, 20
    KINDS["slow"] = Kind(
        [*gunicorn("sync"), WSGI],
        environment={"BENCH_TEXT": "2000", "BENCH_BACKLOG_BYTES": "65536"},
    )
    with served("slow") as server:
        load = Load(server, clients, "16384")
        try:
            before = after = {}
            for phase in ("before", "after"):
                if phase == "after":
                    load.tell(f"stop {slow}")
                load.tell(f"expect {rate * seconds}")
                first = 0 if phase == "before" else rate * seconds
                server.publish(first, rate * seconds, pause=1 / rate)
                answer = load.answer()
                assert not answer["missing"], answer
                memory = server.memory() >> 20
                if phase == "before":
                    before = {**answer, "memory": memory}
                else:
                    after = {**answer, "memory": memory}
            channel = json.loads(server.get("/stats/"))["channels"]["default"]
        finally:
            load.stop()
    print(f"{clients} clients, {rate} events of 2 KB a second; {slow} of them stop reading")
    for phase, each in (("before", before), ("after", after)):
        print(
            f"{phase}: p50 {each['p50']:.1f}, p99 {each['p99']:.1f} ms of the others; "
            f"{each['memory']} MiB"
        )
    print(f"p99 after / before: {after['p99'] / before['p99']:.2f}")
    print(f"clients now {channel['clients']}, disconnected {channel['disconnected']}\n")


def come_back(clients: int) -> None:
    """What it takes when all clients come back at once and have missed 500 events."""
    missed = 500
    with served("offloaded, sync") as server:
        mark = server.get("/mark/").decode()
        server.publish(0, missed)
        while json.loads(server.get("/stats/"))["published"] <= missed:
            time.sleep(0.1)
        idle = largest = server.memory()
        server.kind = dataclasses.replace(
            server.kind, stream=f"{server.kind.stream}?last_event_id={mark}"
        )
        begun = time.monotonic()
        done = threading.Event()

        def watch() -> None:
            nonlocal largest
            while not done.wait(0.1):
                largest = max(largest, server.memory())

        watching = threading.Thread(target=watch)
        watching.start()
        load = Load(server, clients, "0", str(missed))
        try:
            answer = load.opened
            while "missing" not in answer:
                answer = load.answer()
        finally:
            load.stop()
            done.set()
            watching.join()
    assert not answer["missing"], answer
    assert not answer["failures"], answer
    print(
        f"{clients} clients come back at once, {missed} events behind: all have them after "
        f"{time.monotonic() - begun:.1f} s ({answer['deliveries']:,} deliveries); "
        f"memory {idle >> 20} MiB before, {largest >> 20} MiB at the most\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--rounds", type=int, default=1, help="of which the medians are told")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--slow", action="store_true", help="a tenth that stops reading, alone")
    parser.add_argument(
        "--come-back", action="store_true", help="all that come back at once, alone"
    )
    parser.add_argument("--plot", type=Path, help="draw the figures of the most clients there")
    given = parser.parse_args()
    load_generator.build()
    print(conditions(), end="\n\n")
    if given.come_back:
        come_back(max(given.clients))
        return 0
    if given.slow:
        slow_tenth(max(given.clients))
        return 0
    every: dict[str, Any] = {"conditions": conditions()}
    for clients in given.clients:
        rounds: dict[str, list[dict[str, Any]]] = {}
        # One server after the other in each round: what the machine does beside meets all of them.
        for number in range(given.rounds):
            for name in given.only or KINDS:
                if not KINDS[name].least <= clients <= KINDS[name].largest:
                    continue
                print(f"{clients} clients, {number}: {name}", file=sys.stderr, flush=True)
                try:
                    figures = measure(name, clients)
                except (OSError, RuntimeError, AssertionError) as error:
                    figures = {"failure": str(error) or type(error).__name__}
                rounds.setdefault(name, []).append(figures)
        found = {name: medians(each) for name, each in rounds.items()}
        report(clients, found)
        every[str(clients)] = found
    if given.json:
        given.json.write_text(json.dumps(every, indent=1))
    if given.plot:
        plot(max(given.clients), every[str(max(given.clients))], given.plot)
    return 0


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure; one failure is a failure."""
    failed = [figures for figures in rounds if "failure" in figures]
    if failed:
        return failed[0]
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


def plot(clients: int, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of what the table says."""
    from matplotlib import pyplot

    shown = {name: each for name, each in reversed(found.items()) if "failure" not in each}
    panels = {
        "delay until a client has it, ms (p50, p99)": ("p50", "p99"),
        f"{BURST} events at once, deliveries a second": ("burst",),
        "memory a client, bytes": ("memory",),
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 0.36 * len(shown) + 1.2), sharey=True)
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for key in reversed(keys):
            values = [max(each[key], 0) for each in shown.values()]
            colors = ["#0a7d5c" if name.startswith("offloaded") else "#9aa5b1" for name in shown]
            alpha = 1 if key == keys[0] else 0.4
            axis.barh(list(shown), values, color=colors, alpha=alpha)
        for name, each in shown.items():
            value = max(each[keys[0]], 0)
            axis.text(max(each[keys[-1]], 0), name, f" {value:,.0f}", va="center", size=8)
        axis.set_title(title, size=9)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{clients:,} clients, one event a second, in one run", size=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def conditions() -> str:
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = ("gunicorn", "gevent", "uvicorn", "sse-starlette", "django-eventstream")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()},\n"
        f"sse_channel {version('sse-channel')} {commit}, {versions}"
    )


def report(clients: int, found: dict[str, dict[str, Any]]) -> None:
    base = found.get("floor", {})

    def ratio(figures: dict[str, Any], key: str) -> str:
        return f"{figures[key] / base[key]:.2f}" if "p50" in base else "-"

    print(f"{clients} clients; delays in ms, in brackets times the floor's")
    print("| server | p50 | p99 | max | burst/s | connects/s | bytes/client | CPU ms/1000 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, each in found.items():
        if "failure" in each:
            print(f"| {name} | {each['failure']} |")
            continue
        lost = f" ({each['lost']:.0%} lost)" if each["lost"] else ""
        print(
            f"| {name} | {each['p50']:.1f} ({ratio(each, 'p50')}) "
            f"| {each['p99']:.1f} ({ratio(each, 'p99')}) | {each['max']:.0f} "
            f"| {each['burst']:,.0f}{lost} | {each['connects']:,.0f} | {each['memory']:,.0f} "
            f"| {each['computed']:.1f} |"
        )
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
