"""The news example and its streams in Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from servers import Relay, Server, quiet, run_python

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

LIVE = "#connection[data-state=live]"


@pytest.fixture(scope="module")
def running(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("gunicorn-gevent", tmp_path_factory.mktemp("browser")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    with quiet(running):
        yield running


def open_live(context: BrowserContext, server: Server) -> Page:
    page = context.new_page()
    page.goto(f"{server.url}/news/")
    page.wait_for_selector(LIVE)
    return page


def test_an_article_reaches_five_tabs_at_once(
    context: BrowserContext, server: Server, errors: list[str]
) -> None:
    from playwright.sync_api import expect

    # Chromium gives a host six connections, so the sixth is for what the pages submit.
    pages = [open_live(context, server) for _ in range(5)]
    for page in pages:
        expect(page.locator("#events")).to_have_text("1")

    pages[2].fill("#headline", "Written in a tab")
    pages[2].click("#submit-form button")
    for page in pages:
        shown = page.locator("article[data-id] .headline")
        expect(shown.first).to_have_text("Written in a tab")
        # One event for the article, and one shown, after the one that the stream began with.
        expect(page.locator("#events")).to_have_text("2")

    hostile = "<b>Bold</b> <img src=x onerror=alert(1)> & &amp;"
    article = server.publish(hostile)
    for page in pages:
        shown = page.locator(f"article[data-id='{article['id']}'] .headline")
        expect(shown).to_have_count(1)
        assert shown.text_content() == hostile
        assert shown.locator("*").count() == 0
        headlines = page.locator("article[data-id] .headline").all_text_contents()
        assert headlines.count("Written in a tab") == 1
        assert headlines.count(hostile) == 1
        expect(page.locator("#events")).to_have_text("3")
    assert errors == []


def test_a_page_finds_its_server_again(context: BrowserContext, server: Server) -> None:
    from playwright.sync_api import expect

    page = open_live(context, server)
    server.kill()
    page.wait_for_selector("#connection[data-state=reconnecting]")
    server.start()
    away = server.publish("While the page was away")
    page.wait_for_selector(LIVE)
    back = server.publish("Since the page is back")
    for article in (away, back):
        shown = page.locator(f"article[data-id='{article['id']}'] .headline")
        expect(shown).to_have_text(article["headline"])


# Opens an EventSource, keeps what it dispatches in `received`, and waits until it is open.
FOLLOW = """(url) => new Promise((resolve, reject) => {
    window.received = [];
    window.source = new EventSource(url);
    for (const type of ["message", "stream-reset"]) {
        source.addEventListener(type, (event) => {
            received.push([event.type, event.data, event.lastEventId]);
        });
    }
    source.onopen = resolve;
    source.onerror = reject;
})"""


def follow(context: BrowserContext, origin: str, query: str = "") -> Page:
    """A page of `origin` whose EventSource follows the library's stream."""
    page = context.new_page()
    page.goto(f"{origin}/blank/")
    page.evaluate(FOLLOW, f"/news/events/{query}")
    return page


def received(page: Page, count: int) -> list[list[str]]:
    """The type, data and id of each event that the page has, when it has at least `count`."""
    page.wait_for_function("(count) => received.length >= count", arg=count)
    return page.evaluate("received")


def test_an_event_source_gets_events_with_ids_in_the_order_of_publishing(
    context: BrowserContext, server: Server, errors: list[str]
) -> None:
    page = follow(context, server.url)
    articles = [server.publish(f"Line\n{n}") for n in range(20)]
    events = received(page, 20)
    assert [type_ for type_, _, _ in events] == ["message"] * 20
    assert [json.loads(data) for _, data, _ in events] == articles
    ids = [id_ for _, _, id_ in events]
    assert all(ids)
    assert len(set(ids)) == 20

    # A new one cannot send the header: it goes on by the URL.
    later = follow(context, server.url, f"?lastEventId={ids[14]}")
    assert received(later, 5) == events[15:]
    assert errors == []


def test_an_event_source_gets_compressed_events_one_by_one(
    context: BrowserContext, tmp_path: Path, errors: list[str]
) -> None:
    with Server("gunicorn-sync", tmp_path, compress=True, retry=100) as server:
        page = context.new_page()
        page.goto(f"{server.url}/blank/")
        with page.expect_response("**/news/events/") as response:
            page.evaluate(FOLLOW, "/news/events/")
        assert response.value.all_headers()["content-encoding"] == "gzip"
        articles = []
        for number in range(5):
            # The next is not published before the page has this one.
            articles.append(server.publish("Short" if number % 2 else "Long and longer " * 10))
            assert json.loads(received(page, number + 1)[-1][1]) == articles[-1]
        assert errors == []

        page.evaluate("source.onerror = null")
        (worker,) = server.workers
        worker.terminate()
        worker.wait(30)
        missed = server.publish("Missed")
        page.wait_for_function("source.readyState === EventSource.OPEN")
        then = server.publish("Then")
        events = received(page, 7)
        assert [type_ for type_, _, _ in events] == ["message"] * 7
        assert [json.loads(data) for _, data, _ in events] == [*articles, missed, then]


def test_an_event_source_that_was_cut_off_goes_on_where_it_was(
    context: BrowserContext, server: Server
) -> None:
    with closing(Relay(server)) as relay:
        page = follow(context, relay.url)
        seen = server.publish("Seen")
        received(page, 1)

        # Errors from now on are expected: the browser says them, then it reconnects by itself.
        page.evaluate("source.onerror = null")
        relay.cut()
        page.wait_for_function("source.readyState === EventSource.CONNECTING")
        missed = [server.publish(f"Missed {n}") for n in range(3)]
        relay.mend()
        page.wait_for_function("source.readyState === EventSource.OPEN")
        then = server.publish("Then")

        events = received(page, 5)
        assert [type_ for type_, _, _ in events] == ["message"] * 5
        assert [json.loads(data) for _, data, _ in events] == [seen, *missed, then]


def test_an_event_source_is_told_that_the_server_has_forgotten(
    context: BrowserContext, tmp_path: Path
) -> None:
    # What a process remembers on its own ends with it.
    with Server("gunicorn-gevent", tmp_path, bus="memory://") as server:
        page = follow(context, server.url)
        server.publish("Before")
        received(page, 1)
        page.evaluate("source.onerror = null")
        server.kill()
        page.wait_for_function("source.readyState === EventSource.CONNECTING")
        server.start()
        page.wait_for_function("source.readyState === EventSource.OPEN")
        after = server.publish("After")
        _, reset, message = received(page, 3)
        assert reset[0] == "stream-reset"
        assert message[0] == "message"
        assert json.loads(message[1]) == after


def test_an_event_source_goes_on_after_the_server_was_killed(
    context: BrowserContext, server: Server
) -> None:
    page = follow(context, server.url)
    before = server.publish("Before")
    received(page, 1)
    page.evaluate("source.onerror = null")
    server.kill()
    page.wait_for_function("source.readyState === EventSource.CONNECTING")
    server.start()
    missed = server.publish("Missed")
    page.wait_for_function("source.readyState === EventSource.OPEN")
    after = server.publish("After")
    events = received(page, 3)
    assert [type_ for type_, _, _ in events] == ["message"] * 3
    assert [json.loads(data) for _, data, _ in events] == [before, missed, after]


def test_a_page_shows_its_worker_and_goes_on_with_another_one(
    context: BrowserContext, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    with Server("gunicorn-gevent-3", tmp_path) as server:
        page = open_live(context, server)
        shown = page.locator("#worker")
        expect(shown).to_have_text(re.compile("^[0-9]+$"))
        first = int(shown.text_content())
        (worker,) = [process for process in server.workers if process.pid == first]
        worker.kill()
        # In between the page has none. It comes back to where it was: the next article tells.
        expect(shown).not_to_have_text(str(first))
        page.wait_for_selector(LIVE)
        server.publish("By another worker")
        expect(shown).to_have_text(re.compile(f"^(?!{first}$)[0-9]+$"))
        assert int(shown.text_content()) in [process.pid for process in server.workers]
        page.wait_for_selector(LIVE)

        # Each of several, so that not all of them come by the page's own worker.
        for n in range(6):
            article = server.publish(f"Article {n}")
            place = page.locator(f"article[data-id='{article['id']}'] .headline")
            expect(place).to_have_text(article["headline"])


def test_a_page_announces_what_is_no_article(
    context: BrowserContext, server: Server, errors: list[str]
) -> None:
    from playwright.sync_api import expect

    page = open_live(context, server)
    shown = page.locator("#announcement")
    expect(shown).to_be_hidden()
    hostile = "<b>Bold</b> & more"
    for message, text in [
        ({"headline": hostile}, hostile),
        (hostile, hostile),
        ([1, {"a": None}], '[1,{"a":null}]'),
        (None, "null"),
    ]:
        arguments = ("manage.py", "sse_publish", "default", json.dumps(message))
        run_python(*arguments, environment=server.environment)
        expect(shown).to_have_text(text)
        assert shown.locator("*").count() == 0
    article = server.publish("An article")
    place = page.locator(f"article[data-id='{article['id']}'] .headline")
    expect(place).to_have_text("An article")
    assert errors == []
