"""Publishing, listening, and what both refuse."""

from __future__ import annotations

import asyncio
import copy
import datetime
import decimal
import gc
import pickle
import queue
import re
import threading
import time
import uuid
import weakref

import pytest
from django.utils.functional import SimpleLazyObject
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy, override

import sse_channel as package
from sse_channel import ChannelClosed, Event, SSEChannel, configure, sse_channel


def test_every_listener_gets_every_message_in_order(channel):
    queues = [channel.listen() for _ in range(3)]
    for number in range(5):
        channel.publish(number)
    assert [[q.get_nowait() for _ in range(5)] for q in queues] == [[0, 1, 2, 3, 4]] * 3
    assert all(q.empty() for q in queues)


def test_channels_of_one_name_are_one_channel_and_others_are_not(name):
    q = SSEChannel(name).listen()
    SSEChannel(name + "x").publish("elsewhere")
    SSEChannel().publish("private")
    SSEChannel(name).publish("here")
    assert q.get_nowait() == "here"
    assert q.empty()
    assert sse_channel.name == "default"
    assert SSEChannel("default").listeners is not sse_channel.listeners
    first = sse_channel.listen()
    assert first in SSEChannel("default").listeners
    sse_channel.unlisten(first)


@pytest.mark.parametrize(
    "message",
    [
        {"headline": "Ünïcode 🎉", "nested": [1, 2.5, None, True, {"a": []}]},
        [],
        {},
        None,
        False,
        0,
        "",
        "text that stays text: {}",
        "lines\r\nof\rall\nkinds\n\n",
        "\0 \u2028 \x85 \ufeff",
        10**30,
    ],
)
def test_messages_arrive_as_equal_values(name, message):
    for channel in (SSEChannel(name), SSEChannel()):
        q = channel.listen()
        channel.publish(message)
        got = q.get_nowait()
        assert got == message
        assert type(got) is type(message)


def test_a_private_channel_gives_the_very_object():
    channel = SSEChannel()
    q, other = channel.listen(), channel.listen()
    for message in (object(), {"a": (1, 2)}, float("nan"), {1: {2}}, "x" * 3):
        channel.publish(message)
        assert q.get_nowait() is message
        assert other.get_nowait() is message


def test_a_named_channel_decodes_once_for_all_its_queues(channel):
    queues = [channel.listen() for _ in range(3)]
    message = {"a": (1, 2)}
    channel.publish(message)
    got = [q.get_nowait() for q in queues]
    assert got[0] == {"a": [1, 2]}
    assert got[0] is got[1] is got[2]
    assert got[0] is not message


def test_djangos_encoder_serves_when_django_is_configured(channel):
    q = channel.listen()
    key = uuid.uuid4()
    channel.publish(
        {
            "at": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
            "price": decimal.Decimal("1.50"),
            "key": key,
        }
    )
    assert q.get_nowait() == {"at": "2026-01-02T03:04:05Z", "price": "1.50", "key": str(key)}


def test_a_lazy_text_of_django_is_text(channel):
    def data_of(message, **options):
        with channel.stream(**options) as stream:
            next(stream)
            if message is not None:
                channel.publish(message)
            return next(stream).decode().partition("data: ")[2].strip()

    yes = gettext_lazy("Yes")
    with override("de"):
        for message in (yes, Event(yes), SimpleLazyObject(lambda: "Ja"), mark_safe("Ja")):
            assert data_of(message) == "Ja"
        assert data_of({"answer": yes}) == '{"answer":"Ja"}'
        assert data_of(None, initial=yes) == "Ja"
        asyncio.run(channel.apublish(yes))
    q = channel.listen(last_event_id="0-0")
    assert [q.get_nowait() for _ in range(6)] == ["Ja"] * 4 + [{"answer": "Ja"}, "Ja"]
    private = SSEChannel()
    with private.stream() as stream:
        next(stream)
        private.publish(yes)
        assert next(stream).endswith(b"data: Yes\n\n")


def test_an_event_carries_its_data_to_queues_and_a_comment_reaches_none(channel):
    q = channel.listen()
    channel.publish(Event({"a": 1}, event="article", retry=5, comment="c"))
    channel.publish(Event(comment="only"))
    channel.publish(Event(retry=100))
    channel.publish(Event(None))
    assert [q.get_nowait() for _ in range(2)] == [{"a": 1}, None]
    assert q.empty()


def copies_of(thing):
    yield copy.copy(thing)
    yield copy.deepcopy(thing)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(thing, protocol))


def test_a_copied_or_pickled_event_is_the_same(channel):
    for again in copies_of(Event.NO_DATA):
        assert again is Event.NO_DATA
    q = channel.listen()
    for again in copies_of(Event(comment="c", retry=5)):
        assert again.data is Event.NO_DATA
        assert repr(again) == "Event(retry=5, comment='c')"
        channel.publish(again)
        assert q.empty()
    for again in copies_of(Event({"n": [1]}, event="e")):
        channel.publish(again)
        assert q.get_nowait() == {"n": [1]}


class Named(SSEChannel):
    def __init__(self, number, suffix):
        super().__init__(f"{suffix}-{number}", capacity=3, overflow="disconnect", history=5)
        self.number = number


def test_a_copied_or_pickled_channel_is_that_channel(name):
    for channel in (SSEChannel(name, capacity=3, overflow="disconnect", history=5), Named(7, name)):
        for again in copies_of({"channel": channel}):
            other = again["channel"]
            q = channel.listen()
            assert type(other) is type(channel)
            assert other.name == channel.name
            assert getattr(other, "number", 7) == 7
            assert list(other.listeners) == [q]
            channel.unlisten(q)
            full = other.listen()
            assert full.maxsize == 3
            for number in range(4):
                other.publish(number)
            assert full.closed, "the policy is the same"
        assert other.stats()["history"]["events"] == 5


def test_a_copied_private_channel_is_itself_and_none_can_be_pickled():
    private = SSEChannel()
    assert copy.copy(private) is private
    assert copy.deepcopy([private])[0] is private
    with pytest.raises(TypeError, match=r"private channel .* cannot be pickled; give it a name"):
        pickle.dumps(private)


def test_ids_rise_and_look_as_documented(channel):
    ids = [channel.publish(number) for number in range(1000)]
    assert all(re.fullmatch(r"[0-9]+-[0-9]+", each) for each in ids)
    keys = [tuple(map(int, each.split("-"))) for each in ids]
    assert keys == sorted(set(keys))


def test_apublish_is_publish(channel):
    q = channel.listen()
    event_id = asyncio.run(channel.apublish({"a": 1}, event="article"))
    assert re.fullmatch(r"[0-9]+-[0-9]+", event_id)
    assert q.get_nowait() == {"a": 1}


circular: list[object] = []
circular.append(circular)


@pytest.mark.parametrize(
    ("message", "options", "error", "says"),
    [
        (object(), {}, TypeError, "JSON"),
        (b"bytes", {}, TypeError, "JSON"),
        ({"a": {1, 2}}, {}, TypeError, "JSON"),
        ({(1, 2): 3}, {}, TypeError, "JSON"),
        (circular, {}, ValueError, "[Cc]ircular"),
        (float("nan"), {}, ValueError, "JSON"),
        ({"a": float("inf")}, {}, ValueError, "JSON"),
        ("\ud800", {}, ValueError, "surrogate"),
        ({"a": "\udfff"}, {}, ValueError, "surrogate"),
        ({"\ud800": 1}, {}, ValueError, "surrogate"),
        ("x", {"event": "a\nb"}, ValueError, "CR, LF or NUL"),
        ("x", {"event": "a\rb"}, ValueError, "CR, LF or NUL"),
        ("x", {"event": "a\0b"}, ValueError, "CR, LF or NUL"),
        ("x", {"event": ""}, ValueError, "empty"),
        ("x", {"event": "error"}, ValueError, "browser"),
        ("x", {"event": "open"}, ValueError, "browser"),
        ("x", {"event": "\ud800"}, ValueError, "surrogate"),
        ("x", {"event": 7}, TypeError, "event must be a str"),
        (Event("x", event="a"), {"event": "b"}, TypeError, "twice"),
        (Event(comment="\ud800"), {}, ValueError, "surrogate"),
        ("x" * (1 << 20), {}, ValueError, "MAX_EVENT_BYTES"),
        ({"a": "é" * (1 << 19)}, {}, ValueError, "MAX_EVENT_BYTES"),
    ],
)
def test_bad_input_raises_at_the_call_and_sends_nothing(channel, message, options, error, says):
    q, stream = channel.listen(), channel.stream()
    next(stream)
    with pytest.raises(error, match=says):
        channel.publish(message, **options)
    assert q.empty()
    assert channel.stats()["published"] == 0
    channel.publish("works on")
    assert q.get_nowait() == "works on"
    assert next(stream).endswith(b"\ndata: works on\n\n")


@pytest.mark.parametrize("retry", [-1, 1.5, 2.0, "100", True, 1 << 64, float("nan")])
def test_a_retry_that_is_no_whole_number_of_milliseconds_is_refused(retry):
    with pytest.raises(ValueError, match="whole number of milliseconds"):
        Event("x", retry=retry)


def test_an_event_without_anything_is_refused():
    with pytest.raises(TypeError, match="needs data"):
        Event()
    with pytest.raises(TypeError, match="comment must be a str"):
        Event("x", comment=b"c")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"capacity": 0}, ValueError),
        ({"capacity": -1}, ValueError),
        ({"capacity": 1 << 70}, ValueError),
        ({"capacity": 1.5}, TypeError),
        ({"capacity": True}, TypeError),
        ({"history": -1}, ValueError),
        ({"history": None}, TypeError),
        ({"overflow": "drop"}, ValueError),
        ({"overflow": None}, TypeError),
        ({"name": ""}, ValueError),
        ({"name": "x" * 256}, ValueError),
        ({"name": "\ud800"}, ValueError),
        ({"name": b"bytes"}, TypeError),
    ],
)
def test_a_channel_refuses_arguments_that_cannot_be(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        SSEChannel(**arguments)


def test_a_private_channel_refuses_an_object_that_an_open_stream_could_not_have():
    channel = SSEChannel()
    q = channel.listen()
    with channel.stream(), pytest.raises(TypeError, match="JSON"):
        channel.publish(object())
    assert q.empty()
    channel.publish(object())
    assert q.qsize() == 1
    with pytest.raises(ValueError, match="browser"):
        channel.publish(object(), event="error")
    assert q.qsize() == 1


def test_the_size_limit_is_configurable_and_counts_bytes_of_the_wire(channel):
    exact = "data: \n\n"
    configure(max_event_bytes=100)
    try:
        channel.publish("x" * (100 - len(exact)))
        with pytest.raises(ValueError, match="101 bytes, over the limit of 100"):
            channel.publish("x" * (101 - len(exact)))
    finally:
        configure(max_event_bytes=1 << 20)


def test_unlisten_twice_or_of_a_stranger_is_no_error(channel):
    other = SSEChannel()
    q, stranger = channel.listen(), other.listen()
    channel.unlisten(stranger)
    channel.unlisten(q)
    channel.unlisten(q)
    channel.unlisten(None)
    channel.unlisten(queue.Queue())
    assert not stranger.closed
    assert channel.stats()["disconnected"]["closed"] == 1


def test_after_unlisten_what_is_left_is_delivered_and_then_the_end(channel):
    q = channel.listen()
    channel.publish(1)
    channel.publish(2)
    channel.unlisten(q)
    channel.publish(3)
    assert [q.get_nowait(), q.get(timeout=1)] == [1, 2]
    with pytest.raises(ChannelClosed):
        q.get(timeout=1)
    with pytest.raises(queue.Empty):
        q.get_nowait()


def test_listeners_is_a_read_only_view(channel):
    listeners = channel.listeners
    assert len(listeners) == 0
    assert not listeners
    queues = [channel.listen() for _ in range(3)]
    stream = channel.stream()
    assert len(listeners) == 4
    assert list(listeners) == [*queues, stream]
    assert listeners[0] is queues[0]
    assert listeners[-1] is stream
    assert listeners[1:3] == queues[1:]
    assert queues[2] in listeners
    assert stream in listeners
    assert SSEChannel().listen() not in listeners
    assert queue.Queue() not in listeners
    with pytest.raises(AttributeError):
        listeners.append(1)
    with pytest.raises(AttributeError):
        channel.listeners = []
    channel.unlisten(queues[1])
    stream.close()
    assert list(listeners) == [queues[0], queues[2]]


def test_a_queue_listens_until_told_otherwise_even_if_nobody_holds_it(channel):
    channel.listen()
    gc.collect()
    assert len(channel.listeners) == 1
    channel.publish("kept")
    q = channel.listeners[0]
    assert q.get_nowait() == "kept"


def test_nothing_is_left_of_a_private_channel_and_its_clients():
    class Message:
        pass

    channel = SSEChannel()
    message = Message()
    channel.publish(message)
    q, stream = channel.listen(), channel.stream()
    channel.publish("x")
    gone = [weakref.ref(each) for each in (channel, message, q)]
    del channel, message, q
    gc.collect()
    assert [each() for each in gone] == [None, None, None]
    stream.close()


def test_the_clients_of_a_dropped_private_channel_end_after_what_is_left():
    channel = SSEChannel()
    q, stream, ends = channel.listen(), channel.stream(heartbeat=None), []
    next(stream)
    channel.publish("left")

    def read():
        try:
            while True:
                ends.append(q.get())
        except ChannelClosed:
            ends.append("closed")

    reader = threading.Thread(target=read)
    reader.start()
    del channel
    reader.join(30)
    assert ends == ["left", "closed"]
    assert [chunk.split(b"\n")[1] for chunk in stream] == [b"data: left"]


def test_a_message_is_let_go_of_when_it_was_read_and_history_forgot_it():
    class Message:
        pass

    channel = SSEChannel(history=0)
    q = channel.listen()
    message = Message()
    channel.publish(message)
    gone = weakref.ref(message)
    del message
    q.get_nowait()
    gc.collect()
    assert gone() is None


def test_an_objects_end_may_publish_to_the_channel_that_drops_it():
    """The object dies while its event falls out of history and of a full queue."""
    channel = SSEChannel(capacity=1, history=1)
    q = channel.listen()
    ends = []

    class Message:
        def __del__(self):
            ends.append(channel.publish("last words"))

    channel.publish(Message())
    channel.publish("x")
    assert len(ends) == 1
    assert q.get_nowait() == "last words"


def test_publishing_while_clients_come_and_go(name, until):
    """Each client gets an unbroken run of what was published while it listened."""
    channel = SSEChannel(name, capacity=1_000_000)
    stop = threading.Event()
    problems: list[object] = []

    def come_and_go():
        while not stop.is_set():
            q = channel.listen()
            got = [q.get(timeout=30) for _ in range(20)]
            channel.unlisten(q)
            if got != list(range(got[0], got[0] + 20)):
                problems.append(got)
            rounds.append(1)

    rounds: list[int] = []
    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    number = 0

    def publish():
        nonlocal number
        for _ in range(50):
            channel.publish(number)
            number += 1
        return len(rounds) > 100

    until(publish)
    stop.set()
    while any(thread.is_alive() for thread in threads):
        publish()
    assert not problems
    assert len(channel.listeners) == 0


@pytest.mark.parametrize("kind", ["queue", "stream"])
def test_resuming_gives_exactly_what_was_missed(channel, kind):
    ids = [channel.publish(number) for number in range(5)]

    def missed(last_event_id):
        if kind == "queue":
            q = channel.listen(last_event_id=last_event_id)
            channel.publish("live")
            return q.reset, [q.get_nowait() for _ in range(q.qsize())]
        with channel.stream(last_event_id=last_event_id) as stream:
            channel.publish("live")
            head, rest = next(stream), next(stream)
        reset = re.search(rb'event: stream-reset\ndata: {"reason":"([a-z-]+)"}\n\n', head)
        data = re.findall(rb"^data: (.*)$", rest, re.MULTILINE)
        return reset and reset[1].decode(), [
            int(each) if each.isdigit() else each.decode() for each in data
        ]

    assert missed(ids[2]) == (None, [3, 4, "live"])
    assert missed(None) == (None, ["live"])
    assert missed("") == (None, ["live"])
    for rubbish in ("x", "1", "-", "\ud800", "9" * 10_000, ids[2] + " "):
        assert missed(rubbish) == ("unknown", ["live"])
    assert missed("99999999999999-0") == ("future", ["live"])
    reason, got = missed("1-0")
    assert reason == "too-old"
    assert got[:5] == [0, 1, 2, 3, 4]


def test_history_is_bounded_and_the_gap_is_told(name):
    channel = SSEChannel(name, history=2)
    ids = [channel.publish(number) for number in range(4)]
    q = channel.listen(last_event_id=ids[1])
    assert (q.reset, [q.get_nowait(), q.get_nowait()]) == (None, [2, 3])
    q = channel.listen(last_event_id=ids[0])
    assert (q.reset, [q.get_nowait(), q.get_nowait()]) == ("too-old", [2, 3])
    assert channel.stats()["history"]["events"] == 2


def test_a_replay_longer_than_the_capacity_is_no_overflow(name):
    channel = SSEChannel(name, capacity=2, overflow="disconnect")
    first = channel.publish(0)
    for number in range(1, 10):
        channel.publish(number)
    q = channel.listen(last_event_id=first)
    channel.publish(10)
    assert not q.closed
    assert [q.get_nowait() for _ in range(10)] == list(range(1, 11))
    assert q.maxsize == 2


def test_last_event_id_must_be_text(channel):
    for call in (channel.listen, channel.stream):
        with pytest.raises(TypeError, match="last_event_id must be a str, not int"):
            call(last_event_id=7)
    assert len(channel.listeners) == 0


def test_stats_count_what_happened(name):
    channel = SSEChannel(name, capacity=1)
    q, stream = channel.listen(), channel.stream()
    next(stream)
    channel.publish("a")
    chunk = next(stream)
    channel.publish("b")
    q.get_nowait()
    del stream
    channel.unlisten(q)
    figures = channel.stats()
    assert figures == {
        "clients": {"queue": 0, "stream": 0, "socket": 0},
        "published": 2,
        "received": 2,
        "delivered": 2,
        "dropped": 1,
        "bytes": len(chunk),
        "disconnected": {
            **dict.fromkeys(("overflow", "exit", "left", "timeout", "flood", "revoked"), 0),
            **{"closed": 1, "abandoned": 1},
        },
        "delay": figures["delay"],
        "history": {"events": 2, "bytes": figures["history"]["bytes"]},
    }
    assert sum(figures["delay"]["counts"]) == 2
    everything = package.stats()
    assert everything["channels"][name] == figures
    bus = everything["bus"]
    assert (bus["url"], bus["waiting"]) == (package.config.options().bus, 0)
    # What another test's process published may have been the newest that came.
    assert bus["lag"] >= 0
    for key in ("published", "received", "delivered", "dropped", "bytes"):
        assert everything[key] == sum(each[key] for each in everything["channels"].values())


def test_the_delay_of_what_is_live_is_counted_and_that_of_what_was_missed_is_not(channel):
    start = channel.publish("before")
    channel.publish("missed")
    q, stream = channel.listen(last_event_id=start), channel.stream(last_event_id=start)
    next(stream)
    time.sleep(0.03)
    assert q.get_nowait() == "missed"
    assert b"missed" in next(stream)
    delay = channel.stats()["delay"]
    assert len(delay["counts"]) == len(delay["le"]) + 1
    assert sum(delay["counts"]) == delay["sum"] == 0
    channel.publish("live")
    time.sleep(0.03)
    assert q.get_nowait() == "live"
    assert b"live" in next(stream)
    delay = channel.stats()["delay"]
    slow = [
        count for le, count in zip([*delay["le"], 1e9], delay["counts"], strict=True) if le > 0.02
    ]
    assert sum(slow) == sum(delay["counts"]) == 2
    assert delay["sum"] >= 0.058
