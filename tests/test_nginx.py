"""Streams that left Python, behind a real nginx, and a real browser behind that."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parts import missing
from servers import HOST, Server, free_port, open_streams, until
from test_browser import browser, context, errors  # noqa: F401  (fixtures)

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

PATH = "/news/events/"
WAYS = list(itertools.product(["on", "off"], ["1.0", "1.1"]))

CONFIG = """
daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    {servers}
}}
"""
PROXY = """
server {{
    listen {host}:{port};
    location / {{
        proxy_pass http://{host}:{upstream};
        proxy_http_version {version}; proxy_set_header Connection "";
        proxy_set_header Host localhost;
        proxy_buffering {buffering};
    }}
}}
"""


@dataclass
class Proxy:
    """A port of nginx in front of a server, to be asked as that."""

    port: int
    server: Server
    errors: Path

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def output(self) -> str:
        return self.errors.read_text() + self.server.output()


@pytest.fixture(scope="module")
def proxies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Proxy]]:
    """By `proxy_buffering` and the version of HTTP in which nginx asks the server."""
    program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") or missing("nginx")
    directory = tmp_path_factory.mktemp("nginx")
    with ExitStack() as stack:
        server = stack.enter_context(Server("gunicorn-sync", tmp_path_factory.mktemp("server")))
        ports = {way: free_port() for way in WAYS}
        blocks = [
            PROXY.format(
                host=HOST, port=port, upstream=server.port, buffering=buffering, version=version
            )
            for (buffering, version), port in ports.items()
        ]
        path = directory / "nginx.conf"
        path.write_text(CONFIG.format(directory=directory, servers="\n".join(blocks)))
        nginx = subprocess.Popen([program, "-c", path, "-p", directory])
        stack.callback(nginx.wait)
        stack.callback(nginx.terminate)
        found = {way: Proxy(port, server, directory / "error.log") for way, port in ports.items()}
        for proxy in found.values():
            until(lambda port=proxy.port: answers(port), "nginx answers")
        yield found


def answers(port: int) -> bool:
    import socket

    try:
        socket.create_connection((HOST, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(("buffering", "version"), WAYS)
def test_each_event_comes_through_at_once_and_the_end_is_noticed(
    proxies: dict[tuple[str, str], Proxy], buffering: str, version: str
) -> None:
    proxy = proxies[buffering, version]
    with open_streams(proxy, PATH, 20) as streams:
        assert proxy.server.clients() == 20
        for n in range(5):
            proxy.server.publish(f"Article {n}")
            # Before the next one is sent: nothing is held back.
            until(
                lambda n=n: all(len(stream.events) == n + 1 for stream in streams),
                "the article in all streams",
            )
        assert len({tuple(stream.events) for stream in streams}) == 1
        assert not any("x-accel-buffering" in stream.headers for stream in streams)
    until(lambda: proxy.server.clients() == 0, "nginx has closed its connections")


@pytest.mark.parametrize(("buffering", "version"), WAYS)
def test_a_browser_behind_nginx_gets_each_event(
    proxies: dict[tuple[str, str], Proxy],
    context: BrowserContext,  # noqa: F811
    errors: list[str],  # noqa: F811
    buffering: str,
    version: str,
) -> None:
    proxy = proxies[buffering, version]
    page = context.new_page()
    page.goto(f"{proxy.url}/blank/")
    page.evaluate(
        """() => {
            window.events = [];
            window.source = new EventSource('/news/events/');
            source.onmessage = (event) => events.push([event.lastEventId, JSON.parse(event.data)]);
            return new Promise((resolve) => { source.onopen = resolve; });
        }"""
    )
    articles = [proxy.server.publish(f"For a browser {n}") for n in range(3)]
    page.wait_for_function("events.length === 3")
    received = page.evaluate("events")
    assert [article for _, article in received] == articles
    assert received == sorted(received)
    assert errors == []
