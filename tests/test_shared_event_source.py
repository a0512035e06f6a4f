"""`SharedEventSource`, the library's script for browsers: one connection for all tabs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from browsers import ARGUMENTS, WITHIN
from parts import chromium
from servers import Relay, Server, open_stream, quiet, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

SCRIPT = "/static/sse_channel/shared-event-source.js"
EVENTS = "/news/events/"
LIVE = "#connection[data-state=live]"
# Milliseconds; the server's own, which it says at the opening of each stream.
RETRY = 300


@pytest.fixture(scope="module")
def running(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("shared")
    with Server("gunicorn-gevent", directory, retry=RETRY) as server:
        yield server


@pytest.fixture
def nobody(running: Server) -> None:
    """The server's clients of other tests have left."""
    until(lambda: running.clients() == 0, "nobody listens")


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    with quiet(running):
        yield running


class Gate(Relay):
    """A proxy that can answer itself, or fall silent."""

    status: int | None = None
    requests = 0
    _silent = False

    def answer(self, status: int | None) -> None:
        """Answer with `status` from now on, None for the server's answers; cut what is open."""

        async def answer() -> None:
            self.status = status
            for writer in list(self._writers):
                writer.transport.abort()

        self._loop.run(answer())

    def fall_silent(self) -> None:
        """Pass on nothing more to who is connected now, who does not learn of it."""

        async def fall_silent() -> None:
            for task in self._pumps:
                task.cancel()

        self._loop.run(fall_silent())

    async def _listen(self) -> None:
        self._pumps: set[asyncio.Task[None]] = set()
        await super()._listen()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.status is None:
            return await super()._relay(reader, writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            head = f"HTTP/1.1 {self.status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            writer.write(head.encode())
            await writer.drain()
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(super()._pump(reader, writer))
        self._pumps.add(task)
        try:
            await task
        except asyncio.CancelledError:
            await asyncio.Event().wait()  # neither passes on nor closes
        finally:
            self._pumps.discard(task)


# Follows `url`, and keeps what is dispatched in `received` and `states`.
FOLLOW = """async ([script, url, options]) => {
    const { SharedEventSource } = await import(script);
    window.received = [];
    window.states = [];
    window.source = new SharedEventSource(url, options);
    for (const type of ["message", "stream-reset", "named"]) {
        source.addEventListener(type, (event) => {
            received.push([event.type, event.data, event.lastEventId]);
        });
    }
    source.onopen = () => states.push("open");
    source.onerror = () => states.push(source.readyState === 2 ? "closed" : "error");
}"""


def blank(context: BrowserContext, origin: str) -> Page:
    page = context.new_page()
    page.goto(f"{origin}/blank/")
    return page


def start(
    context: BrowserContext, origin: str, url: str = EVENTS, before: str = "", **options: object
) -> Page:
    """A page that follows `url`; the script `before` has run in it before."""
    page = blank(context, origin)
    if before:
        page.evaluate(before)
    page.evaluate(FOLLOW, [SCRIPT, url, options])
    return page


def follow(
    context: BrowserContext, origin: str, url: str = EVENTS, before: str = "", **options: object
) -> Page:
    """The same, and it is open."""
    page = start(context, origin, url, before, **options)
    page.wait_for_function("source.readyState === 1")
    return page


def headlines(page: Page, count: int) -> list[str]:
    """The headlines of the messages that the page has, when it has at least `count`."""
    page.wait_for_function("(count) => received.length >= count", arg=count)
    events = page.evaluate("received")
    assert {type_ for type_, _, _ in events} == {"message"}, events
    return [json.loads(data)["headline"] for _, data, _ in events]


def holder(pages: list[Page]) -> Page:
    """The one page that has the connection."""

    def found() -> list[Page]:
        return [page for page in pages if page.evaluate("source.isHolder")]

    until(lambda: len(found()) == 1, "one holder")
    return found()[0]


# --- The parser ---------------------------------------------------------------------------

# Bytes, and what they dispatch: type, data, last event id.
STREAMS: dict[str, tuple[bytes, list[tuple[str, str, str]]]] = {
    "data": (b"data: a\n\n", [("message", "a", "")]),
    "no space": (b"data:a\n\n", [("message", "a", "")]),
    "one space only is taken off": (b"data:  a \n\n", [("message", " a ", "")]),
    "a tab stays": (b"data:\ta\n\n", [("message", "\ta", "")]),
    "lines": (b"data: a\ndata\ndata:b\n\n", [("message", "a\n\nb", "")]),
    "an empty line of data": (b"data\n\n", [("message", "", "")]),
    "two empty lines of data": (b"data\ndata:\n\n", [("message", "\n", "")]),
    "no data, no event": (b"event: a\nid: 1\n\ndata: b\n\n", [("message", "b", "1")]),
    "CR": (b"data: a\rdata: b\r\rdata: c\r\r", [("message", "a\nb", ""), ("message", "c", "")]),
    "CRLF": (b"data: a\r\ndata: b\r\n\r\n", [("message", "a\nb", "")]),
    "line ends mixed": (
        b"data: a\r\n\ndata: b\n\rdata: c\r\r\ndata: d\n\r\n",
        [("message", text, "") for text in "abcd"],
    ),
    "an end in CR": (b"data: a\n\r", [("message", "a", "")]),
    "other line ends are none": (
        "data: a\u2028b\x0bc\x0cd\x85\n\n".encode(),
        [("message", "a\u2028b\x0bc\x0cd\x85", "")],
    ),
    "unfinished": (b"data: a\n\ndata: b\n", [("message", "a", "")]),
    "unfinished line": (b"data: a\n\ndata: b", [("message", "a", "")]),
    "byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [("message", "a", "")]),
    "only one byte order mark": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n",
                                 [("message", "b", "")]),
    "a byte order mark in the text": (b"data: \xef\xbb\xbfa\n\n", [("message", "\ufeffa", "")]),
    "comments": (b":\n: a\n:data: b\ndata: c\n:\n\n:\n\n", [("message", "c", "")]),
    "type": (b"event: a\ndata: 1\n\ndata: 2\n\n", [("a", "1", ""), ("message", "2", "")]),
    "the last type": (b"event: a\nevent: b\ndata: 1\n\n", [("b", "1", "")]),
    "an empty type": (b"event: a\nevent\ndata: 1\n\n", [("message", "1", "")]),
    "ids stay": (
        b"id: 1\ndata: a\n\ndata: b\n\nid\ndata: c\n\n",
        [("message", "a", "1"), ("message", "b", "1"), ("message", "c", "")],
    ),
    "an id with NUL": (b"id: 1\ndata: a\n\nid: 2\0\ndata: b\n\n",
                       [("message", "a", "1"), ("message", "b", "1")]),
    "an unfinished id": (b"id: 1\ndata: a\n\nid: 2\n", [("message", "a", "1")]),
    "NUL in data": (b"data: a\0b\n\n", [("message", "a\0b", "")]),
    "names are exact": (b"Data: a\n data: b\ndata : c\ndata: d\n\n", [("message", "d", "")]),
    "a colon in the value": (b"data: a: b:\n\n", [("message", "a: b:", "")]),
    "UTF-8": ("data: ä€🎉\n\nevent: ö\ndata: x\n\n".encode(),
              [("message", "ä€🎉", ""), ("ö", "x", "")]),
    "no UTF-8": (b"data: \xff\xc3(\xe2\x82\n\n", [("message", "\ufffd\ufffd(\ufffd", "")]),
}  # fmt: skip

# All in one, cut at every place, and byte by byte.
PARSE = """async ([script, streams]) => {
    const { EventStreamParser } = await import(script);
    const parse = (parts) => {
        const parser = new EventStreamParser();
        const events = parts.flatMap((part) => parser.feed(part));
        return JSON.stringify(events.map(({ type, data, id }) => [type, data, id]));
    };
    const differ = [];
    for (const [name, encoded, expected] of streams) {
        const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
        const cuts = [[bytes], [...bytes].map((byte) => Uint8Array.of(byte))];
        for (let at = 0; at <= bytes.length; at++) {
            cuts.push([bytes.subarray(0, at), bytes.subarray(at)]);
        }
        for (const parts of cuts) {
            const events = parse(parts);
            if (events !== JSON.stringify(expected)) {
                differ.push([name, parts.map((part) => part.length), events]);
            }
        }
    }
    return differ;
}"""


def test_bytes_become_events_wherever_they_are_cut(context: BrowserContext, server: Server) -> None:
    page = blank(context, server.url)
    streams = [
        [name, base64.b64encode(text).decode(), events] for name, (text, events) in STREAMS.items()
    ]
    assert page.evaluate(PARSE, [SCRIPT, streams]) == []


def test_the_time_to_come_back_is_digits_only(context: BrowserContext, server: Server) -> None:
    page = blank(context, server.url)
    found = page.evaluate(
        """async (script) => {
            const { EventStreamParser } = await import(script);
            const values = ["250", "0", "", "-1", "1.5", "1e3", "5s", " 7", "\u0663", "007"];
            return values.map((value) => {
                const parser = new EventStreamParser();
                parser.feed(new TextEncoder().encode(`retry: ${value}\\n`));
                return parser.retry;
            });
        }""",
        SCRIPT,
    )
    assert found == [250, 0, None, None, None, None, None, None, None, 7]


# --- One tab ------------------------------------------------------------------------------


def test_it_has_the_interface_of_an_event_source(
    context: BrowserContext, server: Server, errors: list[str]
) -> None:
    page = blank(context, server.url)
    published = server.publish("Before")
    difference = page.evaluate(
        """async ([script, url]) => {
            const { SharedEventSource } = await import(script);
            const look = async (Source) => {
                const source = new Source(url, { withCredentials: true });
                const before = source.readyState;
                const seen = [];
                const listener = { handleEvent: (event) => seen.push(event.type) };
                source.addEventListener("message", listener);
                const message = await new Promise((resolve) => {
                    source.onopen = ({ constructor, target }) => {
                        seen.push(constructor.name, target === source);
                    };
                    source.onmessage = resolve;
                });
                const shown = [
                    Source.CONNECTING, Source.OPEN, Source.CLOSED,
                    source.CONNECTING, source.OPEN, source.CLOSED,
                    source.url, source.withCredentials, before, source.readyState,
                    message.constructor.name, message.type, message.data, message.lastEventId,
                    message.origin, message.target === source, source.onerror, ...seen,
                    source instanceof EventTarget,
                ];
                source.onmessage = 5;
                shown.push(source.onmessage);
                source.close();
                source.close();
                let refused;
                try {
                    new Source("http://[");
                } catch (error) {
                    refused = [error.constructor.name, error.name];
                }
                return JSON.stringify([...shown, source.readyState, refused]);
            };
            return [await look(EventSource), await look(SharedEventSource)];
        }""",
        [SCRIPT, f"{EVENTS}?last_event_id=0-1&q=%20a"],
    )
    assert difference[0] == difference[1]
    assert published["headline"] in difference[0]
    assert errors == []


def test_it_heals_where_a_browser_gives_up(context: BrowserContext, server: Server) -> None:
    # The other stream keeps the worker in the picture, which is not what is tested here.
    with closing(Gate(server)) as gate, open_stream(server, EVENTS):
        pages = [follow(context, gate.url) for _ in range(2)]
        server.publish("Seen")
        for page in pages:
            headlines(page, 1)
        for status in (502, 404):
            gate.answer(status)
            for page in pages:
                page.wait_for_function("(status) => source.status === status", arg=status)
                assert page.evaluate("source.readyState") == 0
        server.publish("Missed")
        gate.answer(None)
        for page in pages:
            assert headlines(page, 2) == ["Seen", "Missed"]
            assert page.evaluate("source.readyState") == 1


@pytest.mark.parametrize("status", [204, 401, 403])
def test_some_answers_are_final_for_all_tabs(
    context: BrowserContext, server: Server, status: int
) -> None:
    with closing(Gate(server)) as gate:
        pages = [follow(context, gate.url) for _ in range(3)]
        gate.answer(status)
        for page in pages:
            page.wait_for_function("source.readyState === 2")
            assert page.evaluate("[source.status, states]") == [status, ["open", "error", "closed"]]
        asked = gate.requests
        assert asked >= 1
        gate.answer(None)
        # Somebody who asks anew is served; those do not ask again.
        later = follow(context, gate.url)
        server.publish("Later")
        headlines(later, 1)
        assert gate.requests == asked
        assert [page.evaluate("received.length") for page in pages] == [0] * 3


def test_a_server_that_is_away_is_not_asked_all_the_time(
    context: BrowserContext, server: Server
) -> None:
    with closing(Gate(server)) as gate:
        page = follow(context, gate.url)
        gate.answer(503)
        times = []
        for count in range(1, 4):
            until(lambda count=count: gate.requests >= count, "the next attempt")
            times.append(time.monotonic())
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        # Doubled each time, from the server's own time on; late is possible, early is not.
        for number, gap in enumerate(gaps):
            assert gap > 0.9 * RETRY / 1000 * 2 ** (number + 1), gaps
        assert page.evaluate("states.filter((state) => state === 'error').length") >= 3


def test_options_that_cannot_be_are_refused(context: BrowserContext, server: Server) -> None:
    page = blank(context, server.url)
    for options in ({"retry": 0}, {"maxRetry": "soon"}, {"heartbeatTimeout": -1}):
        (name,) = options
        with pytest.raises(Exception, match=f"TypeError: {name} must be a number of milliseconds"):
            page.evaluate(FOLLOW, [SCRIPT, EVENTS, options])


def test_a_connection_that_died_silently_is_noticed(
    context: BrowserContext, server: Server
) -> None:
    with closing(Gate(server)) as gate:
        page = follow(context, gate.url, heartbeatTimeout=1000)
        server.publish("Seen")
        headlines(page, 1)
        gate.fall_silent()
        server.publish("Missed")
        assert headlines(page, 2) == ["Seen", "Missed"]


WITHOUT = {
    "locks": "Object.defineProperty(navigator, 'locks', { value: undefined })",
    "channels": "delete window.BroadcastChannel",
    "locks that are allowed": """void (navigator.locks.request = () =>
        Promise.reject(new DOMException("Not here", "SecurityError")))""",
}


@pytest.mark.parametrize("missing", WITHOUT)
def test_tabs_that_cannot_meet_have_a_connection_each(
    context: BrowserContext, server: Server, nobody: None, missing: str
) -> None:
    with closing(Gate(server)) as gate:
        pages = [follow(context, gate.url, before=WITHOUT[missing]) for _ in range(2)]
        assert server.clients() == 2
        with open_stream(server, EVENTS):
            server.publish("Seen")
            for page in pages:
                headlines(page, 1)
            gate.answer(502)
            for page in pages:
                page.wait_for_function("source.status === 502")
            server.publish("Missed")
            gate.answer(None)
            for page in pages:
                assert headlines(page, 2) == ["Seen", "Missed"]


def test_without_streams_in_fetch_it_is_the_browsers_own(
    context: BrowserContext, server: Server
) -> None:
    page = follow(context, server.url, before="delete Response.prototype.body")
    assert page.evaluate("source instanceof EventSource")
    server.publish("Seen")
    assert headlines(page, 1) == ["Seen"]


# --- Many tabs ----------------------------------------------------------------------------


@contextlib.contextmanager
def publishing(server: Server) -> Iterator[list[str]]:
    """Publish all the time; gives the headlines published so far."""
    published: list[str] = []
    is_over = threading.Event()

    def publish() -> None:
        while not is_over.wait(0.01):
            headline = f"Article {len(published)}"
            server.publish(headline)
            published.append(headline)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield published
    finally:
        is_over.set()
        thread.join()


def renderer(page: Page) -> psutil.Process:
    """The process of a page: the one that works when the page does, three times in a row."""

    def used() -> dict[psutil.Process, float]:
        times = {}
        for child in psutil.Process().children(recursive=True):
            # It may end meanwhile, and be a zombie for a moment.
            with contextlib.suppress(psutil.Error):
                if "--type=renderer" in child.cmdline():
                    times[child] = child.cpu_times().user
        return times

    def busiest() -> psutil.Process | None:
        before = used()
        page.evaluate("for (const end = Date.now() + 250; Date.now() < end; );")
        after = used()
        spent = {process: after[process] - before.get(process, 0) for process in after}
        first, *rest = sorted(spent, key=lambda process: -spent[process])
        # On a machine in a hurry others may have worked, too.
        is_clear = spent[first] > 0 and all(spent[other] < spent[first] / 2 for other in rest)
        return first if is_clear else None

    def found() -> psutil.Process | None:
        one, *more = (busiest() for _ in range(3))
        return one if all(other == one for other in more) else None

    return until(found, "one process works")


def close(page: Page, _: psutil.Process) -> None:
    page.close()


def close_source(page: Page, _: psutil.Process) -> None:
    page.evaluate("source.close()")


def leave(page: Page, _: psutil.Process) -> None:
    page.goto("about:blank")


def crash(page: Page, process: psutil.Process) -> None:
    with page.expect_event("crash"):
        process.kill()


@pytest.mark.parametrize("end", [close, close_source, leave, crash])
def test_the_connection_moves_and_nothing_is_lost_or_doubled(
    context: BrowserContext, server: Server, nobody: None, end: Any
) -> None:
    pages = [follow(context, server.url) for _ in range(5)]
    processes = {page: renderer(page) for page in pages} if end is crash else {}
    assert len(set(processes.values())) == len(processes), "a process for each page"
    with publishing(server) as published:
        for _ in range(3):
            count = len(published)
            until(lambda count=count: len(published) >= count + 10, "ten more")
            first = holder(pages)
            pages.remove(first)
            end(first, processes.get(first))
            holder(pages)
            for page in pages:
                headlines(page, len(published))
        # One that joins in the middle of it has all from then on.
        late = follow(context, server.url, replay=False)
        count = len(published)
        until(lambda: len(published) >= count + 10, "ten more")
    for page in pages:
        assert headlines(page, len(published)) == published
    late.wait_for_function("(last) => received.at(-1)?.[1].includes(last)", arg=published[-1])
    joined = headlines(late, 10)
    assert joined == published[-len(joined) :]
    assert server.clients() == 1


def test_a_holder_that_is_put_to_sleep_is_relieved_and_misses_nothing(
    context: BrowserContext, server: Server, nobody: None
) -> None:
    pages = [follow(context, server.url, takeoverTimeout=900) for _ in range(3)]
    asleep = holder(pages)
    others = [page for page in pages if page is not asleep]
    process = renderer(asleep)
    process.suspend()
    try:
        # It may have got this one, without telling anybody.
        server.publish("One")
        for page in others:
            assert headlines(page, 1) == ["One"]
        second = holder(others)
        others.remove(second)
        second.close()
        server.publish("Two")
        assert headlines(others[0], 2) == ["One", "Two"]
        holder(others)
    finally:
        process.resume()
    server.publish("Three")
    for page in (asleep, *others):
        assert headlines(page, 3) == ["One", "Two", "Three"]
    assert not asleep.evaluate("source.isHolder")
    until(lambda: server.clients() == 1, "one stream")


def test_a_tab_that_was_let_in_by_nobody_goes_on_where_the_others_are(
    context: BrowserContext, server: Server, nobody: None
) -> None:
    asleep = follow(context, server.url)
    other = follow(context, server.url)
    server.publish("Before")
    headlines(other, 1)
    process = renderer(asleep)
    process.suspend()
    try:
        server.publish("Meanwhile")
        # It takes over long before the other tab would, and nobody has told it anything.
        new = follow(context, server.url, takeoverTimeout=900)
        assert holder([new, other]) is new
        for page in (new, other):
            assert headlines(page, 2) == ["Before", "Meanwhile"]
    finally:
        process.resume()
    server.publish("After")
    for page in (asleep, other, new):
        assert headlines(page, 3) == ["Before", "Meanwhile", "After"]


# While `deaf`, what other tabs pass on does not arrive.
DEAFEN = """() => {
    const { set } = Object.getOwnPropertyDescriptor(BroadcastChannel.prototype, "onmessage");
    Object.defineProperty(BroadcastChannel.prototype, "onmessage", {
        set(listener) {
            set.call(this, (event) => {
                if (!(window.deaf && event.data.kind === "events")) listener(event);
            });
        },
    });
}"""


def test_the_connection_goes_on_for_the_tab_that_is_furthest_behind(
    context: BrowserContext, server: Server, nobody: None
) -> None:
    first, second = (follow(context, server.url) for _ in range(2))
    behind = follow(context, server.url, before=DEAFEN)
    pages = [first, second, behind]
    server.publish("One")
    for page in pages:
        headlines(page, 1)
    behind.evaluate("window.deaf = true")
    for headline in ("Two", "Three"):
        server.publish(headline)
    for page in (first, second):
        headlines(page, 3)
    assert headlines(behind, 1) == ["One"]
    behind.evaluate("window.deaf = false")
    first.close()
    server.publish("Four")
    for page in (second, behind):
        assert headlines(page, 4) == ["One", "Two", "Three", "Four"]
    second.wait_for_function("source.isHolder && source.readyState === 1")
    server.publish("Five")
    for page in (second, behind):
        assert headlines(page, 5) == ["One", "Two", "Three", "Four", "Five"]


@pytest.fixture
def restoring(browser: Browser) -> Iterator[BrowserContext]:
    """A context of a browser that keeps pages that were left, to take them back."""
    restoring = browser.browser_type.launch(
        executable_path=chromium(),
        args=ARGUMENTS,
        ignore_default_args=["--disable-back-forward-cache"],
    )
    context = restoring.new_context()
    context.set_default_timeout(WITHIN)
    yield context
    restoring.close()


@pytest.mark.parametrize("others", [0, 1])
def test_a_page_taken_back_from_the_history_has_what_it_missed(
    restoring: BrowserContext, server: Server, nobody: None, others: int
) -> None:
    left = follow(restoring, server.url)
    pages = [left] + [follow(restoring, server.url) for _ in range(others)]
    server.publish("Before")
    for page in pages:
        headlines(page, 1)
    left.goto(f"{server.url}/blank/?elsewhere")
    until(lambda: server.clients() == others, "it has let go of the connection")
    server.publish("Meanwhile")
    for page in pages[1:]:
        assert headlines(page, 2) == ["Before", "Meanwhile"]
    # Such a page has no `load`.
    left.go_back(wait_until="commit")
    left.wait_for_function("window.source?.readyState === 1")
    server.publish("After")
    for page in pages:
        assert headlines(page, 3) == ["Before", "Meanwhile", "After"]
    assert left.evaluate("states") == ["open", "error", "open"]
    assert server.clients() == 1


def test_a_tab_that_was_away_for_too_long_is_told_so(
    context: BrowserContext, server: Server
) -> None:
    holding = follow(context, server.url)
    away = follow(context, server.url)
    server.publish("Before")
    headlines(away, 1)
    # What is no more in the memory of the tabs: a new holder has only what came since.
    away.evaluate("document.dispatchEvent(new Event('freeze'))")
    server.publish("Meanwhile")
    headlines(holding, 2)
    joined = follow(context, server.url)
    holding.close()
    joined.wait_for_function("source.isHolder && source.readyState === 1")
    away.evaluate("document.dispatchEvent(new Event('resume'))")
    away.wait_for_function("received.length >= 3")
    server.publish("After")
    away.wait_for_function("received.length >= 4")
    _, reset, state, after = away.evaluate("received")
    assert reset[:2] == ["stream-reset", '{"reason":"too-old"}']
    assert json.loads(state[1])["headline"] == "Meanwhile"
    assert json.loads(after[1])["headline"] == "After"


def test_a_killed_worker_is_survived_by_all_tabs(context: BrowserContext, server: Server) -> None:
    pages = [follow(context, server.url) for _ in range(3)]
    server.publish("Before")
    for page in pages:
        headlines(page, 1)
    killed = server.worker
    killed.kill()
    until(lambda: [each for each in server.workers if each != killed], "another worker")
    server.publish("After")
    for page in pages:
        assert headlines(page, 2) == ["Before", "After"]
        page.wait_for_function("source.readyState === 1")


def test_a_joining_tab_is_told_the_newest_event_of_each_name_unless_it_wants_none(
    context: BrowserContext, server: Server, nobody: None
) -> None:
    first = follow(context, server.url, "/queried/")
    server.publish("Old")
    server.publish("New")
    first.wait_for_function("received.length === 3")
    told = first.evaluate("received")
    assert "total" in json.loads(told[0][1])

    joined = follow(context, server.url, "/queried/")
    joined.wait_for_function("received.length === 2")
    assert joined.evaluate("received") == [told[0], told[2]]
    silent = follow(context, server.url, "/queried/", replay=False)
    server.publish("Last")
    assert headlines(silent, 1) == ["Last"]
    joined.wait_for_function("received.length === 3")
    assert server.clients() == 1


def test_other_addresses_and_keys_are_other_connections(
    context: BrowserContext, server: Server, nobody: None
) -> None:
    pages = [
        follow(context, server.url),
        follow(context, server.url, key="somebody else"),
        follow(context, server.url, f"{EVENTS}?other"),
        follow(context, server.url, withCredentials=True),
    ]
    assert server.clients() == 4
    assert all(page.evaluate("source.isHolder") for page in pages)


# --- The news page -------------------------------------------------------------------------


def test_twelve_tabs_of_one_host_show_an_article_over_one_stream(
    context: BrowserContext, server: Server, nobody: None, errors: list[str]
) -> None:
    from playwright.sync_api import expect

    pages = []
    for _ in range(12):
        page = context.new_page()
        page.goto(f"{server.url}/news/")
        pages.append(page)
    for page in pages:
        page.wait_for_selector(LIVE)
        # The first payload, which the server sent once.
        expect(page.locator("#events")).to_have_text("1")
    article = server.publish("To all of them")
    for page in pages:
        shown = page.locator(f"article[data-id='{article['id']}'] .headline")
        expect(shown).to_have_text("To all of them")
        expect(page.locator("#events")).to_have_text("2")
        expect(page.locator("#total")).to_have_text(str(article["id"]))
        expect(page.locator("#worker")).to_have_text(str(server.worker.pid))
    assert server.clients() == 1

    # One that comes late is told the first payload and the newest event.
    late = context.new_page()
    late.goto(f"{server.url}/news/")
    expect(late.locator("#events")).to_have_text("2")
    expect(late.locator("#worker")).to_have_text(str(server.worker.pid))
    assert server.clients() == 1
    assert errors == []


def test_a_proxy_without_its_server_for_seconds_is_survived_by_the_page(
    context: BrowserContext, server: Server
) -> None:
    from playwright.sync_api import expect

    with closing(Gate(server)) as gate:
        pages = [context.new_page() for _ in range(2)]
        for page in pages:
            page.goto(f"{gate.url}/news/")
            page.wait_for_selector(LIVE)
        gate.answer(502)
        for page in pages:
            page.wait_for_selector("#connection[data-state=reconnecting]")
        article = server.publish("While the server was away")
        time.sleep(5)
        assert gate.requests >= 1
        gate.answer(None)
        for page in pages:
            shown = page.locator(f"article[data-id='{article['id']}'] .headline")
            expect(shown).to_have_text("While the server was away")
            page.wait_for_selector(LIVE)
