"""The news example: its page, its API, and the generator of its stream."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from servers import TESTS, Server, open_stream, quiet, run_python, until

HEADLINE = "Rain by noon"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("gunicorn-gevent", tmp_path_factory.mktemp("news")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """A server without articles."""
    with closing(sqlite3.connect(running.database, timeout=20)) as database, database:
        database.execute("DELETE FROM news_article")
    with quiet(running):
        yield running


def first_message(server: Server, path: str) -> dict:
    with open_stream(server, path) as stream:
        until(lambda: stream.events, "the first payload")
        assert stream.events[0].type == "message"
        return stream.events[0].json()


def test_a_stream_of_an_empty_site_begins_with_a_message(server: Server) -> None:
    assert first_message(server, "/news/stream/") == {
        "message": "No articles yet",
        "worker": server.worker.pid,
    }


def test_a_stream_begins_with_the_newest_article_and_goes_on_with_each_new_one(
    server: Server,
) -> None:
    server.publish("An older one", category="Sport", source="Final Whistle")
    newest = server.publish("The newest of two", category="Climate")
    with open_stream(server, "/news/stream/") as stream:
        until(lambda: stream.events, "the first payload")
        added = server.publish("Three")
        until(lambda: len(stream.events) == 2, "the added article")
        first, second = (event.json() for event in stream.events)
    assert first["article"] == newest
    assert first["worker"] == server.worker.pid
    rate = first["statistics"].pop("per_minute")
    assert rate > 0
    assert first["statistics"] == {
        "total": 2,
        "last_n": 10,
        "count": 2,
        "average_headline_words": 3.5,
        "categories": {"Climate": 1, "Sport": 1},
        "sources": {"Newsroom": 1, "Final Whistle": 1},
    }
    assert second["article"] == added
    assert second["worker"] == server.worker.pid
    assert second["statistics"]["total"] == 3
    assert second["statistics"]["categories"] == {"General": 1, "Climate": 1, "Sport": 1}


def test_statistics_cover_as_many_articles_as_asked_for(server: Server) -> None:
    for category in ("Sport", "World", "World"):
        server.publish(HEADLINE, category=category)
    statistics = first_message(server, "/news/stream/?last_n=2")["statistics"]
    assert statistics["last_n"] == 2
    assert statistics["count"] == 2
    assert statistics["total"] == 3
    assert statistics["categories"] == {"World": 2}
    assert first_message(server, "/news/stream/?last_n=100")["statistics"]["count"] == 3


@pytest.mark.parametrize("last_n", ["0", "-1", "101", "1.5", "ten", "", "%D9%A3", "9" * 10])
def test_a_number_of_articles_out_of_range_is_refused(server: Server, last_n: str) -> None:
    answer = server.request("GET", f"/news/stream/?last_n={last_n}")
    assert answer.status == 400
    assert answer.json() == {"error": "last_n must be a whole number from 1 to 100."}


def test_a_submitted_article_is_answered_as_it_is_stored_and_sent(server: Server) -> None:
    article = {
        "headline": f"  {HEADLINE} ",
        "summary": "Gdańsk 🎉\nsecond line",
        "source": "The Harbour Post",
        "category": "Climate",
    }
    with open_stream(server, "/news/events/") as stream:
        answer = server.request("POST", "/news/submit/", article)
        until(lambda: stream.events, "the article")
        sent = stream.events[0].json()
    assert answer.status == 201
    stored = answer.json()
    assert {name: stored[name] for name in article} == {**article, "headline": HEADLINE}
    assert sent == stored
    assert first_message(server, "/news/stream/")["article"] == stored


def test_an_article_needs_a_headline_only(server: Server) -> None:
    stored = server.publish(HEADLINE)
    assert stored["headline"] == HEADLINE
    assert stored["summary"] == ""
    assert stored["source"] == "Newsroom"
    assert stored["category"] == "General"


REFUSED = {
    "no JSON": b"Rain by noon",
    "no body": b"",
    "not UTF-8": b'{"headline": "\xff"}',
    "too deep": b"[" * 100_000,
    "no object": [HEADLINE],
    "null": b"null",
    "no headline": {"summary": "Rain"},
    "a blank headline": {"headline": " \n "},
    "a number for a headline": {"headline": 1},
    "a headline over 200 characters": {"headline": "x" * 201},
    "a summary over 2000 characters": {"headline": HEADLINE, "summary": "x" * 2001},
    "an object for a source": {"headline": HEADLINE, "source": {}},
    "NUL": {"headline": "Rain\0"},
    "half a surrogate pair": b'{"headline": "\\ud83c"}',
}


@pytest.mark.parametrize("path", ["/news/events/", "/news/stream/"])
def test_only_an_accepted_article_is_published(server: Server, path: str) -> None:
    with open_stream(server, path) as stream:
        already = 0 if path == "/news/events/" else 1
        for what, body in REFUSED.items():
            answer = server.request("POST", "/news/submit/", body)
            assert answer.status == 400, what
            assert answer.json()["error"], what
        good = server.publish(HEADLINE)
        until(lambda: len(stream.events) > already, "the good article")
        (message,) = [event.json() for event in stream.events[already:]]
    assert message.get("article", message) == good


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/news/submit/"),
        ("PUT", "/news/submit/"),
        ("OPTIONS", "/news/"),
        ("OPTIONS", "/news/stream/"),
        ("OPTIONS", "/news/events/"),
    ],
)
def test_other_methods_are_refused(server: Server, method: str, path: str) -> None:
    answer = server.request(method, path)
    assert answer.status == 405
    assert answer.headers["allow"] == ("POST" if path == "/news/submit/" else "GET")


def test_the_page_shows_articles_as_text(server: Server) -> None:
    empty = server.request("GET", "/news/").body.decode()
    assert '<p id="empty">' in empty
    article = server.publish("<script>alert(1)</script> & more", category="Culture")
    answer = server.request("GET", "/news/")
    page = answer.body.decode()
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "no-store" in answer.headers["cache-control"]
    assert '<p id="empty" hidden>' in page
    assert f'<article data-id="{article["id"]}" data-category="Culture">' in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "<script>alert" not in page


def test_the_root_leads_to_the_page(server: Server) -> None:
    answer = server.request("GET", "/")
    assert answer.status == 302
    assert answer.headers["location"] == "/news/"


@pytest.mark.parametrize("case", ["waiting", "heartbeat"])
def test_the_generator_under_gevent(server: Server, case: str) -> None:
    run_python(str(TESTS / "gevent_news.py"), case, environment=server.environment)


def test_submit_articles_submits_as_many_as_it_is_told(server: Server) -> None:
    url = f"{server.url}/news/submit/"
    with open_stream(server, "/news/events/") as stream:
        done = run_python(
            *("submit_articles.py", "--url", url, "--count", "3", "--interval", "0"),
            environment=server.environment,
        )
        # Comes after them: so they are three, and no more.
        server.publish("The end")
        until(lambda: len(stream.events) >= 4, "three articles and the end")
        headlines = [event.json()["headline"] for event in stream.events]
    assert len(headlines) == 4
    assert headlines[-1] == "The end"
    for line, headline in zip(done.stdout.splitlines(), headlines[:3], strict=True):
        assert line.endswith(headline)


def test_submit_articles_says_why_the_server_refuses(server: Server) -> None:
    with pytest.raises(AssertionError, match=r"ended with 1:\nsubmit_articles: .* answered 403"):
        run_python(
            *("submit_articles.py", "--url", f"{server.url}/news/", "--count", "1"),
            environment=server.environment,
        )
