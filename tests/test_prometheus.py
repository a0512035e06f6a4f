"""Figures of all workers of gunicorn, whichever is asked, and after one of them was killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from django.test import Client
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from servers import Server, spread_streams, until, worker_options
from sse_channel import SSEChannel, host_stats
from sse_channel.prometheus import Collector

PATH = "/news/events/"
STREAMS = 20
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(params=["gunicorn-sync-3", "gunicorn-gevent-3"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with Server(request.param, tmp_path, **worker_options(request.param)) as server:
        until(lambda: len(server.workers) == 3, "three workers")
        yield server


def parsed(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(server: Server, path: str = "/metrics") -> Samples:
    answer = server.request("GET", path)
    assert answer.status == 200, answer
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return parsed(answer.body.decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"sse_channel_{name}", tuple(sorted(labels.items()))]


def test_a_scrape_of_any_worker_is_the_sum_of_all(server: Server) -> None:
    kind = "socket" if server.kind == "gunicorn-sync-3" else "stream"
    news = {"channel": "default"}
    with spread_streams(server, PATH, STREAMS) as streams:
        server.figures()
        for number in range(5):
            server.publish(f"Article {number}")
        until(lambda: all(len(stream.events) >= 5 for stream in streams), "all have all")

        def true_sum(key: str) -> int:
            return sum(figures[key] for figures in server.figures().values())

        delivered = 5 * 3 * STREAMS
        until(lambda: true_sum("delivered") == delivered, "all is counted")
        sent = true_sum("bytes")

        def check(clients: int, processes: set[int]) -> Samples:
            samples = scrape(server)
            assert value(samples, "clients", **news, kind=kind) == clients
            assert value(samples, "processes") == len(processes)
            assert value(samples, "events_published_total", **news) == 5
            assert value(samples, "deliveries_total", **news) == delivered
            assert value(samples, "delivered_bytes_total", **news) == sent
            assert value(samples, "delivery_delay_seconds_count", **news) == delivered
            assert value(samples, "delivery_delay_seconds_bucket", **news, le="+Inf") == delivered
            assert value(samples, "dropped_total", **news) == 0
            assert value(samples, "bus_connected") == 1
            host = server.request("GET", "/host/").json()
            assert {process["process"] for process in host["processes"]} == processes
            assert host["clients"][kind] == clients
            return samples

        workers = {process.pid for process in server.workers}
        for worker in server.workers:
            with server.only(worker):
                check(3 * STREAMS, workers)
        if server.kind == "gunicorn-gevent-3":
            # Told not to offload, it refuses nothing.
            assert not any(name.endswith("refused_total") for name, _ in scrape(server))
        assert value(scrape(server, "/metrics/sums"), "deliveries_total") == delivered

        dead = server.workers[0]
        rest = [process for process in server.workers if process != dead]
        # The arbiter would begin another one.
        server.master.send_signal(signal.SIGSTOP)
        try:
            until(lambda: server.master.status() == psutil.STATUS_STOPPED, "it has stopped")
            dead.send_signal(signal.SIGKILL)
            # With the end of the last of its threads.
            left = {process.pid for process in rest}
            until(lambda: value(scrape(server), "processes") == len(left), "it has ended")
            # Also when its figures are among those of the departed.
            for _ in range(4):
                check(2 * STREAMS, left)
        finally:
            server.master.send_signal(signal.SIGCONT)


def test_channels_can_be_grouped_or_left_out(name: str) -> None:
    for number in range(3):
        SSEChannel(f"{name}-{number}").publish("x")

    def samples(**options: object) -> Samples:
        registry = CollectorRegistry()
        registry.register(Collector(**options))
        return parsed(generate_latest(registry).decode())

    published = "events_published_total"
    assert value(samples(), published, channel=f"{name}-1") == 1
    grouped = samples(group=lambda its: its.rsplit("-", 1)[0])
    assert value(grouped, published, channel=name) == 3
    assert value(samples(by_channel=False), published) == host_stats()["published"]
    with pytest.raises(TypeError, match="callable"):
        Collector(group="x")
    with pytest.raises(TypeError, match="by_channel"):
        Collector(by_channel=False, group=str)
    with pytest.raises(TypeError, match="must give a str"):
        samples(group=len)


def test_the_view_is_read_only_and_not_cached() -> None:
    client = Client()
    answer = client.get("/metrics")
    assert (answer.status_code, answer["Cache-Control"]) == (200, "no-store")
    openmetrics = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert openmetrics.content.endswith(b"# EOF\n")
    assert client.post("/metrics").status_code == 405
