"""The monitor: its samples, who may see it, and its page."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import RequestFactory

from buses import BUSES, bus_of
from processes import Process
from servers import Server, Stream, open_stream, open_streams, run_python, spread_streams, until
from sse_channel._sse_channel import DELAY_BOUNDS
from sse_channel.django import monitor
from sse_channel.monitor import Sampler

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

# --- Samples ----------------------------------------------------------------------------------

QUIET = [0] * (len(DELAY_BOUNDS) + 1)


def facts(
    channels: dict[str, dict[str, int]] | None = None, sockets: int = 0, **more: Any
) -> dict[str, Any]:
    """What a process has counted, as it tells it."""
    counts = ("published", "received", "delivered", "dropped", "bytes")
    listed = [
        {**dict.fromkeys(counts, 0), "name": name, "clients": kinds(sockets), **its}
        for name, its in (channels or {}).items()
    ]
    totals: dict[str, Any] = {key: sum(its[key] for its in listed) for key in counts}
    totals |= {"clients": kinds(sockets), "disconnected": {}, "delays": QUIET}
    totals |= more.pop("totals", {})
    bus = {"connected": True, "lag": 0.0}
    return {
        "totals": totals,
        "channels": listed,
        "more_channels": 0,
        "refused": {},
        "bus": bus,
    } | more


def kinds(sockets: int) -> dict[str, int]:
    return {"queue": 0, "stream": 0, "socket": sockets}


def view(host: dict[str, Any], **processes: dict[str, Any]) -> dict[str, Any]:
    told = [{**its, "process": int(name[1:]), "instance": 1} for name, its in processes.items()]
    return {"name": "here", "processes": told, "host": host}


def answer(host: str, process: int, its: dict[str, Any], **more: Any) -> dict[str, Any]:
    rest = {"host": host, "process": process, "instance": 1, "seconds": 100.0, "memory": 5}
    return {**its, **rest, "slowest": [], **more}


def test_a_sample_tells_what_happened_since_the_last_look():
    sampler = Sampler()
    before = facts({"a": {"published": 10, "delivered": 100, "bytes": 1000}}, sockets=3)
    after = facts(
        {"a": {"published": 14, "delivered": 112, "bytes": 3000, "dropped": 2}},
        sockets=4,
        totals={"disconnected": {"left": 6}, "delays": [6, 4, 2, *QUIET[3:]]},
        refused={"full": 1},
    )
    assert sampler.digest(view(before, p1=before), [], None, 50.0) is None
    # Half of it by a process that has ended: it is in the sums.
    sample = sampler.digest(view(after, p1=before), [], None, 52.0)
    series = sample["series"]
    assert sample["seconds"] == 2.0
    assert [series[key] for key in ("events", "deliveries", "bytes", "dropped")] == [2, 6, 1000, 1]
    assert series["disconnected"] == {"left": 3.0}
    assert series["refused"] == {"full": 0.5}
    assert series["clients"] == kinds(3)
    # Of 12 that were spread over 0 to 1, 1 to 2 and 2 to 5 ms, 6 took a millisecond at the most.
    assert series["delay"] == pytest.approx({"p50": 0.001, "p90": 0.0032, "p99": 0.00482})
    (channel,) = sample["channels"]
    assert (channel["events"], channel["deliveries"]) == (2.0, 6.0)
    again = sampler.digest(view(after, p1=before), [], None, 53.0)
    assert again["series"]["delay"] is None
    assert again["series"]["deliveries"] == 0


def test_processes_of_other_hosts_add_up_with_those_of_this_one():
    sampler = Sampler()
    here = facts({"a": {"delivered": 5}}, sockets=1)
    there = facts({"a": {"delivered": 50}, "b": {"received": 7, "delivered": 7}}, sockets=2)
    sampler.digest(
        view(here, p1=here), [answer("here", 1, here), answer("there", 1, there)], 0, 0.0
    )
    here_now = facts({"a": {"delivered": 7, "received": 1}}, sockets=1)
    there_now = facts(
        {"a": {"delivered": 54, "received": 1}, "b": {"received": 10, "delivered": 10}}, sockets=2
    )
    new = facts({"a": {"delivered": 3, "received": 1}}, sockets=3)
    answers = [
        answer("here", 1, here_now, seconds=101.0),
        answer("there", 1, there_now, seconds=101.0),
        answer("there", 2, new, seconds=0.5),
    ]
    sample = sampler.digest(view(here_now, p1=here_now), answers, 0, 1.0)
    series = sample["series"]
    assert series["processes"] == 3
    assert sum(series["clients"].values()) == 6
    assert series["deliveries"] == 2 + 4 + 3 + 3
    # Nobody who is known has published them: they are seen where they arrived.
    assert series["events"] == 1 + 3
    assert [channel["name"] for channel in sample["channels"]] == ["a", "b"]
    assert [channel["events"] for channel in sample["channels"]] == [1.0, 3.0]
    rows = [(row["host"], row["process"], row["memory"]) for row in sample["processes"]]
    assert rows == [("here", 1, 5), ("there", 1, 5), ("there", 2, 5)]


def events_of_looks(*looks: tuple[int, int]) -> list[float]:
    """The events of one channel, look by look, from what was published and received by then."""
    sampler = Sampler()
    events = []
    for second, (published, received) in enumerate([(0, 0), *looks]):
        its = facts({"a": {"published": published, "received": received}}, sockets=1)
        worker = facts({"a": {"received": received}}, sockets=1)
        sample = sampler.digest(view(its, p1=worker), [], None, float(second))
        if sample is not None:
            assert sample["channels"][0]["events"] == sample["series"]["events"]
            events.append(sample["series"]["events"])
    return events


def test_an_event_that_is_seen_to_arrive_before_its_publication_is_counted_is_one():
    assert events_of_looks((24, 25), (25, 25), (26, 26)) == [25, 0, 1]


def test_an_event_whose_publication_is_counted_before_it_is_seen_to_arrive_is_one():
    assert events_of_looks((25, 24), (25, 25), (26, 26)) == [25, 0, 1]
    # Nobody listens to what comes first.
    assert events_of_looks((25, 0), (50, 0), (51, 1)) == [25, 25, 1]


def test_events_of_this_host_and_of_others_add_up():
    assert events_of_looks((0, 10), (0, 20), (5, 35), (5, 45)) == [10, 10, 15, 10]


def test_two_processes_of_one_name_and_number_are_two():
    sampler = Sampler()
    own = facts({"a": {"delivered": 100}}, sockets=3)
    others = [
        answer("here", 1, facts({"a": {"delivered": n}}, sockets=n), instance=n) for n in (5, 7)
    ]
    sampler.digest(view(own, p1=own), others, 0, 0.0)
    later = [
        answer("here", 1, facts({"a": {"delivered": n + 10}}, sockets=n), instance=n, seconds=101.0)
        for n in (7, 5)
    ]
    sample = sampler.digest(view(own, p1=own), later, 0, 1.0)
    assert sample["series"]["processes"] == 3
    assert sum(sample["series"]["clients"].values()) == 15
    assert sample["series"]["deliveries"] == 20


def test_an_answer_that_comes_late_or_early_does_not_change_the_rate():
    sampler = Sampler()
    none = facts()
    rates = []
    for at, now in ((0.0, 0.1), (1.0, 1.8), (2.0, 2.1), (3.0, 3.1)):
        there = facts({"a": {"delivered": round(100 * at)}}, sockets=1)
        sample = sampler.digest(view(none), [answer("there", 1, there, seconds=50 + at)], 0, now)
        rates.append(sample and sample["series"]["deliveries"])
    assert rates == [None, 100.0, 100.0, 100.0]


def test_of_a_channel_that_is_new_all_counts_and_of_one_that_was_too_small_nothing():
    for more, rate in ((0, 20.0), (1, 0.0)):
        sampler = Sampler()
        before = facts({"a": {}}, sockets=1) | {"more_channels": more}
        after = facts({"a": {}, "b": {"published": 20}}, sockets=1)
        sampler.digest(view(before, p1=before), [], None, 0.0)
        sample = sampler.digest(view(after, p1=after), [], None, 1.0)
        assert [channel["events"] for channel in sample["channels"]] == [0.0, rate]


def test_what_only_the_process_knows_stands_beside_what_its_file_tells():
    sampler = Sampler()
    its = facts(sockets=1, bus={"connected": True, "lag": 0.5})
    told = answer("here", 1, its, bus={"connected": True, "lag": 0.1, "waiting": 77})
    sampler.digest(view(its, p1=its, p2=facts()), [told], None, 0.0)
    rows = sampler.digest(view(its, p1=its, p2=facts()), [told], None, 1.0)["processes"]
    assert [row["bus"]["waiting"] for row in rows] == [77, None]
    assert [row["bus"]["lag"] for row in rows] == [0.5, 0.0]
    assert [row["memory"] for row in rows] == [5, None]


def test_a_process_that_does_not_answer_is_silent_and_one_that_has_ended_is_gone():
    sampler = Sampler()
    own, far, idle = facts(sockets=1), facts(sockets=2), facts()
    both = [answer("here", 1, own), answer("there", 1, far)]
    sampler.digest(view(own, p1=own, p2=idle), both, None, 0.0)

    def silence(answers: Sequence[dict[str, Any]], missing: int | None, now: float) -> Any:
        sample = sampler.digest(view(own, p1=own, p2=idle), answers, missing, now)
        its = {(row["host"], row["process"]): row["silent"] for row in sample["processes"]}
        return its, sum(sample["series"]["clients"].values())

    # An answer that is late is no silence.
    silent, clients = silence([], 2, 1.0)
    assert silent == {("here", 1): 0.0, ("here", 2): 0.0, ("there", 1): 0.0}
    assert clients == 3
    silent, clients = silence([], 2, 5.0)
    # One without streams is not asked. What another host's had is not known any more.
    assert silent == {("here", 1): 5.0, ("here", 2): 0.0, ("there", 1): 5.0}
    assert clients == 1
    assert silence(both, 0, 6.0)[0] == dict.fromkeys(silent, 0.0)
    # All who have the question have answered.
    assert silence(both[:1], 0, 7.0)[0] == {("here", 1): 0.0, ("here", 2): 0.0}
    assert silence(both, None, 8.0)[1] == 3
    assert ("there", 1) in silence(both[:1], None, 60.0)[0]
    assert ("there", 1) not in silence(both[:1], None, 69.0)[0]


def test_the_slowest_of_all_are_told_and_who_is_hardly_behind_is_not():
    sampler = Sampler()
    none = facts()

    def slow(behind: float) -> dict[str, Any]:
        return {"client": f"1-{behind}", "behind": behind}

    sampler.digest(view(none), [], None, 0.0)
    answers = [
        answer("here", 1, none, slowest=[slow(n) for n in range(9, 0, -1)]),
        answer("there", 2, none, slowest=[slow(8.5), slow(0.05)]),
    ]
    told = sampler.digest(view(none), answers, None, 1.0)["slowest"]
    assert [each["behind"] for each in told] == [9, 8.5, 8, 7, 6, 5, 4, 3, 2, 1]
    assert [each["host"] for each in told[:2]] == ["here", "there"]


# --- Who may look -----------------------------------------------------------------------------


def test_a_project_without_users_says_who_may_look():
    request = RequestFactory().get("/monitor/")
    with pytest.raises(ImproperlyConfigured, match="permission"):
        monitor.is_staff(request)
    with pytest.raises(TypeError, match="permission must be a callable"):
        monitor.urls(permission=True)

    async def may_look(request: Any) -> bool:
        return request.GET.get("token") == "right"

    page, stream, _ = (pattern.callback for pattern in monitor.urls(permission=may_look))
    assert page(RequestFactory().get("/", {"token": "right"})).status_code == 200
    assert page(RequestFactory().get("/", {"token": "wrong"})).status_code == 403
    assert stream(RequestFactory().get("/stream")).status_code == 403
    assert stream(RequestFactory().head("/stream", {"token": "right"})).status_code == 200


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("monitor")
    settings = "observed.users_settings"
    with Server("gunicorn-sync-3", directory, settings=settings, max_clients=2) as server:
        yield server


def test_staff_sees_it_and_others_do_not(guarded):
    path = "/staff/monitor/"
    for url in (path, f"{path}stream"):
        refused = guarded.request("GET", url, Cookie=guarded.cookie_of("bob", "news"))
        assert refused.status == 403
        assert b"may not see" in refused.body
    asked = guarded.request("GET", path)
    assert asked.status == 302
    assert asked.headers["location"] == f"/accounts/login/?next={path}"
    # A stream is for a script, which can do nothing with a page.
    assert guarded.request("GET", f"{path}stream").status == 403
    page = guarded.request("GET", path, Cookie=guarded.cookie_of("ann", "staff"))
    assert page.status == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert "private" in page.headers["cache-control"]
    script = guarded.request("GET", f"{path}monitor.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    unchanged = guarded.request("GET", f"{path}monitor.js", If_None_Match=script.headers["etag"])
    assert (unchanged.status, unchanged.body) == (304, b"")
    for missing in ("page.html", "nothing.js", "..%2f__init__.py"):
        assert guarded.request("GET", f"{path}{missing}").status == 404


def test_no_page_of_another_origin_reads_it(options):
    options(cors_origins=("https://partner.example",))
    (_, stream, _) = (pattern.callback for pattern in monitor.urls(permission=lambda _: True))

    def answered(**headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return stream(RequestFactory().head("/stream", headers=named))

    assert answered(sec_fetch_site="same-origin").status_code == 200
    for site in ("same-site", "cross-site"):
        assert answered(sec_fetch_site=site).status_code == 403
    asked = answered(origin="https://partner.example")
    assert not any(name.startswith("Access-Control") for name in asked.headers)


def test_who_is_no_staff_any_more_sees_no_more_and_a_full_process_can_be_seen(guarded):
    cookie = guarded.cookie_of("eve", "staff")
    with (
        # Nor does it take a place.
        open_streams(guarded, "/staff/monitor/stream", 6, Cookie=cookie),
        spread_streams(guarded, "/public/?channel=a", 2) as streams,
        open_stream(guarded, "/staff/monitor/stream", Cookie=cookie) as stream,
    ):
        assert not any(other.is_ended for other in streams)
        until(lambda: samples_of(stream), "a sample")
        assert guarded.request("GET", "/revoke/eve/staff/").status == 200
        until(lambda: stream.is_ended, "the stream has ended")
    assert guarded.request("GET", "/staff/monitor/stream", Cookie=cookie).status == 403


def test_who_was_let_in_before_and_listens_after_is_ended_once_more(script):
    out = script(
        """
import contextlib, time
from sse_channel import disconnect
from sse_channel.monitor import _Exchange

with contextlib.closing(_Exchange()) as exchange:
    disconnect(user="eve")
    times = []
    began = time.monotonic()
    while len(times) < 2 and time.monotonic() < began + 60:
        users = exchange.revoked()
        assert users in ([], ["eve"]), users
        times += [time.monotonic()] * len(users)
        time.sleep(0.01)
    assert times[1] - times[0] > 1.9, times
    assert exchange.revoked() == []
print("ended twice")
""",
        SSE_CHANNEL_BUS="memory://",
    )
    assert out == "ended twice\n"


def test_a_right_that_was_taken_away_and_given_back_is_one(guarded):
    guarded.cookie_of("may", "staff")
    assert guarded.request("GET", "/revoke/may/staff/").status == 200
    # Longer ago than a stream takes to open: that of a log-out, for one.
    time.sleep(6)
    cookie = guarded.cookie_of("may", "staff")
    with open_stream(guarded, "/staff/monitor/stream", Cookie=cookie) as stream:
        until(lambda: len(samples_of(stream)) > 3, "samples")
        assert not stream.is_ended


# --- Real servers -----------------------------------------------------------------------------

STREAM = "/monitor/stream"


def samples_of(stream: Stream) -> list[dict[str, Any]]:
    return [json.loads(event.data) for event in stream.events if event.type == "sample"]


def publish(server: Server, channel: str, count: int) -> None:
    """Publish from a process that ends after it."""
    code = (
        f"import sse_channel; channel = sse_channel.SSEChannel({channel!r});"
        f"[channel.publish(n) for n in range({count})]"
    )
    run_python("-c", "import django; django.setup(); " + code, environment=server.environment)


@pytest.mark.parametrize("bus", BUSES)
@pytest.mark.parametrize("kind", ["gunicorn-sync-3", "gunicorn-gevent-3", "gunicorn-gthread-3"])
def test_the_samples_of_three_workers_add_up(tmp_path, kind, bus):
    offload = kind != "gunicorn-gevent-3"
    with (
        bus_of(bus) as shared,
        Server(kind, tmp_path, bus=shared.url, offload=offload) as server,
        spread_streams(server, "/channels/a/", 2),
        open_streams(server, "/channels/b/", 3),
        open_streams(server, STREAM, 4) as watchers,
    ):
        held_as = "socket" if offload else "stream"
        first = watchers[0]

        def newest() -> dict[str, Any]:
            return samples_of(first)[-1]

        until(lambda: samples_of(first) and newest()["series"]["clients"].get(held_as) == 9, "all")
        publish(server, "a", 20)
        publish(server, "b", 5)

        def counted(key: str) -> int:
            its = samples_of(first)
            return round(sum(each["series"][key] * each["seconds"] for each in its))

        until(lambda: counted("deliveries") >= 20 * 6 + 5 * 3, "all are delivered")
        until(lambda: counted("events") >= 25, "all are published")
        assert counted("deliveries") == 20 * 6 + 5 * 3
        assert counted("events") == 25
        assert counted("dropped") == 0
        pids = {process.pid for process in server.workers}

        def settled() -> dict[str, Any] | None:
            # The publishers are in the samples of their time, too.
            sample = newest()
            return sample if {row["process"] for row in sample["processes"]} == pids else None

        sample = until(settled, "the workers alone")
        assert [channel["name"] for channel in sample["channels"]] == ["a", "b"]
        assert [channel["clients"][held_as] for channel in sample["channels"]] == [6, 3]
        workers = {row["process"]: row for row in sample["processes"]}
        assert all(row["memory"] > 1e6 and row["silent"] == 0 for row in workers.values())
        assert any(
            delay["p50"] <= delay["p90"] <= delay["p99"] < 30
            for each in samples_of(first)
            if (delay := each["series"]["delay"])
        )

        # Whichever worker they are with, all see the same, and one that comes later, what was.
        def shared() -> set[int]:
            return set.intersection(
                *({each["t"] for each in samples_of(stream)} for stream in watchers)
            )

        until(lambda: len(shared()) >= 3, "samples that all have")
        with open_stream(server, STREAM) as late:

            def past() -> list[int]:
                told = [json.loads(e.data) for e in late.events if e.type == "history"]
                return [each["t"] for one in told for each in one["samples"]]

            until(lambda: {each["t"] for each in samples_of(first)[:3]} <= {*past()}, "the past")
        seconds = [each["t"] // 1000 for each in samples_of(first)]
        # A machine in a hurry may miss one; two of a second there are at a change of hands alone.
        assert len(seconds) - len(set(seconds)) <= 2


def test_a_slow_client_is_named(tmp_path):
    with (
        Server("gunicorn-sync-3", tmp_path, backlog_bytes=50_000_000) as server,
        open_stream(server, STREAM) as watcher,
        contextlib.closing(open_slow(server, "/channels/a/")),
    ):
        publish_large(server, "a", 300)
        until(lambda: samples_of(watcher) and samples_of(watcher)[-1]["slowest"], "one is slow")
        begun = samples_of(watcher)[-1]["slowest"][0]
        assert (begun["kind"], begun["channels"]) == ("socket", ["a"])
        assert begun["address"] == "127.0.0.1"
        assert begun["frames"] > 10
        assert begun["bytes"] > 500_000
        worker = int(begun["client"].split("-")[0])
        assert worker in {process.pid for process in server.workers}
        # Nothing is read: it falls behind by a second each second.
        until(lambda: samples_of(watcher)[-1]["slowest"][0]["behind"] > begun["behind"] + 1, "more")


def open_slow(server: Server, path: str) -> Any:
    import socket

    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert client.recv(15) == b"HTTP/1.1 200 OK"
    return client


def publish_large(server: Server, channel: str, count: int) -> None:
    code = (
        f"import sse_channel; channel = sse_channel.SSEChannel({channel!r});"
        f"[channel.publish('x' * 50_000) for n in range({count})]"
    )
    run_python("-c", "import django; django.setup(); " + code, environment=server.environment)


def test_a_worker_that_is_stopped_is_silent_and_one_that_was_killed_is_gone(tmp_path):
    # Not gunicorn: its arbiter kills a worker that is stopped for long.
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server("gunicorn-sync", tmp_path))
        watcher = stack.enter_context(open_stream(server, STREAM))
        code = "import sse_channel; streams = [SSEChannel('a').stream() for _ in range(5)]"
        other = stack.enter_context(Process(server.bus, code))

        def row() -> dict[str, Any] | None:
            rows = samples_of(watcher)[-1]["processes"] if samples_of(watcher) else []
            return next((row for row in rows if row["process"] == other.pid), None)

        until(lambda: row() is not None and row()["clients"]["stream"] == 5, "it is there")
        assert row()["silent"] == 0
        other.kill(signal.SIGSTOP)
        until(lambda: row()["silent"] > 3, "it is silent")
        # They are there all the same.
        assert samples_of(watcher)[-1]["series"]["clients"]["stream"] == 5
        other.kill(signal.SIGCONT)
        until(lambda: row()["silent"] == 0, "it answers")
        other.kill()
        until(lambda: row() is None, "it is gone")
        assert samples_of(watcher)[-1]["series"]["clients"]["stream"] == 0


def test_another_worker_goes_on_when_the_one_that_asks_is_killed(tmp_path):
    with (
        Server("gunicorn-sync-3", tmp_path) as server,
        spread_streams(server, STREAM, 1) as watchers,
        open_streams(server, "/channels/a/", 2),
    ):
        until(lambda: all(samples_of(stream) for stream in watchers), "samples")
        for process in server.workers[:2]:
            process.send_signal(signal.SIGKILL)
            known = len(samples_of(watchers[2]))
            until(lambda known=known: len(samples_of(watchers[2])) > known + 2, "they go on")


TELL = """
from sse_channel import _sse_channel
def tell(text, *names):
    for name in names:
        channel = _sse_channel.Channel(_sse_channel.OWN_CHANNELS + name, 16)
        channel.publish(text, json=True, event=None, retry=None, comment=None,
                        limit=10**6, timeout=10, message=None)
"""


def test_neither_disconnects_nor_strangers_words_stop_the_samples(tmp_path):
    with (
        Server("gunicorn-sync", tmp_path, max_event_bytes=5000) as server,
        contextlib.ExitStack() as stack,
    ):
        other = stack.enter_context(Process(server.bus, f"exec({TELL!r})"))
        for text in ("5", "[1]", '{"x": 1}', '{"form": 0}', "null"):
            assert other(f"tell({text!r}, 'answers', 'monitor', 'questions')") == "None"
        watcher = stack.enter_context(open_stream(server, STREAM))
        until(lambda: samples_of(watcher), "a sample")
        other.send("for n in range(100): disconnect(user=str(n)); time.sleep(0.05)")
        for text in ("5", "[1]", '{"x": 1}', '{"form": 0}', "null"):
            other.send(f"tell({text!r}, 'answers', 'monitor', 'questions')")
        seen = len(samples_of(watcher))
        until(lambda: len(samples_of(watcher)) >= seen + 4, "samples go on", within=15)
        assert all(sample["trouble"] is None for sample in samples_of(watcher))
        # The history is one event, of as many samples as the project's limit lets be.
        late = stack.enter_context(open_stream(server, STREAM))
        until(lambda: any(event.type == "history" for event in late.events), "the history")
        assert all(len(event.data) < 5000 for event in late.events if event.type == "history")
        assert "Traceback" not in server.output()


def test_nothing_is_left_when_nobody_watches_any_more(tmp_path):
    with Server("gunicorn-sync", tmp_path) as server:
        with open_stream(server, STREAM) as watcher:
            until(lambda: samples_of(watcher), "a sample")
            before = {thread.id for thread in server.worker.threads()}
        # The thread lingers, for who loads the page again.
        until(lambda: {t.id for t in server.worker.threads()} < before, "it ends", within=60)


def test_the_loss_of_redis_is_told(tmp_path):
    with (
        bus_of("redis") as shared,
        Server("gunicorn-sync", tmp_path, bus=shared.url, publish_timeout=1) as server,
        open_stream(server, STREAM) as watcher,
    ):
        until(lambda: samples_of(watcher), "a sample")
        assert samples_of(watcher)[-1]["trouble"] is None
        stop_redis(shared.url)
        until(lambda: samples_of(watcher)[-1]["trouble"], "the trouble")
        assert "Redis" in samples_of(watcher)[-1]["trouble"]
        shared.kill()
        until(lambda: samples_of(watcher)[-1]["trouble"] is None, "samples again")


def stop_redis(url: str) -> None:
    """End it, until it is started again."""
    import socket

    host, port = url.removeprefix("redis://").split("/")[0].split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"SHUTDOWN NOSAVE\r\n")
        connection.recv(100)


# --- The page ---------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server("gunicorn-gevent-3", tmp_path) as server:
        yield server


def open_page(context: BrowserContext, server: Server) -> Page:
    page = context.new_page()
    page.goto(f"{server.url}/monitor/")
    page.wait_for_selector("body[data-state=live]")
    return page


def figure(page: Page, name: str) -> float:
    return float(page.get_attribute(f"[data-figure={name}]", "data-value") or "nan")


def test_the_page_shows_what_happens_as_it_happens(
    context: BrowserContext, server: Server, errors: list[str], tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    strange = "<img src=x onerror=alert(1)>"
    page = open_page(context, server)
    with open_streams(server, "/channels/a/", 7):
        expect(page.locator("[data-figure=clients]")).to_have_text("7")
        assert figure(page, "clients") == 7
        publish(server, strange, 3)
        publish(server, "a", 100)
        rows = page.locator("#channels tbody tr")
        expect(rows).to_have_count(2)
        expect(rows.nth(0)).to_contain_text("a")
        # Names are text.
        expect(rows.nth(1)).to_contain_text(strange)
        expect(page.locator("[data-legend=delay]")).to_contain_text("s")
        drawn = page.evaluate(
            """() => [...document.querySelectorAll('canvas[data-chart]')].map((canvas) => {
                 const { data } = canvas.getContext('2d')
                     .getImageData(0, 0, canvas.width, canvas.height);
                 return new Set(new Uint32Array(data.buffer)).size;
               })"""
        )
        assert len(drawn) == 7
        assert all(colors > 3 for colors in drawn), drawn
    expect(page.locator("[data-figure=clients]")).to_have_text("0")
    assert page.locator("#processes tbody tr").count() >= 1
    expect(page.locator("#slowest-empty")).to_be_visible()
    assert errors == []


def test_the_page_goes_on_when_its_worker_is_killed(
    context: BrowserContext, server: Server
) -> None:
    from playwright.sync_api import expect

    page = open_page(context, server)
    clients = page.locator("[data-figure=clients]")
    expect(clients).to_have_attribute("data-value", "0")
    for process in server.workers:
        process.send_signal(signal.SIGKILL)
    page.wait_for_selector("body[data-state=connecting], body[data-state=stale]")
    page.wait_for_selector("body[data-state=live]")
    with open_streams(server, "/channels/a/", 2):
        expect(clients).to_have_attribute("data-value", "2")


def test_who_is_refused_is_told_what_to_do(context: BrowserContext, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    with Server("gunicorn-sync", tmp_path, settings="observed.users_settings") as server:
        page = context.new_page()
        page.goto(f"{server.url}/enter/ann/staff/")
        page.goto(f"{server.url}/staff/monitor/")
        page.wait_for_selector("body[data-state=live]")
        server.request("GET", "/revoke/ann/staff/")
        page.wait_for_selector("body[data-state=refused]")
        expect(page.locator("#notice")).to_contain_text("Log in as a member of the staff")
