"""The news example under real servers: what 200 open streams get, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from servers import (
    KINDS,
    Event,
    EventStreamParser,
    Server,
    on_demand,
    open_stream,
    open_streams,
    until,
)

STREAMS = 200
ARTICLES = 50
LIBRARY = "/news/events/"
GENERATOR = "/replaced/"  # an app's own, over `listen`
RENDERED = "/news/stream/"  # the library's, rendered once for all
QUERIED = "/queried/"  # the library's, in a view that uses the database, with `initial`

ASGI = [kind for kind in KINDS if kind.startswith("uvicorn")]
EACH_STREAM = [
    *((kind, path) for kind in KINDS for path in (LIBRARY, RENDERED)),
    ("gunicorn-gevent", GENERATOR),
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    def make(kind: str) -> Server:
        # What a server costs that iterates the streams itself.
        return Server(kind, tmp_path_factory.mktemp(kind), offload=False)

    with on_demand(make) as get:
        yield get


@pytest.fixture
def server(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> Iterator[Server]:
    """The server of the kind that is the parameter; it must have nothing to complain about."""
    server = servers(request.param)
    before = len(server.output())
    yield server
    settle(server)
    written = server.output()[before:]
    print(written)
    assert "Traceback" not in written
    assert "Warning" not in written


each_server = pytest.mark.parametrize("server", KINDS, indirect=True)
each_stream = pytest.mark.parametrize(("server", "path"), EACH_STREAM, indirect=["server"])


def articles_in(events: Sequence[Event]) -> list[int]:
    """The ids of the articles in `events`."""
    messages = [event.json() for event in events]
    # Most wrap each article, with statistics beside it.
    return [message.get("article", message)["id"] for message in messages]


def publish_many(server: Server, count: int) -> list[int]:
    return [server.publish(f"Article {n} of {count}")["id"] for n in range(1, count + 1)]


def settle(server: Server) -> None:
    """Wait until nobody listens, after the last client has gone."""

    def nobody_listens() -> bool:
        if not server.is_asgi:
            # Only a write shows that nobody reads: one is answered by a reset, the next one fails.
            server.publish("Is anybody there?")
        return server.clients() == 0

    until(nobody_listens, "clients that have gone are forgotten")


def warm_up(server: Server, path: str) -> None:
    """Have the server make what it makes but once, and no client left."""
    with open_stream(server, path) as stream:
        already = len(stream.events)
        server.publish("Warming up")
        until(lambda: len(stream.events) > already, "an article")
    settle(server)


def steady(read: Callable[[], int]) -> int:
    """What `read` gives when it gives the same ten times in a row."""
    values: list[int] = []

    def is_steady() -> bool:
        values.append(read())
        return values[-10:] == [values[-1]] * 10

    until(is_steady, "a steady number")
    return values[-1]


# The generator asks the database for statistics after each article: 20,000 queries.
@pytest.mark.timeout(400)
@each_stream
def test_200_streams_get_each_article_once_in_one_order(server: Server, path: str) -> None:
    with open_streams(server, path, STREAMS) as streams:
        # One sends published articles only, the others the newest one first.
        already = 0 if path == LIBRARY else 1
        assert {len(stream.events) for stream in streams} <= {0, already}

        with ThreadPoolExecutor(4) as threads:
            headlines = [f"Article {n}" for n in range(ARTICLES)]
            articles = list(threads.map(server.publish, headlines))
        # Comes after all the others, and after anything that should not have come.
        last = server.publish("The last article")

        count = already + ARTICLES + 1
        until(
            lambda: all(len(stream.events) >= count for stream in streams),
            f"{count} events in each stream",
            within=300 if path == GENERATOR else 60,
        )
        assert {len(stream.events) for stream in streams} == {count}
        orders = {tuple(articles_in(stream.events[already:])) for stream in streams}
        assert len(orders) == 1
        (order,) = orders
        assert sorted(order) == sorted([*(article["id"] for article in articles), last["id"]])
        assert order[-1] == last["id"]
        assert not any(stream.is_ended for stream in streams)

        if path != GENERATOR:
            (ids,) = {
                tuple(event.last_event_id for event in stream.events[already:])
                for stream in streams
            }
            assert all(is_before(one, other) for one, other in pairwise(ids))


def is_before(one: str, other: str) -> bool:
    """Whether event id `one` is smaller than `other`; both must be ``ms-n``."""
    (ms, n), (other_ms, other_n) = ([int(part) for part in id_.split("-")] for id_ in (one, other))
    return (ms, n) < (other_ms, other_n)


@each_stream
def test_ordinary_requests_are_answered_beside_200_streams(server: Server, path: str) -> None:
    with open_streams(server, path, STREAMS) as streams:
        page = server.request("GET", "/news/", within=30)
        assert not any(stream.is_ended for stream in streams)
    assert page.status == 200
    assert b"</html>" in page.body


@each_stream
def test_clients_that_leave_are_forgotten_with_their_descriptors(server: Server, path: str) -> None:
    warm_up(server, path)
    # What rendered keeps its connection for a second.
    until(lambda: not server.database_descriptors(), "the database is closed")
    before = steady(server.worker.num_fds)
    with open_streams(server, path, STREAMS):
        assert server.clients() == STREAMS
        assert server.worker.num_fds() >= before + STREAMS
    settle(server)
    until(lambda: server.worker.num_fds() <= before, f"{before} descriptors as before")


@pytest.mark.parametrize(
    ("server", "path"),
    [(kind, path) for kind in KINDS for path in (QUERIED, RENDERED)]
    + [("gunicorn-gevent", GENERATOR)],
    indirect=["server"],
)
def test_waiting_streams_hold_no_database_connection(server: Server, path: str) -> None:
    server.publish("One to begin with")
    with open_streams(server, path, STREAMS) as streams:
        until(lambda: all(len(stream.events) == 1 for stream in streams), "what was asked for")
        until(lambda: not server.database_descriptors(), "the database is closed")
        assert server.clients() == STREAMS
        # The rendered stream, and the generator, ask the database again after each article.
        server.publish("One more")
        until(lambda: all(len(stream.events) == 2 for stream in streams), "one more event")
        until(lambda: not server.database_descriptors(), "the database is closed again")


@pytest.mark.parametrize("path", [LIBRARY, QUERIED])
@pytest.mark.parametrize("server", ["gunicorn-gevent", *ASGI], indirect=True)
def test_waiting_streams_have_no_threads(server: Server, path: str) -> None:
    warm_up(server, path)
    before = server.worker.num_threads()
    with open_streams(server, path, STREAMS):
        assert server.clients() == STREAMS
        until(
            lambda: server.worker.num_threads() <= before + 8,
            f"about {before} threads, not one for each of {STREAMS} streams",
        )


@each_stream
def test_the_head_of_a_stream_keeps_caches_and_compressors_away(server: Server, path: str) -> None:
    with open_stream(server, path, Accept_Encoding="gzip, br") as stream:
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.headers["cache-control"] == "no-cache, no-transform"
        assert stream.headers["x-accel-buffering"] == "no"
        assert "content-length" not in stream.headers
        assert "content-encoding" not in stream.headers


@each_server
def test_a_client_that_comes_back_gets_what_it_missed_and_goes_on(server: Server) -> None:
    with open_stream(server, LIBRARY) as stream:
        server.publish("Seen")
        until(lambda: stream.events, "an event")
        seen = stream.events[0].last_event_id
    missed = publish_many(server, 5)
    with (
        open_stream(server, LIBRARY, Last_Event_ID=seen) as by_header,
        open_stream(server, f"{LIBRARY}?lastEventId={seen}") as by_url,
    ):
        coming = publish_many(server, 2)
        for stream in (by_header, by_url):
            until(lambda stream=stream: len(stream.events) >= 7, "what was missed, and more")
            assert articles_in(stream.events) == missed + coming
            assert {event.type for event in stream.events} == {"message"}


@each_server
def test_a_client_that_left_before_its_first_event_misses_nothing(server: Server) -> None:
    with open_stream(server, LIBRARY) as stream:
        assert stream.events == []
        opened_at = stream.parser.last_event_id
    missed = publish_many(server, 3)
    with open_stream(server, LIBRARY, Last_Event_ID=opened_at) as stream:
        until(lambda: len(stream.events) >= 3, "what was missed")
        assert articles_in(stream.events) == missed


@each_server
@pytest.mark.parametrize("last_event_id", ["rubbish", "1-1", "99999999999999-0"])
def test_a_client_with_an_id_that_is_none_is_told_so_first(
    server: Server, last_event_id: str
) -> None:
    with (
        open_stream(server, LIBRARY, Last_Event_ID=last_event_id) as by_header,
        open_stream(server, f"{LIBRARY}?lastEventId={last_event_id}") as by_url,
    ):
        article = server.publish("From now on")["id"]
        for stream in (by_header, by_url):
            until(
                lambda stream=stream: str(article) in "".join(e.data for e in stream.events[-1:]),
                "the article",
            )
            assert stream.events[0].type == "stream-reset"
            assert {event.type for event in stream.events[1:]} == {"message"}


# --- The parser that the tests above believe ------------------------------------------------

PARSED = {
    "data: one\n\n": [("message", "one", "")],
    "data:one\ndata:  two\n\n": [("message", "one\n two", "")],
    "data\n\n": [("message", "", "")],
    "data\ndata\n\n": [("message", "\n", "")],
    "data: one\r\rdata: two\r\n\r\ndata: three\n\n": [
        ("message", "one", ""),
        ("message", "two", ""),
        ("message", "three", ""),
    ],
    "data: one\r\n\ndata: two\n\n": [("message", "one", ""), ("message", "two", "")],
    "data: one\r\ndata: two\r\n\r\n": [("message", "one\ntwo", "")],
    "event: a\ndata: one\n\ndata: two\n\n": [("a", "one", ""), ("message", "two", "")],
    "event: a\n\ndata: one\n\n": [("message", "one", "")],
    "id: 1\ndata: one\n\ndata: two\n\n": [("message", "one", "1"), ("message", "two", "1")],
    "id: 1\n\ndata: one\n\n": [("message", "one", "1")],
    "id: 1\ndata: one\n\nid\ndata: two\n\n": [("message", "one", "1"), ("message", "two", "")],
    "id: 1\nid: 2\0\ndata: one\n\n": [("message", "one", "1")],
    "\ufeffdata: one\n\n": [("message", "one", "")],
    "\ufeff\ufeffdata: one\n\ndata: \ufeff\n\n": [("message", "\ufeff", "")],
    ": comment\nDATA: one\nother: two\n data: three\n\n": [],
    "data: Gdańsk 🎉\u2028\n\n": [("message", "Gdańsk 🎉\u2028", "")],
    "data: one\n\ndata: unfinished\n": [("message", "one", "")],
    "data: one\n\nid: 2\ndata: unfinished": [("message", "one", "")],
}


@pytest.mark.parametrize("text", PARSED)
def test_the_parser_does_as_the_standard_says_however_the_bytes_are_cut(text: str) -> None:
    whole = text.encode()
    cuts = [[whole[:n], whole[n:]] for n in range(len(whole))]
    cuts.append([bytes([byte]) for byte in whole])
    for chunks in cuts:
        parser = EventStreamParser()
        events = [event for chunk in chunks for event in parser.feed(chunk)]
        assert events == PARSED[text]


def test_the_parser_takes_digits_only_for_a_reconnection_time() -> None:
    parser = EventStreamParser()
    parser.feed(b"retry: 1500\nretry: 2s\nretry: -1\nretry:\nretry: \xd9\xa3\n: hello\n:\n")
    assert parser.retry == 1500
    assert parser.comments == [" hello", ""]


def test_the_parser_sets_the_last_event_id_where_an_event_ends() -> None:
    parser = EventStreamParser()
    parser.feed(b"id: 1\n\nid: 2\n")
    assert parser.last_event_id == "1"
