"""Streams of a viewset of Django REST framework, under real servers."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from contextlib import closing

import pytest

from parts import chromium, missing
from ports import HOST
from servers import Answer, Server, open_stream, run_python, until

EVENT_STREAM = "text/event-stream"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.fixture(scope="module", params=["gunicorn-sync", "gunicorn-gevent", "uvicorn-asyncio-h11"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp(request.param)
    server = Server(request.param, directory, settings="observed.rest_settings")
    run_python(
        "-c",
        "import django; django.setup()\n"
        "from django.contrib.auth.models import User\n"
        "User.objects.create_user('ann', password='secret')",
        environment=server.environment,
    )
    with server:
        yield server
        assert "Traceback" not in server.output()


def ask(server: Server, path: str, accept: str = EVENT_STREAM, method: str = "GET") -> Answer:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    with closing(connection):
        connection.request(method, path, headers={"Accept": accept, "Connection": "close"})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read())


def figures(server: Server) -> dict:
    (found,) = server.figures().values()
    return found


def test_an_action_streams_and_leaves_python(server: Server) -> None:
    before = figures(server)["offload"]["refused"]
    with open_stream(server, "/api/articles/stream/") as stream:
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        until(lambda: stream.events, "the first payload")
        assert stream.events[0].json() == {"total": 0}
        until(lambda: figures(server)["clients"]["socket"] == 1, "it is offloaded")
        server.publish("Rain")
        until(lambda: len(stream.events) == 2, "the event")
        assert stream.events[1].json()["headline"] == "Rain"
        until(lambda: not server.database_descriptors(), "no connection waits with the stream")
    until(lambda: figures(server)["clients"]["socket"] == 0, "it has left")
    assert figures(server)["offload"]["refused"] == before


def test_the_user_of_the_framework_is_the_views(server: Server) -> None:
    token = base64.b64encode(b"ann:secret").decode()
    with open_stream(server, "/api/articles/members/", Authorization=f"Basic {token}") as stream:
        until(lambda: stream.events, "the first payload")
        assert stream.events[0].json() == {"user": "ann"}


def test_refusals_can_be_read(server: Server) -> None:
    answer = ask(server, "/api/articles/members/")
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert answer.headers["content-type"] == "application/json"
    assert "credentials were not provided" in answer.json()["detail"]
    answer = ask(server, "/api/articles/staff/")
    assert answer.status == 403
    assert answer.headers["content-type"] == "application/json"
    assert "credentials were not provided" in answer.json()["detail"]
    # In a browser's window it is a page.
    answer = ask(server, "/api/articles/staff/", BROWSER)
    assert answer.status == 403
    assert answer.headers["content-type"].startswith("text/html")
    assert b"credentials were not provided" in answer.body


def test_without_the_renderer_the_framework_refuses_an_event_source(server: Server) -> None:
    answer = ask(server, "/api/articles/unprepared/")
    assert answer.status == 406


def test_what_is_no_stream_is_json(server: Server) -> None:
    answer = ask(server, "/api/articles/plain/")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {"plain": True}
    answer = ask(server, "/api/articles/nothing/")
    assert (answer.status, answer.body) == (204, b"")
    assert "content-type" not in answer.headers
    answer = ask(server, "/api/articles/stream/", method="OPTIONS")
    assert EVENT_STREAM in answer.json()["renders"]
    answer = ask(server, "/api/articles/stream/", method="POST")
    assert (answer.status, answer.headers["content-type"]) == (405, "application/json")


def test_the_browsable_api_shows_the_other_pages(server: Server) -> None:
    answer = ask(server, "/api/articles/plain/", BROWSER)
    assert answer.headers["content-type"].startswith("text/html")
    # Rendered by the first renderer that is not the page's own.
    assert b"&quot;plain&quot;: true" in answer.body
    answer = ask(server, "/api/articles/", BROWSER)
    assert answer.headers["content-type"].startswith("text/html")
    assert b'/api/articles/stream/"' in answer.body


@pytest.mark.parametrize("suffix", ["stream.sse", "stream/?format=sse"])
def test_a_format_chooses_it(server: Server, suffix: str) -> None:
    with open_stream(server, f"/api/articles/{suffix}", Accept="*/*") as stream:
        until(lambda: stream.events, "the first payload")


def test_an_event_source_reads_an_action(server: Server) -> None:
    path = chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        page = browser.new_page()
        page.goto(f"{server.url}/blank/")
        received = page.evaluate(
            """() => new Promise((resolve, reject) => {
                const source = new EventSource("/api/articles/stream/");
                source.onmessage = (event) => { source.close(); resolve(event.data); };
                source.onerror = () => reject(new Error("refused"));
            })"""
        )
        assert "total" in json.loads(received)
        browser.close()
