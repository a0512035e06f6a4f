"""Who is told of streams that begin and end: hooks, signals, and the log."""

from __future__ import annotations

import pytest

from servers import Server, open_stream
from servers import until as until_

HOOKS = """
import logging, socket, threading, time
from handover import taken
from sse_channel import SSEChannel, configure, on_client

configure(bus="memory://")
told = []

def names():
    return [thread.name for thread in threading.enumerate()]

with SSEChannel("unwatched").stream():
    assert "sse-channel-clients" not in names()

def fail(client):
    raise KeyError("of a hook")

logging.getLogger("sse_channel.clients").setLevel(logging.CRITICAL)
on_client(fail)
on_client(told.append)
channel, other = SSEChannel("a"), SSEChannel("b", capacity=1, overflow="disconnect")

def wait_for(count):
    deadline = time.monotonic() + 30
    while len(told) < count:
        assert time.monotonic() < deadline, told
        time.sleep(0.01)

first = channel.stream()
assert "sse-channel-clients" in names()
first.close()
full = other.stream()
other.publish(1), other.publish(2)
wait_for(4)
with taken(channel):
    wait_for(5)
wait_for(6)
with channel.stream() as revoked:
    channel.disconnect()
wait_for(8)
assert [client.connected for client in told] == [True, False] * 4, told
assert [client.reason for client in told[1::2]] == ["closed", "overflow", "left", "revoked"], told
assert [client.channels for client in told[::2]] == [("a",), ("b",), ("a",), ("a",)]
assert len({client.id for client in told}) == 4
for begun, ended in zip(told[::2], told[1::2]):
    assert begun.id == ended.id and begun.channels == ended.channels
    assert begun.reason is begun.seconds is None
    assert 0 <= ended.seconds < 60
"""


def test_hooks_are_told_of_every_stream_that_begins_and_ends(script):
    script(HOOKS)


def test_hooks_are_told_under_gevent(script):
    script(f"from gevent import monkey; monkey.patch_all()\n{HOOKS}")


def test_a_forked_child_tells_of_its_own(script):
    script(
        """
import os, time
from sse_channel import SSEChannel, configure, on_client

configure(bus="memory://")
told = []
on_client(told.append)
channel = SSEChannel("a")

def check():
    before = len(told)
    channel.stream().close()
    deadline = time.monotonic() + 30
    while len(told) < before + 2:
        assert time.monotonic() < deadline, told
        time.sleep(0.01)
    assert told[-1].id.startswith(f"{os.getpid()}-")

held = channel.stream()
check()
child = os.fork()
if child == 0:
    check()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
check()
"""
    )


def test_the_log_has_a_line_and_fields_for_each(script):
    script(
        """
import logging, os, time
from django.conf import settings

settings.configure(ALLOWED_HOSTS=["testserver"], SSE_CHANNEL={"BUS": "memory://"})
import django
django.setup()
from django.test import RequestFactory
from sse_channel.django import EventStreamResponse

records = []

class Keep(logging.Handler):
    emit = staticmethod(records.append)

logger = logging.getLogger("sse_channel.clients")
logger.addHandler(Keep())
logger.setLevel(logging.INFO)
request = RequestFactory().get("/", REMOTE_ADDR="192.0.2.1")
EventStreamResponse(request, "a", "b\\n", user="x\\ny").close()
deadline = time.monotonic() + 30
while len(records) < 2:
    assert time.monotonic() < deadline, records
    time.sleep(0.01)
begun, ended = records
assert begun.sse_client == ended.sse_client
assert begun.sse_client.startswith(f"{os.getpid()}-")
assert begun.sse_channels == ended.sse_channels == ["a", "b\\n"]
assert (begun.sse_user, begun.sse_address) == ("x\\ny", "192.0.2.1")
assert (ended.sse_reason, ended.sse_seconds >= 0) == ("closed", True)
# One line each, whatever a name has in it.
assert [record.getMessage().count("\\n") for record in records] == [0, 0], records
assert begun.getMessage().startswith("connected client=")
assert "reason=closed seconds=" in ended.getMessage()
"""
    )


@pytest.mark.parametrize("kind", ["gunicorn-sync", "gunicorn-gevent", "uvicorn-asyncio"])
def test_signals_are_sent_for_the_streams_of_a_server(tmp_path, kind):
    with Server(kind, tmp_path, settings="observed.told_settings") as server:
        with open_stream(server, "/news/events/"):
            until_(lambda: "TOLD connected" in server.output(), "the begin")
        whole = "TOLD disconnected 127.0.0.1 default left\n"
        until_(lambda: whole in server.output(), "the end")
        assert server.output().count("TOLD disconnected") == 1
