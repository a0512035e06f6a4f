"""What was acknowledged arrives, once and in order, whatever goes wrong meanwhile: in short.

The long form, with a report, is `make faults`. The same chances are taken again with SSE_TEST_SEED.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import faults
import sse_channel
from commands import load
from delivery import Acknowledged, Published, tally
from faults import FAULTS, Usage, run
from servers import Event

SECONDS = 5
#: Nobody is to wait longer than a second, on a machine that is idle.
LONGEST_WAIT = 30

CASES = [
    pytest.param(fault, bus, kind, id=f"{fault.name}-{bus.__name__}-{kind}")
    for fault in FAULTS
    # One bus shows what has nothing to do with the bus.
    for bus in (fault.buses if fault.is_of_the_bus else fault.buses[:1])
    for kind in fault.kinds
]


# Longer than each of the waits within, so that it is the wait that fails, and says what for.
@pytest.mark.timeout(3 * faults.ALL_WITHIN)
@pytest.mark.parametrize(("fault", "bus", "kind"), CASES)
def test_what_was_acknowledged_reaches_every_follower_once_and_in_order(
    fault: faults.Fault, bus: type[faults.Bus], kind: str, tmp_path: Path
) -> None:
    seed = int(os.environ.get("SSE_TEST_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}")
    log = tmp_path / "server.log"
    try:
        outcome = run(fault, bus, kind, seconds=SECONDS, chance=random.Random(seed), log=log)
    finally:
        print(log.read_text() if log.exists() else "the server did not start")
    print(outcome.blows, outcome.tally)
    assert outcome.problems == []
    assert outcome.tally.longest_wait <= LONGEST_WAIT


class Came:
    """A follower with what its streams, one after the other, brought it."""

    def __init__(self, *streams: Sequence[Event]) -> None:
        self.streams = [SimpleNamespace(events=list(events)) for events in streams]


def test_who_has_come_back_since_the_last_article_has_it_still():
    article = event(4, '{"id":7,"headline":"The last article"}')
    assert faults.has_article(Came([*ALL, article]), 7)
    assert faults.has_article(Came([*ALL, article], [], []), 7)
    # One that was under way may come after it.
    assert faults.has_article(Came([*ALL, article], [event(5)]), 7)
    assert not faults.has_article(Came(ALL, []), 7)
    assert not faults.has_article(Came([], [*ALL, article]), 8)
    assert not faults.has_article(Came(), 7)


# --- The tally ------------------------------------------------------------------------------------


class Received:
    """A follower that has received what a case says."""

    def __init__(self, *events: Event) -> None:
        self.events = list(events)
        self.streams: list[Any] = []
        self.failures: list[str] = []

    def longest_wait(self, times: object) -> float:
        return 0.0


class Submitted:
    def __init__(self, *accepted: int) -> None:
        self.accepted = list(accepted)
        self.refused = 0


def event(n: int, data: str | None = None) -> Event:
    return Event("message", data or f'{{"publisher": "p", "n": {n}}}', f"{1000 + n}-0")


RESET = Event("stream-reset", '{"reason": "gone"}', "")


def told(
    *followers: Sequence[Event], acknowledged: int = 4, refused: Sequence[int] = (), articles=()
) -> dict[str, int]:
    known = [Acknowledged(n, 0.0, f"{1000 + n}-0") for n in range(acknowledged)]
    result = tally(
        [Received(*events) for events in followers],
        {"p": Published(known, list(refused))},
        Submitted(*articles),
    )
    wanted = ("lost", "told", "doubled", "disordered")
    return {name: getattr(result, name) for name in wanted if getattr(result, name)}


ALL = [event(n) for n in range(4)]


def test_a_tally_of_perfect_delivery():
    assert told(ALL, ALL) == {}


def test_what_one_follower_lacks_is_lost():
    assert told(ALL, ALL[:2] + ALL[3:]) == {"lost": 1}
    assert told(ALL[1:], ALL[:3]) == {"lost": 2}


def test_what_nobody_has_is_lost_for_each():
    assert told(ALL[1:], ALL[1:]) == {"lost": 2}
    assert told(ALL, ALL, articles=[7]) == {"lost": 2}


def test_what_was_never_acknowledged_must_reach_all_or_nobody():
    assert told([*ALL, event(4)], [*ALL, event(4)]) == {}
    assert told([*ALL, event(4)], ALL) == {"lost": 1}
    assert told([*ALL, event(5)], [*ALL, event(5)], refused=[4]) == {}


def test_a_gap_that_a_client_is_told_of_is_no_loss():
    assert told([ALL[0], RESET, ALL[3]]) == {"told": 2}
    # But only there.
    assert told([ALL[0], ALL[2], RESET, ALL[3]]) == {"lost": 1}


def test_an_event_that_comes_twice_is_doubled():
    assert told([*ALL, ALL[3]]) == {"doubled": 1}
    assert told([*ALL, ALL[1]]) == {"doubled": 1, "disordered": 1}


def test_a_publication_under_two_ids_is_doubled():
    again = event(9, '{"publisher": "p", "n": 3}')
    assert told([*ALL, again]) == {"doubled": 1}
    article = '{"id": 7}'
    assert told([*ALL, event(8, article), event(9, article)], articles=[7]) == {"doubled": 1}


def test_an_event_of_another_content_is_not_that_event():
    assert told([*ALL[:3], event(3, '{"publisher": "q", "n": 3}')]) == {"doubled": 1}


def test_events_that_change_places_are_out_of_order():
    assert told([ALL[0], ALL[2], ALL[1], ALL[3]]) == {"disordered": 1}


# --- What a run says that failed ------------------------------------------------------------------


def test_a_run_that_fails_leaves_what_the_server_said(tmp_path):
    def fail(scene: faults.Scene) -> bool:
        raise AssertionError("as it was to")

    fault = faults.Fault("one that fails", (fail,), (faults.Local,))
    log = tmp_path / "server.log"
    with pytest.raises(AssertionError, match=r"as it was to; .* for up to \d+\.\d s"):
        run(fault, faults.Local, "gunicorn-sync-3", seconds=1, chance=random.Random(0), log=log)
    assert "Booting worker" in log.read_text()


_STOPPED = """
import os, signal, subprocess, sys
from faults import Pulse
with Pulse() as pulse:
    again = f"sleep 1.5; kill -CONT {os.getpid()}"
    with subprocess.Popen(["sh", "-c", again]):
        os.kill(os.getpid(), signal.SIGSTOP)
print(pulse.longest)
"""


def test_a_standstill_of_the_clients_is_noticed():
    said = subprocess.run(
        [sys.executable, "-c", _STOPPED],
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(said.stdout) >= 1


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command() -> ModuleType:
    return load("faults")


def outcome(**changes: int) -> faults.Outcome:
    known = [Acknowledged(n, 0.0, f"{1000 + n}-0") for n in range(4)]
    perfect = tally([Received(*ALL)], {"p": Published(known, [])}, Submitted())
    return faults.Outcome(
        FAULTS[0],
        "gunicorn-sync-3",
        "Local",
        {"kill_a_worker": 3},
        10.0,
        perfect._replace(**changes),
        Usage(30e6, 31.0),
        Usage(31e6, 31.0),
        0.2,
        "",
    )


def test_the_report_has_a_line_for_each_fault_and_says_what_was_wrong(command):
    report = command.report([outcome(), outcome(lost=2)], [("the disk is full", "root is missing")])
    lines = [line for line in report.splitlines() if line.startswith("| kill -9 of workers")]
    assert len(lines) == 2
    assert "2 lost, 0 doubled, 0 out of order" in report
    assert "the disk is full: root is missing" in report
    assert report.splitlines()[-1] == "2 faults: 1 held, 1 failed, 1 skipped"
    assert not command.has_held([outcome(), outcome(lost=2)])
    assert not command.has_held([])
    assert command.has_held([outcome()])


def test_a_build_of_the_extension_meanwhile_is_noticed(command, tmp_path, monkeypatch):
    before = command.extension()
    other = tmp_path / "other.so"
    other.write_bytes(b"")
    monkeypatch.setattr(sse_channel._sse_channel, "__file__", str(other))
    assert command.extension() != before
