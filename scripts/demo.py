"""Serve the news example under gunicorn, submit articles to it, until Ctrl-C.

The address is NEWS_BIND (default 127.0.0.1:8000; port 0 takes a free one).
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "news"
STARTS_WITHIN = 60  # seconds
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    host, _, port = os.environ.get("NEWS_BIND", "127.0.0.1:8000").rpartition(":")
    try:
        with socket.socket() as probe:
            # As gunicorn does: an address that only waits out old connections is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
            port = str(probe.getsockname()[1])
    except (OSError, ValueError) as error:
        print(f"cannot listen on {host}:{port}: {error}", file=sys.stderr)
        print("choose another address: make demo NEWS_BIND=127.0.0.1:8001", file=sys.stderr)
        return 1
    address = f"http://{host}:{port}/news/"
    environment = {**os.environ, "NEWS_BIND": f"{host}:{port}"}
    python = sys.executable
    # Also where it is started with Ctrl-C ignored, and when the terminal is closed.
    for number in ENDINGS:
        signal.signal(number, interrupt)

    server = submitter = None
    try:
        subprocess.run(
            [python, "manage.py", "migrate", "--verbosity", "0"],
            cwd=EXAMPLE,
            env=environment,
            check=True,
        )
        # Ctrl-C in the terminal reaches the whole group: these are stopped from here alone.
        server = subprocess.Popen(
            [python, "-m", "gunicorn", "-c", "gunicorn.conf.py"],
            cwd=EXAMPLE,
            env=environment,
            start_new_session=True,
        )
        if not answers(address, server):
            print("gunicorn did not start; its reason is above", file=sys.stderr)
            return 1
        print(f"\n    The news example is at {address}   (Ctrl-C stops it)")
        print(f"    What its streams do is at http://{host}:{port}/monitor/\n")
        print(f"    From another terminal, in {os.path.relpath(EXAMPLE)}:")
        for command in ("sse_tail default", """sse_publish default '{"headline": "Hello"}'"""):
            print(f"      {python} manage.py {command}")
        print(flush=True)
        submitter = subprocess.Popen(
            [python, "submit_articles.py", "--url", address + "submit/"],
            cwd=EXAMPLE,
            start_new_session=True,
        )
        return server.wait()
    except KeyboardInterrupt:
        print("\nstopping", flush=True)
        return 0
    finally:
        # Once is enough: a second Ctrl-C must not leave one of them behind.
        for number in ENDINGS:
            signal.signal(number, signal.SIG_IGN)
        for process in (submitter, server):
            if process is not None:
                stop(process)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def answers(address: str, server: subprocess.Popen) -> bool:
    deadline = time.monotonic() + STARTS_WITHIN
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
