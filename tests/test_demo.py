"""`make demo`, as far as make calls its script: it serves, submits, and stops cleanly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from buses import bus_of

DEMO = Path(__file__).parent.parent / "scripts" / "demo.py"


@pytest.fixture
def bus():
    """A bus that no other demo uses."""
    with bus_of("local") as bus:
        yield bus.url


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_demo_serves_articles_and_stops_cleanly(tmp_path, bus, stop):
    environment = {
        **os.environ,
        "NEWS_BIND": "127.0.0.1:0",
        "NEWS_DB": str(tmp_path / "news.sqlite3"),
        "SSE_CHANNEL_BUS": bus,
    }
    process = subprocess.Popen(
        [sys.executable, str(DEMO)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        # As a shell does for what it starts in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        address = None
        while address is None:
            line = process.stdout.readline()
            assert line, "the demo ended before it printed an address"
            address = re.search(r"http://127\.0\.0\.1:\d+/news/", line)
        line = process.stdout.readline()
        monitor = re.search(r"http://127\.0\.0\.1:\d+/monitor/", line)
        with urllib.request.urlopen(monitor[0], timeout=60) as page:
            assert b"monitor.js" in page.read()
        directory, publish = None, None
        while publish is None:
            line = process.stdout.readline()
            assert line, "the demo ended before it said how to publish"
            directory = directory or re.search(r"terminal, in (.+):$", line)
            publish = re.fullmatch(r"      (.+ manage.py sse_publish .+)\n", line)
        payloads = []
        with urllib.request.urlopen(address[0] + "stream/", timeout=60) as stream:
            while len(payloads) < 3:
                line = stream.readline()
                assert line, "the stream ended"
                if line.startswith(b"data: "):
                    payloads.append(json.loads(line[6:]))
            assert all(payload["article"]["headline"] for payload in payloads[1:])
            # The command as it is printed, in the directory that is named.
            subprocess.run(publish[1], shell=True, cwd=directory[1], env=environment, check=True)
            line = b""
            while not line.startswith(b'data: {"announcement"'):
                line = stream.readline()
                assert line, "the stream ended"
            assert json.loads(line[6:])["announcement"] == {"headline": "Hello"}
        with urllib.request.urlopen(address[0], timeout=60) as page:
            assert f'data-id="{payloads[-1]["article"]["id"]}"'.encode() in page.read()
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 5, "gunicorn, its three workers, and the submitter"
        process.send_signal(stop)
        assert process.wait(timeout=60) == 0
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_an_address_in_use_is_told_with_what_to_do(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, str(DEMO)],
            capture_output=True,
            text=True,
            env={**os.environ, "NEWS_BIND": f"127.0.0.1:{port}"},
            timeout=60,
        )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "make demo NEWS_BIND=" in done.stderr
