"""Figures for Prometheus: the sums over all processes of the project on this host.

Whichever worker is scraped gives the same, since each can read what the others count (see
`sse_channel.host_stats`): neither ``PROMETHEUS_MULTIPROC_DIR`` nor a port for each worker is
needed, and counters do not run backwards when a worker ends. It needs ``prometheus-client``::

    pip install "sse-channel[prometheus]"

With Django, `sse_channel.django.metrics` is the view. Elsewhere, and beside metrics of your own::

    from prometheus_client import REGISTRY
    from sse_channel.prometheus import Collector

    REGISTRY.register(Collector())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

from .host import sums

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector as _Collector
except ImportError as error:
    raise ImportError(
        'sse_channel.prometheus needs prometheus-client: pip install "sse-channel[prometheus]"'
    ) from error

__all__ = ["Collector"]


class Collector(_Collector):
    """What `host_stats` tells, as metrics; each scrape reads it anew.

    Where names of channels are made of ids (``user-1234``), each id would be a time series of its
    own: group them, or leave the label out.

    Args:
        by_channel: whether the metrics of channels have the label ``channel``; without it they are
            sums over all channels.
        group: called with a channel's name, gives the label for it; channels with the same label
            are added up.

    Raises:
        TypeError: a `group` that cannot be called, or one although there is no label.
    """

    def __init__(
        self, *, by_channel: bool = True, group: Callable[[str], str] | None = None
    ) -> None:
        if group is not None and not callable(group):
            raise TypeError(f"group must be a callable, not {type(group).__name__}")
        if group is not None and not by_channel:
            raise TypeError("group= makes the label channel, which by_channel=False leaves out")
        self._labels = ["channel"] if by_channel else []
        self._label_of = group or (lambda name: name)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that a registration reads no figures."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics now.

        Raises:
            TypeError: what `group` gave is no `str`.
        """
        figures = sums(self._key)
        yield from self._of_channels(figures["channels"])
        processes = figures["processes"]
        yield GaugeMetricFamily(
            "sse_channel_processes",
            "Processes of this host that use named channels.",
            value=len(processes),
        )
        yield GaugeMetricFamily(
            "sse_channel_unshared_channels",
            "Channels that processes count where a scrape of another process does not see them.",
            value=sum(process["unshared"] for process in processes),
        )
        buses = [process["bus"] for process in processes]
        yield GaugeMetricFamily(
            "sse_channel_bus_lag_seconds",
            "Time from the ordering of the newest event that a process got from another one to its "
            "delivery there; the longest of all processes.",
            value=max((bus["lag"] for bus in buses), default=0.0),
        )
        yield GaugeMetricFamily(
            "sse_channel_bus_connected",
            "Whether all processes that have used the bus can reach it.",
            value=int(all(bus["connected"] is not False for bus in buses)),
        )
        refused = CounterMetricFamily(
            "sse_channel_offload_refused",
            "Streams that stayed with the server, or found no place.",
            labels=["reason"],
        )
        for reason, count in sorted(figures["refused"].items()):
            refused.add_metric([reason], count)
        yield refused

    def _key(self, name: str) -> str:
        if not self._labels or not name:
            return ""
        label = self._label_of(name)
        if not isinstance(label, str):
            raise TypeError(f"group must give a str for {name!r}, not {type(label).__name__}")
        return label

    def _of_channels(self, channels: dict[str, dict[str, Any]]) -> Iterator[Metric]:
        labels = self._labels
        rows = [([name] if labels else [], its) for name, its in sorted(channels.items())]
        clients = GaugeMetricFamily(
            "sse_channel_clients",
            "Clients now: queues, streams that a Python server iterates, offloaded sockets.",
            labels=[*labels, "kind"],
        )
        for label, its in rows:
            for kind, count in its["clients"].items():
                clients.add_metric([*label, kind], count)
        yield clients
        for key, name, text in (
            ("published", "events_published", "Events that processes of this host published."),
            ("delivered", "deliveries", "Events that clients took, each counted for each client."),
            (
                "bytes",
                "delivered_bytes",
                "Bytes of the events that streams took, as they went out.",
            ),
            ("dropped", "dropped", "Events for which a client had no room."),
        ):
            counter = CounterMetricFamily(f"sse_channel_{name}", text, labels=labels)
            for label, its in rows:
                counter.add_metric(label, its[key])
            yield counter
        disconnected = CounterMetricFamily(
            "sse_channel_disconnected", "Clients that are gone.", labels=[*labels, "reason"]
        )
        for label, its in rows:
            for reason, count in its["disconnected"].items():
                disconnected.add_metric([*label, reason], count)
        yield disconnected
        delay = HistogramMetricFamily(
            "sse_channel_delivery_delay_seconds",
            "Time from the ordering of an event to its delivery, without what clients missed and "
            "were given when they came back.",
            labels=labels,
        )
        for label, its in rows:
            bounds = [*map(str, its["delay"]["le"]), "+Inf"]
            counts = accumulate(its["delay"]["counts"])
            delay.add_metric(label, list(zip(bounds, counts, strict=True)), its["delay"]["sum"])
        yield delay
