"""The command of the soak: what its clients notice, what it calls flat, and a short run of it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from commands import load
from parts import missing
from servers import until

ROOT = Path(__file__).parent.parent
# The load generator is built within it, if it has not been.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    return load("soak")


@pytest.fixture(scope="module")
def program() -> Path:
    """The load generator, as the Rust tests build it."""
    if shutil.which("cargo") is None:
        missing("cargo")
    command = ["cargo", "test", "--quiet", "--locked", "--no-default-features", "--no-run"]
    done = subprocess.run(
        [*command, "--message-format=json"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    built = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]
    (path,) = (
        each["executable"]
        for each in built
        if each["reason"] == "compiler-artifact" and each["target"]["name"] == "load"
    )
    return Path(path)


# --- What the clients notice --------------------------------------------------------------


class Connection:
    """A client's connection to a server of the test's, which sends what it is told to."""

    def __init__(self, accepted: socket.socket) -> None:
        accepted.settimeout(30)
        self.socket = accepted
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += accepted.recv(1)
        found = re.search(rb"Last-Event-ID: (\S+)", request)
        self.last_event_id = found and found[1].decode()
        self.gzip = zlib.compressobj(wbits=31) if b"gzip" in request else None
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            + (b"Content-Encoding: gzip\r\n" if self.gzip else b"")
            + b"Transfer-Encoding: chunked\r\n\r\n"
        )

    def send(self, *frames: str) -> None:
        """Send frames, each a chunk, byte by byte: a client may read them in any split."""
        for frame in frames:
            body = frame.encode()
            if self.gzip:
                body = self.gzip.compress(body) + self.gzip.flush(zlib.Z_SYNC_FLUSH)
            for byte in b"%x\r\n%s\r\n" % (len(body), body):
                self.socket.send(bytes([byte]))

    def end(self, retry: int) -> None:
        self.send(f"retry: {retry}\n\n")
        self.socket.sendall(b"0\r\n\r\n")
        self.socket.close()


OPENING = "retry: 3000\nid: 5-0\n\n"


def frame(n: int) -> str:
    """The nth event of publisher 7, in two lines of data."""
    return f": a comment\nid: 5-{n + 1}\ndata: {{\ndata: {json.dumps({'p': 7, 'n': n})[1:]}\n\n"


@pytest.fixture
def connect(soak: ModuleType, program: Path) -> Callable[..., Any]:
    """Clients of the load generator at a server of the test's."""

    @contextmanager
    def connect(clients: int) -> Iterator[tuple[Any, Callable[[], Connection]]]:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            listener.settimeout(30)
            load = soak.Load(program, listener.getsockname()[1], 0, [f"/events/={clients}"])
            accepted: list[Connection] = []

            def accept() -> Connection:
                accepted.append(Connection(listener.accept()[0]))
                return accepted[-1]

            try:
                yield load, accept
            finally:
                load.stop()
                for connection in accepted:
                    connection.socket.close()

    return connect


def wrong(figures: dict[str, Any]) -> list[int]:
    return [figures[name] for name in ("lost", "doubled", "out_of_order")]


def received(load: Any, count: int) -> dict[str, Any]:
    """The figures when so many events have come."""
    until(lambda: load.tell("figures")["events"] >= count, f"{count} events")
    return load.tell("figures")


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0, 1, 2, 3, 4], [0, 0, 0]),
        ([0, 1, 3, 4], [1, 0, 0]),
        ([0, 1, 2, 2, 3, 4], [0, 1, 0]),
        ([0, 1, 3, 2, 4], [1, 1, 0]),
        ([0, 1, 2, 3], [0, 0, 0]),
    ],
    ids=["whole", "lost", "doubled", "in another order", "not the last"],
)
def test_a_client_notices_what_others_have_got_otherwise(connect, numbers, expected):
    with connect(4) as (load, accept):
        connections = [accept() for _ in range(4)]
        # One of four takes gzip: the odd one out, whichever it is.
        connections.sort(key=lambda connection: connection.gzip is not None)
        assert [each.gzip is not None for each in connections] == [False, False, False, True]
        for connection in connections[:3]:
            connection.send(OPENING, *map(frame, range(5)))
        received(load, 15)
        connections[3].send(OPENING, *map(frame, numbers))
        figures = received(load, 15 + len(numbers))
        assert wrong(figures) == expected, figures["complaints"]
        assert figures["behind"] == 5 - (numbers[-1] + 1)
        assert figures["paths"]["/events/"]["publishers"] == {"7": 5}


def test_an_event_that_nobody_has_got_is_noticed_by_its_publishers_numbers(connect):
    with connect(2) as (load, accept):
        for connection in (accept(), accept()):
            connection.send(OPENING, *map(frame, [0, 1, 3]))
        received(load, 6)
        assert wrong(load.tell("finish")) == [1, 0, 0]


def test_an_event_that_was_published_while_nobody_was_there_is_not_lost(connect):
    with connect(2) as (load, accept):
        begins, resumes = accept(), accept()
        resumes.send(OPENING, frame(0))
        begins.send(OPENING.replace("5-0", "5-2"), frame(2))
        received(load, 2)
        resumes.send(frame(1), frame(2))
        received(load, 4)
        assert wrong(load.tell("finish")) == [0, 0, 0]


def test_an_event_that_others_get_later_than_the_first_is_lost_to_that_one(connect):
    with connect(2) as (load, accept):
        misses, gets = accept(), accept()
        misses.send(OPENING, frame(0), frame(2))
        received(load, 2)
        gets.send(OPENING, *map(frame, range(3)))
        received(load, 5)
        assert wrong(load.tell("finish")) == [1, 0, 0]


def test_a_place_that_is_moved_without_a_reset_is_a_loss(connect):
    with connect(2) as (load, accept):
        one, other = accept(), accept()
        one.send(OPENING, *map(frame, range(5)))
        received(load, 5)
        other.send(OPENING, frame(0), "id: 5-4\n\n", frame(4))
        received(load, 7)
        assert wrong(load.tell("finish")) == [3, 0, 0]


def test_a_client_comes_back_when_it_is_told_to_and_is_checked_across_its_connections(connect):
    with connect(1) as (load, accept):
        first = accept()
        assert first.last_event_id is None
        first.send(OPENING, *map(frame, range(3)))
        first.end(retry=20)
        second = accept()
        assert second.last_event_id == "5-3"
        second.send(*map(frame, [3, 4]))
        figures = received(load, 5)
        assert wrong(figures) == [0, 0, 0]
        assert (figures["connections"], figures["ended"], figures["cut"]) == (2, 1, 0)
        second.socket.close()  # without an end of the body
        accept().send(*map(frame, [4, 6]))
        received(load, 7)
        figures = load.tell("finish")
        assert wrong(figures) == [1, 1, 0]
        assert figures["cut"] == 1


def test_a_reset_is_counted_and_what_it_told_of_is_not_lost(connect):
    with connect(2) as (load, accept):
        one, other = accept(), accept()
        one.send(OPENING, *map(frame, range(5)))
        received(load, 5)
        # The place that it goes on from stands in front of the reset.
        other.send(OPENING, frame(0), "id: 5-2\n\n")
        other.send("event: stream-reset\ndata: {}\n\n", *map(frame, [3, 4]))
        figures = received(load, 9)
        assert (wrong(figures), figures["resets"]) == ([0, 0, 0], 1)


def test_an_answer_that_is_none_is_a_failure(connect):
    with connect(1) as (load, accept):
        connection = accept()
        # It leaves at once, before the last byte is sent.
        with contextlib.suppress(ConnectionError):
            connection.send(OPENING, 'data: {"p": 7, "n": 0}\n\n')  # an event without an id
        until(lambda: load.tell("figures")["failures"], "a failure")
        assert load.tell("figures")["failures"] == {"an event without an id": 1}


# --- What is flat -------------------------------------------------------------------------


def looks_of(soak: ModuleType, values: Sequence[float], role: str = "worker") -> list[Any]:
    """Looks at one process every ten seconds, with those sizes."""
    rest = {"PSS": 1.0, "RSS": 1.0, "descriptors": 20.0, "threads": 5.0, "sockets": 9.0}
    return [
        soak.Look(
            **{"at": 10.0 * n, "process": 1, "role": role, "generation": 0},
            **{"age": 10.0 * n, "values": {"USS": value, **rest}},
        )
        for n, value in enumerate(values)
    ]


def run_of(soak: ModuleType, looks: list[Any]) -> Any:
    run = soak.Run(
        seconds=600, clients=1, churn=0, ordinary=0, interval=10, settles=120, looks=looks
    )
    run.figures = {"events": 1}
    return run


BREATHES = [30 + (0.4 if n % 3 else 0.0) for n in range(60)]


def test_a_process_that_leaks_is_named_and_one_that_breathes_is_flat(soak):
    assert run_of(soak, looks_of(soak, BREATHES)).failures() == []
    # 27 MB an hour, beside the breathing and behind a beginning that is full of growth.
    leaks = [20.0 + n for n in range(12)] + [v + n * 0.075 for n, v in enumerate(BREATHES[12:])]
    (failure,) = run_of(soak, looks_of(soak, leaks)).failures()
    assert failure.startswith("USS of worker 1, 0 reloads grew by 3.")
    begins = [20.0 + n for n in range(12)] + BREATHES[12:]
    assert run_of(soak, looks_of(soak, begins)).failures() == []
    assert run_of(soak, looks_of(soak, leaks[::-1])).failures() == []


def test_a_slope_has_units_of_the_quantity_and_seconds(soak):
    series = soak.Series("one", "descriptors", [(10.0 * n, 20 + 0.5 * n) for n in range(11)])
    assert series.slope == pytest.approx(0.05)
    assert series.growth == pytest.approx(5)
    assert not series.is_flat
    assert not soak.Series("one", "threads", [(0.0, 5), (10.0, 5), (20.0, 6), (30.0, 6)]).is_flat


def test_the_workers_of_each_reload_are_compared_at_one_age(soak):
    looks = [
        soak.Look(
            at=100.0 * generation + age,
            process=10 + generation,
            role="worker",
            generation=generation,
            age=float(age),
            # Each grows with its age, which says nothing; each reload's begin larger.
            values={"USS": 30 + age / 10 + 1.5 * generation},
        )
        for generation in range(5)
        for age in range(0, 90, 10)
    ]
    (series,) = soak.generations(looks, ["USS"], 60)
    assert [value for _, value in series.points] == [37.5, 39, 40.5, 42]
    assert series.growth == pytest.approx(4.5)
    assert not series.is_flat


def test_a_file_that_is_open_for_a_moment_at_that_age_is_no_growth(soak):
    looks = [
        soak.Look(100.0 * generation + age, 10 + generation, "worker", generation, float(age), its)
        for generation in range(1, 5)
        for age in range(0, 90, 10)
        for its in [{"descriptors": 24.0 if age == 60 and generation > 2 else 20.0}]
    ]
    (series,) = soak.generations(looks, ["descriptors"], 60)
    assert [value for _, value in series.points] == [20, 20, 20, 20]
    assert series.is_flat


def test_clients_that_have_not_got_what_was_published_are_named(soak):
    server = type("Server", (), {"environment": {}})()
    publishers = soak.Publishers(server)
    publishers.published = {1: soak.Published("ticker", 5), 2: soak.Published("bulk", 3, True)}
    publishers.articles.count = 2

    def figures(ticker: int, bulk: int, articles: int) -> dict[str, Any]:
        both = {"publishers": {"1": ticker, "2": bulk}, "unnumbered": 0}
        news = {"publishers": {}, "unnumbered": articles}
        return {"paths": {"/channels/ticker,bulk/": both, "/news/events/": news}}

    assert soak.differences(figures(5, 3, 2), publishers) == []
    assert soak.differences(figures(5, 4, 2), publishers) == []  # it was not answered
    assert len(soak.differences(figures(4, 2, 1), publishers)) == 3
    assert len(soak.differences(figures(6, 3, 3), publishers)) == 2


def test_more_cannot_leave_than_can_be_told_from_a_server_that_takes_nobody(soak, capsys):
    assert soak.parse(["--clients", "1000", "--churn", "100"]).churn == 100
    with pytest.raises(SystemExit):
        soak.parse(["--clients", "1000", "--churn", "101"])
    assert "--churn: a tenth of the clients" in capsys.readouterr().err


# --- The whole ----------------------------------------------------------------------------


def test_the_whole_command_in_short(soak, program, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "soak.py", "--minutes", "0.1"),
            *("--clients", "50", "--churn", "3", "--load", program, "--directory", tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = (tmp_path / "report.md").read_text()
    assert report in done.stdout, done.stderr
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", report, re.MULTILINE))
    for name in ("lost", "doubled", "out of order", "resets"):
        assert rows[name] == "0", report
    assert rows["connections left after all had gone"] == "0"
    assert rows["reloads, and s until nearly all were back"].startswith("1: ")
    assert int(rows["streams ended by the server, cut by it"].split(",")[0]) > 0
    assert int(rows["published"]) > 10
    assert int(rows["delivered"].split(",")[0]) > 100
    # Seconds say nothing about slopes; of everything else nothing may be wrong.
    outcome = report.split("\n\n")[2]
    failures = outcome.removeprefix("FAILED: ").split("; ") if "FAILED" in outcome else []
    assert [each for each in failures if " grew by " not in each] == []
