"""What an attacker may try at each boundary; docs/security.md names the boundaries and these tests.

Attacks that belong to one part of the library are tested with that part.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from django.conf import settings
from django.test import RequestFactory

from buses import BUSES, bus_of
from parts import missing
from processes import Process, publish_as
from redis_server import RedisServer
from sse_channel import Event, SSEChannel, config
from sse_channel.clients import logger
from sse_channel.django import EventStreamResponse
from sse_channel.parser import EventStreamParser

TESTS = Path(__file__).parent
SECRET = "hunter2"
NOBODY = 65534

# --- The wire ---------------------------------------------------------------------------------

FORGED = "event: forged\ndata: forged\nid: 9-9\nretry: 1\n\n"
STRANGE = [
    f"{start}{end}{FORGED.replace(chr(10), end)}"
    for start in ("", "x", " x", "\ufeff")
    for end in ("\n", "\r", "\r\n", "\n\n", "\r\r", "\n\r")
] + [" x", "\0", "\ufeff", "\u2028data: forged", "\x85data: forged", "\x0bdata: forged", "\x1b[2J"]


def as_lines(text: str) -> str:
    """A text with its ends of lines as a browser gives them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def rendered(message: str) -> str:
    return message.removeprefix("to be rendered:")


def sent_by(channel: SSEChannel, how: str, text: str) -> bytes:
    """What a client is sent when a stranger's text comes in by one of the ways."""
    render = {"render": rendered} if how == "render" else {}
    initial = {"initial": lambda: text} if how == "initial" else {}
    with channel.stream(heartbeat=None, **render, **initial) as stream:
        opening = next(stream)
        if how == "initial":
            return opening.partition(b"\n\n")[2] or next(stream)
        channel.publish(
            {
                "publish": text,
                "json": {text: [text]},
                "render": f"to be rendered:{text}",
                "comment": Event("message", comment=text),
            }[how]
        )
        return next(stream)


@pytest.mark.parametrize("how", ["publish", "json", "initial", "render", "comment"])
def test_a_strangers_text_is_one_event_and_no_field_of_another(channel, how):
    for text in STRANGE:
        (event,) = EventStreamParser().feed(sent_by(channel, how, text))
        assert event.type == "message"
        assert event.last_event_id != "9-9"
        expected = {"json": {text: [text]}, "comment": "message"}.get(how, as_lines(text))
        assert (event.json() if how == "json" else event.data) == expected


def is_refused(channel: SSEChannel, message: object, why: str, *, event: str | None = None) -> None:
    """A message is refused by each of the ways, and nothing of it is sent."""
    whole = Event(message, event=event) if event is not None else message
    ways: list[Callable[[], object]] = [
        lambda: channel.publish(message, event=event),
        lambda: channel.publish(whole),
        lambda: asyncio.run(channel.apublish(whole)),
        lambda: channel.stream(initial=whole),
    ]
    with channel.stream(heartbeat=None) as stream:
        next(stream)
        for way in ways:
            with pytest.raises(ValueError, match=why):
                way()
        renders = {"render": lambda _: whole, "key": object()}
        with channel.stream(heartbeat=None, **renders) as rendering:
            next(rendering)
            channel.publish("next")
            (got,) = EventStreamParser().feed(next(rendering))
            assert (got.type, got.data) == ("stream-error", '{"reason":"render-failed"}')
        (got,) = EventStreamParser().feed(next(stream))
        assert (got.type, got.data) == ("message", "next")


def test_a_strangers_event_name_is_one_or_none(channel):
    for text in STRANGE:
        if any(end in text for end in "\r\n\0"):
            is_refused(channel, "message", "must not contain CR, LF or NUL", event=text)
            continue
        with channel.stream(heartbeat=None) as stream:
            next(stream)
            channel.publish("message", event=text)
            (event,) = EventStreamParser().feed(next(stream))
            assert (event.type, event.data) == (text, "message")


@pytest.mark.parametrize("field", ["data", "json", "event", "comment"])
def test_what_utf_8_cannot_carry_is_refused_and_nothing_is_sent(channel, field):
    fields = {"data": ["\ud800"]} if field == "json" else {"data": "x", field: "\ud800"}
    is_refused(channel, Event(**fields), "lone surrogate")


# --- One channel and another ------------------------------------------------------------------

# Each is taken for another one of them by something: a pattern of SQL or of Redis, a key, a path,
# a list in a URL, a form, a text in C, a comparison without regard to case.
NAMES = [
    *("a", "A", "a%", "a_", "a*", "a?", "[a]", "a,b", "b", "a ", " a", "a\0", "a\n", "a&channel=b"),
    *(
        "a:state",
        "a}",
        "{a}",
        "../a",
        "/a",
        "a/../b",
        "a'--",
        'a"',
        "%61",
        "a%7D",
        "á",
        "a\u0301",
        "\uff41",
        "x" * 254,
        "x" * 255,
    ),
]


@pytest.mark.parametrize("kind", BUSES)
def test_no_channel_gets_what_is_anothers(kind):
    begin = (
        f"names = {NAMES!r}; channels = [SSEChannel(name) for name in names]; "
        "take = lambda q: [q.get_nowait() for _ in range(q.qsize())]"
    )
    with bus_of(kind) as bus, Process(bus.url, begin) as one, Process(bus.url, begin) as other:
        first = one("channels[0].publish('first')")
        other("live = [channel.listen() for channel in channels]")
        one("[channel.publish(name) for name, channel in zip(names, channels)]")
        own = "[[name] for name in names]"
        assert other(f"[[q.get(timeout=30)] for q in live] == {own}") == "True"
        # One id is a place in all channels, and opens none of the others.
        third = f"[take(channel.listen(last_event_id={first})) for channel in channels] == {own}"
        assert other(third) == "True"
        with Process(bus.url, begin) as late:
            assert late(third) == "True"
        assert other("[take(q) for q in live] == [[] for q in live]") == "True"


# --- The local store and other users of the host ----------------------------------------------


# In the process itself: another user may not be able to run this interpreter.
BECOME_NOBODY = f"import os, socket; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"


def as_nobody(code: str, *arguments: object) -> str:
    """Run Python as another user of the host."""
    if os.getuid() != 0:
        missing("root, to become another user")
    done = subprocess.run(
        [sys.executable, "-I", "-c", BECOME_NOBODY + textwrap.dedent(code), *map(str, arguments)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# What another user may try with a store whose path and names they know, and what came of it.
ATTACKS = """
    import os, socket, sys
    directory, *names = sys.argv[1:]

    def ring(path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bell:
            bell.sendto(b"forged", path)

    attacks = [
        lambda path: open(path, "rb"),
        lambda path: open(path, "r+b"),
        lambda path: os.truncate(path, 0),
        lambda path: os.remove(path),
        lambda path: os.rename(path, path + "x"),
        lambda path: os.chmod(path, 0o777),
        lambda path: os.link(path, path + "-linked"),
        lambda path: os.stat(path),
        ring,
    ]
    tried = [(attack, f"{directory}/{name}") for name in names for attack in attacks]
    tried += [(lambda path: os.symlink("/tmp", path), f"{directory}/link")]
    tried += [(attack, directory) for attack in (os.listdir, os.rmdir)]
    tried += [(lambda path: os.rename(path, path + "x"), directory)]
    tried += [(lambda path: os.chmod(path, 0o777), directory)]
    for attack, path in tried:
        try:
            attack(path)
        except PermissionError:
            continue
        except OSError as error:
            print(path, error)
        else:
            print(path, "succeeded")
"""


def test_another_user_can_neither_read_nor_change_nor_ring(tmp_path):
    with bus_of("local") as bus:
        directory = Path(bus.url.removeprefix("local://"))
        # Others may come as far as the directory, as in /dev/shm and /tmp.
        directory.parent.chmod(0o1777)
        begin = "import os; os.umask(0); channel = SSEChannel('news'); q = channel.listen()"
        with Process(bus.url, begin) as process:
            process("channel.publish('private')")
            assert directory.stat().st_mode & 0o7777 == 0o700
            names = sorted(path.name for path in directory.iterdir())
            for kind in ("events-", "lock", "bell-", "figures"):
                assert any(name.startswith(kind) for name in names), names
            assert as_nobody(ATTACKS, directory, *names) == ""
            assert process("q.get(timeout=10)") == "'private'"
            # The attacks are real ones: where the directory is open to others, they succeed.
            directory.chmod(0o777)
            (bell,) = (path for path in directory.iterdir() if path.name.startswith("bell-"))
            assert "succeeded" in as_nobody(ATTACKS, directory, bell.name)


def test_a_strangers_link_in_the_place_of_the_store_is_refused():
    if os.getuid() != 0:
        missing("root, to become another user")
    place, other = Path("/dev/shm"), 65533
    if not place.is_dir():
        missing("/dev/shm")
    # It leads to a directory of the user's own, which the check of the owner would let pass.
    own, link = Path(tempfile.mkdtemp(dir=place)), place / f"sse_channel-{other}"
    os.chown(own, other, other)
    try:
        as_nobody("import os, sys; os.symlink(*sys.argv[1:])", own, link)
        done = publish_as(other, "local://")
        assert "is a symbolic link" in done.stdout, done.stderr
        assert not list(own.iterdir())
    finally:
        link.unlink(missing_ok=True)
        shutil.rmtree(own)


# --- The password of Redis --------------------------------------------------------------------

EVERYTHING = """
    import io, logging, os, sys
    shown = io.StringIO()
    logging.basicConfig(level=1, stream=shown)
    from django.conf import settings
    settings.configure(
        ALLOWED_HOSTS=["testserver"], DEBUG=True, INSTALLED_APPS=["sse_channel.django"],
        MIDDLEWARE=[], ROOT_URLCONF=__name__, SECRET_KEY="x",
    )
    import django
    django.setup()
    from django.core.management import call_command
    from django.test import RequestFactory, override_settings
    from django.urls import path
    from django.views.debug import ExceptionReporter
    import sse_channel
    from sse_channel import BusError, SSEChannel, config, host_stats, monitor, stats
    from sse_channel.django import metrics
    urlpatterns = [path("", metrics)]

    def report():
        its = ExceptionReporter(RequestFactory().get("/"), *sys.exc_info())
        print(its.get_traceback_text(), its.get_traceback_html(), file=shown)

    # Before the bus is begun, and again after it.
    print(config.options(), stats(), monitor._frame(1.0), file=shown)
    sse_channel.configure(publish_timeout=0.5)
    channel = SSEChannel("news")
    try:
        queue = channel.listen()
        stream = channel.stream()
        channel.publish("x")
        print(queue, stream, next(stream), file=shown)
    except BusError as error:
        print(error, repr(error), file=shown)
        report()
    try:
        sse_channel.configure(bus="memory://")
    except ValueError as error:
        print(error, file=shown)
        report()
    try:
        with override_settings(SSE_CHANNEL={"BUS": config.options().bus + "?prefix=x"}):
            pass
    except ValueError as error:
        print(error, file=shown)
    print(channel, stats(), host_stats(), channel.stats(), monitor._frame(1.0), file=shown)
    print(metrics(RequestFactory().get("/metrics")).content.decode(), file=shown)
    call_command("check", "--deploy", stdout=shown, stderr=shown)
    try:
        call_command("sse_publish", "news", "1", stdout=shown, stderr=shown)
        call_command(
            "sse_tail", "news", "--count", "1", "--since", "1d", stdout=shown, stderr=shown
        )
    except Exception as error:
        print(error, file=shown)
        report()
    text = shown.getvalue()
    assert "redis://127.0.0.1:" in text, text
    assert os.environ["SECRET_WORD"] not in text, text
    print(len(text))
"""


@pytest.mark.parametrize("trouble", ["none", "wrong password", "away"])
def test_the_password_of_redis_is_shown_nowhere(script, tmp_path, trouble):
    server = RedisServer(tmp_path / "redis", config=f"user default on >{SECRET} ~* &* +@all\n")
    password = SECRET + ("x" if trouble == "wrong password" else "")
    if trouble != "away":
        server.config = f"user me on >{SECRET} ~* &* +@all\n"
        server.start()
    try:
        out = script(
            textwrap.dedent(EVERYTHING),
            SSE_CHANNEL_BUS=server.url(user=f"me:{password}@"),
            SECRET_WORD=SECRET,
        )
        assert int(out) > 1000
    finally:
        server.close()


def test_the_options_are_written_without_the_password():
    with config.overridden(bus=f"redis://me:{SECRET}@localhost/0", retry=7):
        shown = repr(config.options())
    assert "bus='redis://***@localhost/0'" in shown
    assert "retry=7" in shown
    assert SECRET not in shown


def test_a_password_in_the_settings_is_a_warning(monkeypatch):
    from sse_channel.django.checks import register
    from test_checks import check

    def set_bus(url: str) -> None:
        # Not override_settings, which begins the bus of this process anew.
        monkeypatch.setattr(settings, "SSE_CHANNEL", {"BUS": url}, raising=False)

    register()
    for url in (f"redis://me:{SECRET}@localhost", f"rediss://:{SECRET}@localhost"):
        set_bus(url)
        warning = check(deploy=True)["W008"]
        assert SECRET not in f"{warning}"
        assert "W008" not in check()
    set_bus("redis://localhost")
    assert "W008" not in check(deploy=True)


# --- Logs, metrics, terminals -----------------------------------------------------------------


def test_no_name_writes_a_line_of_the_log_or_of_the_metrics(until, caplog):
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    from sse_channel.prometheus import Collector

    steers = "\r\x1b[2J\x85\u2028"
    forged = 'x"} 1\nforged{channel="y' + steers
    caplog.set_level(logging.INFO, logger.name)
    request = RequestFactory().get("/", REMOTE_ADDR=f"192.0.2.1\n{steers}forged")
    response = EventStreamResponse(request, forged, user=f"me\n{steers}forged")
    SSEChannel(forged).publish("x")
    response.close()
    until(lambda: any("disconnected" in record.getMessage() for record in caplog.records))
    assert all(record.getMessage().isprintable() for record in caplog.records)
    registry = CollectorRegistry()
    registry.register(Collector())
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert not any("forged" in family.name for family in families)
    channels = {sample.labels.get("channel") for family in families for sample in family.samples}
    assert forged in channels


CONTROLS = [char for char in map(chr, range(256)) if unicodedata.category(char) == "Cc"]
# All that a message can hold: an end of a line is one on the wire.
STEERING = "[2J".join(char for char in (*CONTROLS, "\u2028", "\u2029") if char not in "\r\n")


# The last is JSON but for what must be escaped there.
@pytest.mark.parametrize("message", [STEERING, {STEERING: STEERING}, f'"{STEERING}"'])
def test_a_line_of_json_cannot_steer_a_terminal(channel, message):
    import json

    from sse_channel import commands

    event = channel_event(channel, message)
    line = commands._json_line(event)
    assert line.isprintable()
    assert json.loads(line) == {"id": event.last_event_id, "event": event.type, "data": message}


@pytest.mark.parametrize("message", [STEERING, {STEERING: STEERING}, "two\nlines"])
def test_a_line_of_text_cannot_steer_a_terminal(channel, message):
    from sse_channel import commands

    assert commands._human_line(channel_event(channel, message)).isprintable()


def channel_event(channel, message):
    with channel.stream(heartbeat=None) as stream:
        next(stream)
        channel.publish(message, event="a\x9bname")
        (event,) = EventStreamParser().feed(next(stream))
        return event
