"""Check the replaced generator in one process with gevent; run by `test_news_example`.

gevent_news.py (waiting | heartbeat), with the example's directory on the path.
"""

from gevent import monkey

monkey.patch_all()

import os  # noqa: E402
import sys  # noqa: E402

import django  # noqa: E402
import gevent  # noqa: E402

sys.path.insert(0, os.getcwd())
django.setup()

from news.sse_utils import sse_channel  # noqa: E402
from observed import replaced  # noqa: E402


def check_waiting() -> None:
    """While the generator waits other greenlets run; what is published then reaches it."""
    stream = replaced.news_stream()
    next(stream)
    received = []
    waiting = gevent.spawn(lambda: received.append(next(stream)))

    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            gevent.sleep(0)

    ticking = gevent.spawn(tick)
    while ticks < 1000:
        gevent.sleep(0)
    # Had the wait held up everything, it would have come to its end, with a heartbeat.
    assert not received, received

    sse_channel.publish({"id": 1, "headline": "At last"})
    waiting.get(timeout=30)
    assert '"headline": "At last"' in received[0], received
    ticking.kill()

    assert len(sse_channel.listeners) == 1
    stream.close()
    assert len(sse_channel.listeners) == 0


def check_heartbeat() -> None:
    """When nothing is published the generator gives heartbeats, and goes on."""
    replaced.HEARTBEAT_SECONDS = 0.05
    stream = replaced.news_stream()
    next(stream)
    assert [next(stream), next(stream)] == [":heartbeat\n\n"] * 2
    sse_channel.publish({"id": 1, "headline": "At last"})
    assert '"headline": "At last"' in next(stream)
    stream.close()


{"waiting": check_waiting, "heartbeat": check_heartbeat}[sys.argv[1]]()
