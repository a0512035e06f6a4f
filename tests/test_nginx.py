"""Streams that left Python, behind a real nginx, and a real browser behind that."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parts import missing
from ports import HOST, free_port
from servers import TESTS, Server, open_streams, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

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


DEPLOYMENT = TESTS.parent / "docs" / "deployment.md"


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


@contextmanager
def nginx(directory: Path, servers: str, *ports: int) -> Iterator[None]:
    """nginx with these server blocks, answering on `ports`."""
    program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") or missing("nginx")
    path = directory / "nginx.conf"
    path.write_text(CONFIG.format(directory=directory, servers=servers))
    process = subprocess.Popen([program, "-c", path, "-p", directory])
    try:
        for port in ports:
            until(lambda port=port: answers(port), "nginx answers")
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def proxies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Proxy]]:
    """By `proxy_buffering` and the version of HTTP in which nginx asks the server."""
    directory = tmp_path_factory.mktemp("nginx")
    with Server("gunicorn-sync", tmp_path_factory.mktemp("server")) as server:
        ports = {way: free_port() for way in WAYS}
        blocks = [
            PROXY.format(
                host=HOST, port=port, upstream=server.port, buffering=buffering, version=version
            )
            for (buffering, version), port in ports.items()
        ]
        with nginx(directory, "\n".join(blocks), *ports.values()):
            errors = directory / "error.log"
            yield {way: Proxy(port, server, errors) for way, port in ports.items()}


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
    context: BrowserContext,
    errors: list[str],
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


def test_the_server_block_of_the_documents_is_fit_for_many_streams_and_for_a_restart(
    browser: Browser,
    tmp_path: Path,
) -> None:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="sse-") as run:
        server = Server(
            "gunicorn-sync", tmp_path, settings="observed.told_settings", proxies=1, retry=300
        )
        # Beside the port at which the test asks: the Unix socket at which nginx does.
        server.arguments += ["--bind", f"{HOST}:{server.port}", "--bind", f"unix:{run}/web.sock"]
        (block,) = re.findall(r"^```nginx\n(.*?)^```$", DEPLOYMENT.read_text(), re.M | re.S)
        for written, here in {
            "443": f"{HOST}:{port}",
            "/run/mysite/": f"{run}/",
            "/etc/ssl/": f"{tmp_path}/",
            "/stream/": PATH,
            "retry: 5000": "retry: 500",
        }.items():
            assert written in block
            block = block.replace(written, here)
        openssl = shutil.which("openssl") or missing("openssl")
        subprocess.run(
            f"{openssl} req -x509 -newkey rsa:2048 -nodes -subj /CN={HOST} "
            "-keyout mysite.key -out mysite.crt",
            cwd=tmp_path, shell=True, check=True, capture_output=True,
        )  # fmt: skip
        with (
            server,
            nginx(tmp_path, block, port),
            browser.new_context(ignore_https_errors=True) as context,
        ):
            page = context.new_page()
            page.goto(f"https://{HOST}:{port}/blank/")
            page.evaluate(
                """() => {
                    window.opened = 0;
                    window.events = [];
                    window.sources = Array.from({length: 8}, () => {
                        const source = new EventSource('/news/events/');
                        source.onopen = () => opened++;
                        source.onmessage = (event) => events.push(JSON.parse(event.data).headline);
                        return source;
                    });
                }"""
            )
            # More than the six connections that a browser has for one host: this is HTTP/2.
            page.wait_for_function("opened === 8")
            assert page.evaluate("performance.getEntries()[0].nextHopProtocol") == "h2"
            (figures,) = server.figures().values()
            assert figures["offload"] == {"connections": 8, "taken": 8, "refused": {}}
            # The browser's own, by PROXIES: a Unix socket has none.
            assert server.output().count(f"TOLD connected {HOST} ") == 8
            server.publish("Before")
            page.wait_for_function("events.length === 8")

            server.stop()
            # Asked again, and told by nginx to come back later, not with a 502.
            page.wait_for_function("opened >= 16")
            server.start()
            server.publish("Behind")
            page.wait_for_function("events.length === 16")
            assert page.evaluate("events") == ["Before"] * 8 + ["Behind"] * 8
            assert page.evaluate("sources.every((source) => source.readyState < 2)")
