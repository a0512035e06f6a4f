"""Anything at all from Python's side: it is refused in words, or does what it should.

`FUZZ_EXAMPLES` says how many inputs each test tries; `make fuzz` tries many more than `make test`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import math
import os
import queue
import re
import urllib.parse
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
from django.conf import settings as django_settings
from django.core.serializers.json import DjangoJSONEncoder
from django.test import AsyncRequestFactory, RequestFactory
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sse_channel import ChannelClosed, Event, SSEChannel, config, configure
from sse_channel.commands import main
from sse_channel.django import EventStreamResponse
from sse_channel.parser import EventStreamParser
from sse_channel.prepared import PreparedMessage
from sse_channel.testing import capture, parse

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))

#: In `make test` the inputs are the same each time, and few.
few = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

_names = itertools.count()


def fresh(prefix: str = "properties") -> str:
    """The name of a channel that nothing was published to yet."""
    return f"{prefix}-{os.getpid()}-{next(_names)}"


# --- Anything ---------------------------------------------------------------------------------


class Hostile:
    """Raises whatever it is asked."""

    def _refuse(self, *_: object) -> Any:
        raise RuntimeError("hostile")

    __eq__ = __str__ = __bool__ = __len__ = __iter__ = __float__ = __index__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _refuse
    __hash__ = object.__hash__


class Text(str):
    """Is text, and says that it is not."""

    def __str__(self) -> str:
        return "other"

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("hostile")

    __hash__ = str.__hash__


class Number(int):
    def __repr__(self) -> str:
        return "other"


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def circular() -> list[Any]:
    value: list[Any] = []
    value.append({"it": value})
    return value


#: Lone surrogates, NUL, a BOM and what ends a line somewhere are likelier than by chance.
texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.text(st.sampled_from("\ud800\udfff\0\ufeff\r\n\u2028\x85 :-.0a9"), max_size=8),
)
integers = st.one_of(
    st.integers(),
    st.integers(-2, 3),
    st.builds(lambda power, more: (1 << power) + more, st.integers(0, 70), st.integers(-1, 1)),
    # More digits than Python writes, and than a float has.
    st.sampled_from([400, 5000]).map(lambda digits: 10**digits),
    st.just(5000).map(lambda digits: -(10**digits)),
)
exact = st.one_of(st.decimals(allow_nan=False), st.fractions())
numbers = st.one_of(integers, st.floats(), st.booleans(), exact)
scalars = st.one_of(st.none(), numbers, texts)
strange = st.one_of(
    st.binary(max_size=8),
    st.builds(bytearray, st.binary(max_size=8)),
    st.builds(memoryview, st.binary(max_size=8)),
    st.builds(object),
    st.builds(Hostile),
    st.builds(Text, texts),
    st.builds(Number, integers),
    st.datetimes(),
    st.timedeltas(),
    st.uuids(),
    st.complex_numbers(),
    st.builds(lambda: (each for each in [1, 2])),
    st.builds(circular),
    st.builds(nested, st.sampled_from([10, 500, 900, 10_000, 200_000])),
    st.sampled_from([..., NotImplemented, int, math.inf, len, lambda: None]),
)
keys = st.one_of(scalars, st.binary(max_size=4), st.tuples(scalars), st.dates())
anything = st.recursive(
    st.one_of(scalars, strange),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.sets(keys, max_size=3),
    ),
    max_leaves=8,
)
messages = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)


class Refusal:
    """Why a call was refused."""

    def __init__(self, error: Exception) -> None:
        self.text = str(error)
        #: An object of the test raised it, which the caller is to see.
        self.is_hostile = isinstance(error, RuntimeError)

    def names(self, *names: str) -> bool:
        """Whether it says what it is about, by one of those."""
        return self.is_hostile or any(name in self.text for name in names)


def attempt(call: Callable[[], Any]) -> tuple[Any, Refusal | None]:
    """What a call gives, or why it is refused; any other error is a mistake."""
    try:
        return call(), None
    except (TypeError, ValueError) as error:
        refusal = Refusal(error)
    except RuntimeError as error:
        if str(error) != "hostile":
            raise
        refusal = Refusal(error)
    assert refusal.text, "a refusal says something"
    return None, refusal


# --- The wire ---------------------------------------------------------------------------------


class Dispatched(NamedTuple):
    type: str
    data: str
    last_event_id: str


class Standard:
    """A whole stream as section 9.2.6 of the HTML standard reads it, step by step."""

    def __init__(self, stream: bytes) -> None:
        self.events: list[Dispatched] = []
        self.last_event_id = ""
        self.retry: int | None = None
        self._data = self._type = self._id = ""
        text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
        line = ""
        at = 0
        while at < len(text):
            if text[at] in "\r\n":
                self._take(line)
                line = ""
                at += 2 if text.startswith("\r\n", at) else 1
            else:
                line += text[at]
                at += 1

    def _take(self, line: str) -> None:
        if not line:
            self.last_event_id = self._id
            if self._data:
                data = self._data[:-1] if self._data[-1] == "\n" else self._data
                self.events.append(Dispatched(self._type or "message", data, self._id))
            self._data = self._type = ""
            return
        if line[0] == ":":
            return
        field, value = line, ""
        if ":" in line:
            at = line.index(":")
            field, value = line[:at], line[at + 1 :]
            if value[:1] == " ":
                value = value[1:]
        if field == "event":
            self._type = value
        elif field == "data":
            self._data += value + "\n"
        elif field == "id":
            if "\0" not in value:
                self._id = value
        elif field == "retry" and value and all(digit in "0123456789" for digit in value):
            # As many digits as there may be; this parser stops at the largest time.
            self.retry = min(int(Decimal(value)), (1 << 63) - 1)


WORDS = [b"data", b"event", b"id", b"retry", b"x", b"12", b"9" * 5000]
MARKS = [b":", b": ", b" ", b"\n", b"\r", b"\r\n", b"\n\n", b"\0"]
#: A BOM, and what is no UTF-8, or only its beginning.
ENCODED = [b"\xef\xbb\xbf", b"\xef\xbb", b"\xff", b"\xe2\x82"]

pieces_of_a_stream = st.lists(
    st.one_of(st.sampled_from([*WORDS, *MARKS, *ENCODED]), st.binary(max_size=6)), max_size=40
).map(b"".join)


@few
@example(stream=b"retry: " + b"9" * 5000 + b"\n\ndata: x\n\n", cuts=[])
@given(stream=pieces_of_a_stream, cuts=st.lists(st.integers(0, 200), max_size=6))
def test_a_stream_is_read_as_the_standard_says_wherever_it_is_cut(stream, cuts):
    expected = Standard(stream)
    parser = EventStreamParser()
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    events = [
        event
        for begin, end in itertools.pairwise(bounds)
        for event in parser.feed(stream[begin:end])
    ]
    assert [tuple(event) for event in events] == [tuple(event) for event in expected.events]
    assert parser.last_event_id == expected.last_event_id
    assert [tuple(event) for event in parse(stream)] == [tuple(each) for each in expected.events]
    assert parser.retry == expected.retry


# --- Publishing -------------------------------------------------------------------------------


def as_json(message: Any) -> Any:
    """What a queue gets of a message, by the encoder that is documented."""
    if isinstance(message, str):
        return str.__str__(message)
    return json.loads(json.dumps(message, cls=DjangoJSONEncoder, allow_nan=False))


def same(one: Any, other: Any) -> bool:
    # By text: 1, 1.0 and True are not the same message.
    return json.dumps(one) == json.dumps(other)


class Listening:
    """A channel with a queue and a stream."""

    def __init__(self, name: str | None) -> None:
        self.channel = SSEChannel(name)
        self.queue = self.channel.listen()
        self.stream = self.channel.stream(heartbeat=0.001)
        self.opening = next(self.stream)

    def close(self) -> None:
        self.queue.close()
        self.stream.close()

    def received(self) -> bytes:
        """The stream's next frames; a heartbeat if there are none."""
        return next(self.stream)


@few
@given(
    message=st.one_of(messages, anything),
    event=st.one_of(st.none(), texts, anything),
    is_named=st.booleans(),
    is_prepared=st.booleans(),
)
def test_what_is_published_is_refused_or_read_as_it_was_meant(
    message, event, is_named, is_prepared
):
    with contextlib.closing(Listening(fresh() if is_named else None)) as its:
        if is_prepared:
            event_id, refusal = attempt(
                lambda: PreparedMessage(its.channel, message, event).publish()
            )
        else:
            event_id, refusal = attempt(lambda: its.channel.publish(message, event=event))
        if refusal:
            with pytest.raises(queue.Empty):
                its.queue.get_nowait()
            assert its.received() == b": heartbeat\n\n"
            return
        expected = as_json(message)
        got = its.queue.get_nowait()
        assert got is message or same(got, expected)
        frame = its.received()
        (seen,) = Standard(its.opening + frame).events
        assert seen.type == (str.__str__(event) if event else "message")
        assert seen.last_event_id == event_id
        if isinstance(message, str):
            assert seen.data == re.sub("\r\n|\r", "\n", str.__str__(message))
        else:
            assert same(json.loads(seen.data), expected)
        assert [tuple(each) for each in parse(its.opening + frame)] == [tuple(seen)]


@few
@example(data="x", event=None, retry=10**5000, comment=None)
@example(data="x", event=Text("x"), retry=None, comment=None)
@given(
    data=st.one_of(st.just(Event.NO_DATA), messages),
    event=st.one_of(st.none(), texts, strange),
    retry=st.one_of(st.none(), numbers, strange),
    comment=st.one_of(st.none(), texts, strange),
)
def test_an_event_is_refused_or_its_fields_are_on_the_wire(data, event, retry, comment):
    with contextlib.closing(Listening(fresh())) as its:
        event_id, refusal = attempt(
            lambda: its.channel.publish(Event(data, event=event, retry=retry, comment=comment))
        )
        if refusal:
            assert its.queue.empty()
            assert its.received() == b": heartbeat\n\n"
            return
        frame = its.received()
        seen = Standard(frame)
        assert seen.last_event_id == event_id
        assert seen.retry == (retry if retry is None else min(retry, (1 << 63) - 1))
        assert len(seen.events) == (data is not Event.NO_DATA)
        assert all(
            each.type == (str.__str__(event) if event else "message") for each in seen.events
        )
        if comment is not None:
            parser = EventStreamParser()
            parser.feed(frame)
            assert "\n".join(parser.comments) == "\n".join(
                f" {line}" for line in re.split("\r\n|\r|\n", comment)
            )


# --- Names and places -------------------------------------------------------------------------


@few
@given(name=st.one_of(texts, anything), other=texts)
def test_a_name_is_refused_or_names_one_channel(name, other):
    channel, refusal = attempt(lambda: SSEChannel(name))
    if refusal or name is None:
        return
    assert channel.name == str.__str__(name)
    q = channel.listen()
    with contextlib.suppress(TypeError, ValueError):
        if str.__str__(name) != other:
            SSEChannel(other).publish("not for it")
    channel.publish("for it")
    assert q.get(timeout=30) == "for it"
    assert q.empty()
    q.close()


@few
@example(capacity=10**5000, history=0, overflow="drop_oldest")
@given(
    capacity=st.one_of(numbers, strange),
    history=st.one_of(numbers, strange),
    overflow=st.one_of(st.sampled_from(["drop_oldest", "drop_newest", "disconnect"]), anything),
)
def test_a_channel_is_refused_or_works_with_its_bounds(capacity, history, overflow):
    channel, refusal = attempt(
        lambda: SSEChannel(capacity=capacity, history=history, overflow=overflow)
    )
    if refusal:
        assert refusal.names("capacity", "history", "overflow")
        return
    q = channel.listen()
    channel.publish(1)
    assert q.maxsize == capacity
    assert q.get_nowait() == 1
    # It is remembered, if anything is.
    missed = channel.listen(last_event_id="0-0")
    assert missed.qsize() == min(history, 1)


@few
@example(timeout=10**400)
@example(timeout=-(10**5000))
@given(timeout=st.one_of(numbers, strange, texts))
def test_a_timeout_is_refused_or_keeps_a_message_that_is_there(timeout):
    channel = SSEChannel()
    q = channel.listen()
    for get in (q.get, lambda timeout: asyncio.run(q.aget(timeout))):
        channel.publish("x")
        got, refusal = attempt(functools.partial(get, timeout=timeout))
        if refusal:
            assert refusal.names("'timeout'")
            got = q.get_nowait()
        assert got == "x"


@few
@example(text="9-0")
@example(text=Text("x"))
@given(text=st.one_of(texts, anything))
def test_a_last_event_id_is_refused_or_answered(text):
    channel = SSEChannel(fresh())
    event_id = channel.publish("x")
    q, refusal = attempt(lambda: channel.listen(last_event_id=text))
    if refusal:
        assert refusal.names("last_event_id")
        return
    gets = meaning("" if text is None else str.__str__(text), [event_id])
    assert q.reset == (gets if isinstance(gets, str) else None)
    q.close()


def meaning(text: str, ids: list[str]) -> str | list[str]:
    """Which of the events `ids` a client is to get that goes on after `text`, or why none."""

    def position(text: str) -> tuple[int, int] | None:
        found = re.fullmatch("(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})", text)
        place = (int(found[1]), int(found[2])) if found else None
        return place if place and max(place) < 1 << 64 else None

    if not text:
        return []
    last = position(text)
    if last is None:
        return "unknown"
    places = [position(each) for each in ids]
    if last > places[-1]:
        return "future"
    if last < places[0]:
        return "too-old"
    return [each for each, place in zip(ids, places, strict=True) if place > last]


_factory, _async_factory = RequestFactory(), AsyncRequestFactory()
KNOWN = st.integers(0, 4)


@few
@given(
    header=st.one_of(st.none(), KNOWN, texts, st.from_regex("[0-9]{1,21}-[0-9]{1,21}")),
    query=st.lists(
        st.tuples(
            st.sampled_from(["last_event_id", "lastEventId", "other"]),
            st.one_of(KNOWN, st.binary(max_size=10), texts),
        ),
        max_size=4,
    ),
    is_asgi=st.booleans(),
)
def test_a_request_that_says_where_it_goes_on_gets_what_it_missed_or_is_told_why(
    header, query, is_asgi
):
    channel = SSEChannel(fresh())
    ids = [channel.publish(number) for number in range(5)]
    header = ids[header] if isinstance(header, int) else header
    pairs = [(name, ids[value] if isinstance(value, int) else value) for name, value in query]
    text = urllib.parse.urlencode(pairs, errors="surrogatepass")
    path = f"/stream/?{text}"
    if is_asgi:
        # A header is bytes there, which Django takes for Latin-1.
        header = header and header.encode("latin-1", "replace").decode("latin-1")
        given = {} if header is None else {"Last-Event-ID": header}
        request = _async_factory.get(path, headers=given)
    else:
        given = {} if header is None else {"HTTP_LAST_EVENT_ID": header}
        request = _factory.get(path, **given)
    response = EventStreamResponse(request, channel)
    assert response.status_code == 200
    queries = urllib.parse.parse_qs(text, keep_blank_values=True, errors="replace")
    last = {name: values[-1] for name, values in queries.items()}
    said = header or last.get("last_event_id") or last.get("lastEventId") or ""
    expected = meaning(said, ids)
    with contextlib.closing(response._stream) as stream:
        opening = next(stream)
        channel.publish("live")
        seen = Standard(opening)
        while not seen.events or seen.events[-1].data != '"live"'.strip('"'):
            opening += next(stream)
            seen = Standard(opening)
    kinds = [event for event in seen.events if event.type == "stream-reset"]
    got = [event.last_event_id for event in seen.events if event.type == "message"][:-1]
    if isinstance(expected, str):
        assert [json.loads(event.data)["reason"] for event in kinds] == [expected]
        # History goes as far as it goes.
        assert got == (ids if expected == "too-old" else [])
    else:
        assert not kinds
        assert got == expected


@few
@example(options={"status": []}, is_asgi=False)
@example(options={"overflow": NotImplemented}, is_asgi=False)
@given(
    options=st.dictionaries(
        st.sampled_from(
            [
                *("last_event_id", "heartbeat", "initial", "render", "key", "overflow"),
                *("compress", "user", "status"),
            ]
        ),
        anything,
        max_size=3,
    ),
    is_asgi=st.booleans(),
)
def test_the_arguments_of_a_response_are_refused_or_give_a_stream(options, is_asgi):
    factory = _async_factory if is_asgi else _factory
    channel = SSEChannel(fresh())
    response, refusal = attempt(lambda: EventStreamResponse(factory.get("/"), channel, **options))
    if refusal:
        assert len(channel.listeners) == 0, "nobody is left behind who listens"
        return
    with contextlib.closing(response._stream) as stream:
        assert next(stream).startswith(b"retry: ")
    assert len(channel.listeners) == 0


@pytest.mark.parametrize("method", ["get", "head"])
@pytest.mark.parametrize("overflow", ["", "drop", 0, False, [], NotImplemented])
def test_an_overflow_that_is_no_policy_is_refused_by_its_name(method, overflow):
    request = getattr(_factory, method)("/")
    channel = SSEChannel(fresh())
    with pytest.raises((TypeError, ValueError), match="overflow must be"):
        EventStreamResponse(request, channel, overflow=overflow)
    assert len(channel.listeners) == 0


def test_a_user_that_is_nested_too_deep_is_refused():
    class Deep:
        def __str__(self) -> str:
            # How deep a list of lists may be depends on where it is asked for.
            raise RecursionError

    channel = SSEChannel(fresh())
    with pytest.raises(TypeError, match=r"user must be .* not a Deep nested so deep"):
        EventStreamResponse(_factory.get("/"), channel, user=Deep())
    assert len(channel.listeners) == 0


# --- Options ----------------------------------------------------------------------------------


@contextlib.contextmanager
def options_as_they_were() -> Iterator[None]:
    before = dict(config._configured)
    try:
        yield
    finally:
        config._configured.clear()
        config._configured.update(before)
        config._in_force = None


def is_in_force(name: str, value: Any) -> bool:
    found = getattr(config.options(), name)
    if name == "cors_origins":
        return found == tuple(value)
    return found == value and type(found) in (type(value), float, Number, int)


def has_effect(name: str) -> None:
    """Whatever the options are, streams open and events are sent or refused."""
    channel = SSEChannel()
    with channel.stream() as stream:
        assert next(stream).startswith(b"retry: %d\n" % config.options().retry)
        _, refusal = attempt(lambda: channel.publish("x"))
        assert refusal is None or (name == "max_event_bytes" and refusal.names("limit"))


@few
@example(name="retry", value=10**5000)
@example(name="bus", value="local:///\ud800")
@example(name="bus", value="local:///\0")
@example(name="cors_origins", value=["https://*.example"])
@given(name=st.sampled_from(config.Options._fields), value=anything)
def test_an_option_is_refused_by_its_name_or_in_force(name, value):
    if value is None:
        return
    with options_as_they_were():
        before = config.options()
        _, refusal = attempt(lambda: configure(**{name: value}))
        if refusal:
            assert refusal.names(f"configure({name}=...)")
            assert config.options() == before
        else:
            assert is_in_force(name, value)
            has_effect(name)


@few
@example(setting={10**5000: None})
@given(
    setting=st.one_of(
        st.dictionaries(
            st.one_of(st.sampled_from([name.upper() for name in config.Options._fields]), keys),
            anything,
            max_size=2,
        ),
        anything,
    )
)
def test_a_setting_is_refused_by_its_name_or_in_force(setting):
    with options_as_they_were(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(django_settings, "SSE_CHANNEL", setting, raising=False)
        for name in config.Options._fields:
            patch.delenv(f"SSE_CHANNEL_{name.upper()}", raising=False)
        config._in_force = None
        wrong, refusal = attempt(config.mistakes)
        if refusal:
            assert refusal.is_hostile
            return
        if wrong:
            assert all("SSE_CHANNEL" in mistake for mistake in wrong)
            with pytest.raises((TypeError, ValueError), match="SSE_CHANNEL"):
                config.options()
            return
        for option, value in setting.items():
            assert is_in_force(option.lower(), value)


@few
@given(name=st.sampled_from(config.Options._fields), text=texts)
def test_a_variable_is_refused_by_its_name_or_in_force(name, text):
    variable = f"SSE_CHANNEL_{name.upper()}"
    with options_as_they_were(), pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv(variable, text)
        except (ValueError, UnicodeEncodeError):
            return  # The system has no such variable.
        config._in_force = None
        found, refusal = attempt(config.options)
        if refusal:
            assert refusal.names(variable)
        else:
            assert getattr(found, name) is not None


# --- Commands and what tests use --------------------------------------------------------------


def status_of(*arguments: str) -> object:
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


@few
@example(arguments=["", "--", "--"])
@given(
    arguments=st.lists(
        st.one_of(
            texts,
            st.sampled_from(["publish", "--text", "--event", "--", "[1]", "{}", "NaN", "1" * 5000]),
            st.sampled_from(["[" * 100_000, '"\\ud800"', "news", "--help"]),
        ),
        max_size=6,
    )
)
def test_arguments_of_a_command_are_refused_or_done(arguments):
    if "-" in arguments:
        return  # It would read the test's own input.
    assert status_of("publish", *arguments) in (0, 2)


@few
@given(
    arguments=st.lists(
        st.one_of(
            texts,
            st.sampled_from(["--json", "--last-event-id", "1-0", "--since", "5m", "9" * 9 + "d"]),
            st.sampled_from(["--count", "0", "-1", "1" * 5000, "x", "--help"]),
        ),
        max_size=4,
    )
)
def test_a_tail_ends_after_so_many_events_or_says_why_not(arguments):
    name = fresh()
    SSEChannel(name).publish("x")
    # One that begins with the first event ends with it.
    last = ["--last-event-id", "1-0", "--count", "1", "--", name]
    assert status_of("tail", *arguments, *last) in (0, 2)


@few
@example(source="\ud800")
@given(source=anything)
def test_what_tests_use_takes_or_refuses_anything(source):
    for use in (parse, lambda source: capture(source).close()):
        attempt(functools.partial(use, source))


# --- Channels and queues beside a model -------------------------------------------------------


class Reader:
    """A queue, and what it should hold: messages, and whether each is one that it missed."""

    def __init__(self, its_queue: Any, at: int, capacity: int, overflow: str) -> None:
        self.queue = its_queue
        self.at = at
        self.capacity = capacity
        self.overflow = overflow
        self.holds: list[tuple[Any, bool]] = []
        self.dropped = 0
        self.is_closed = False

    @property
    def room(self) -> int:
        missed = sum(is_missed for _, is_missed in self.holds)
        return self.capacity + missed

    def put(self, message: Any) -> None:
        if self.is_closed:
            return
        if len(self.holds) >= self.room:
            self.dropped += 1
            if self.overflow == "drop_newest":
                return
            if self.overflow == "disconnect":
                self.is_closed = True
                return
            self.holds.pop(0)
        self.holds.append((message, False))


class Channels(RuleBasedStateMachine):
    """Everything that a caller does with channels and queues, in any order."""

    HISTORY = 5

    def __init__(self) -> None:
        super().__init__()
        names = [fresh(), fresh(), None]
        self.channels = [SSEChannel(name, history=self.HISTORY) for name in names]
        self.names = names
        self.sent: list[list[tuple[str, Any]]] = [[], [], []]
        self.readers: list[Reader] = []

    def teardown(self) -> None:
        for reader in self.readers:
            reader.queue.close()

    def reader(self, pick: int) -> Reader:
        return self.readers[pick % len(self.readers)]

    @rule(at=st.integers(0, 2), message=st.one_of(st.integers(), st.text(max_size=3)))
    def publish(self, at: int, message: Any) -> None:
        event_id = self.channels[at].publish(message)
        if self.sent[at]:
            assert place_of(self.sent[at][-1][0]) < place_of(event_id)
        self.sent[at].append((event_id, message))
        for reader in self.readers:
            if reader.at == at:
                reader.put(message)

    @rule(at=st.integers(0, 2))
    def publish_what_queues_do_not_get(self, at: int) -> None:
        event_id = self.channels[at].publish(Event(retry=1))
        self.sent[at].append((event_id, Event.NO_DATA))

    @precondition(lambda self: len(self.readers) < 8)
    @rule(
        at=st.integers(0, 2),
        capacity=st.integers(1, 4),
        overflow=st.sampled_from(["drop_oldest", "drop_newest", "disconnect"]),
        back=st.one_of(st.none(), st.integers(0, 8)),
    )
    def listen(self, at: int, capacity: int, overflow: Any, back: int | None) -> None:
        sent = self.sent[at]
        last = None if back is None or back >= len(sent) else sent[len(sent) - 1 - back][0]
        channel = self.channels[at]
        if channel.name is not None:
            channel = SSEChannel(
                channel.name, capacity=capacity, overflow=overflow, history=self.HISTORY
            )
            bounds = (capacity, overflow)
        else:
            bounds = (1000, "drop_oldest")
        reader = Reader(channel.listen(last_event_id=last), at, *bounds)
        if last is not None and back is not None:
            missed = sent[len(sent) - back :]
            kept = missed[-self.HISTORY :]
            assert reader.queue.reset == ("too-old" if len(kept) < len(missed) else None)
            reader.holds = [(message, True) for _, message in kept if message is not Event.NO_DATA]
        self.readers.append(reader)

    @precondition(lambda self: self.readers)
    @rule(pick=st.integers(0, 99), how=st.integers(0, 3))
    def take(self, pick: int, how: int) -> None:
        reader = self.reader(pick)
        gets: list[Callable[[], Any]] = [
            reader.queue.get_nowait,
            lambda: reader.queue.get(False),
            lambda: reader.queue.get(timeout=0),
            lambda: reader.queue.get(True, Fraction(1, 10**6)),
        ]
        try:
            message = gets[how]()
        except ChannelClosed:
            assert reader.is_closed
            assert not reader.holds
        except queue.Empty:
            assert not reader.is_closed
            assert not reader.holds
        else:
            expected, _ = reader.holds.pop(0)
            assert message == expected

    @precondition(lambda self: self.readers)
    @rule(pick=st.integers(0, 99), how=st.booleans())
    def leave(self, pick: int, how: bool) -> None:
        reader = self.reader(pick)
        if how:
            reader.queue.close()
        else:
            self.channels[reader.at].unlisten(reader.queue)
        reader.is_closed = True

    @precondition(lambda self: self.readers)
    @rule(pick=st.integers(0, 99))
    def unlisten_elsewhere(self, pick: int) -> None:
        reader = self.reader(pick)
        self.channels[(reader.at + 1) % 3].unlisten(reader.queue)

    @precondition(lambda self: self.readers)
    @rule(pick=st.integers(0, 99))
    def put(self, pick: int) -> None:
        reader = self.reader(pick)
        try:
            reader.queue.put_nowait("own")
        except ChannelClosed:
            assert reader.is_closed
        except queue.Full:
            assert len(reader.holds) >= reader.room
        else:
            assert len(reader.holds) < reader.room
            reader.holds.append(("own", False))

    @invariant()
    def each_queue_is_as_its_model(self) -> None:
        for reader in self.readers:
            assert reader.queue.qsize() == len(reader.holds)
            assert reader.queue.empty() == (not reader.holds)
            assert reader.queue.closed == reader.is_closed
            assert reader.queue.dropped == reader.dropped
        for at, channel in enumerate(self.channels):
            its = [each for each in self.readers if each.at == at and not each.is_closed]
            assert len(channel.listeners) == len(its)
            assert all(reader.queue in channel.listeners for reader in its)


def place_of(event_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in event_id.split("-"))


TestChannels = Channels.TestCase
TestChannels.settings = settings(few, max_examples=(EXAMPLES or 40), stateful_step_count=40)
