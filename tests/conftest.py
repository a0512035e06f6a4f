"""What all tests share: Django configured once, and channels nobody else uses."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import django
import pytest
from django.conf import settings

from sse_channel import SSEChannel, _sse_channel, configure

pytest_plugins = ["browsers"]

HERE = Path(__file__).parent
PATIENCE = 30.0  # seconds for a condition that machines in a hurry reach in milliseconds
_names = itertools.count()
_directory = tempfile.TemporaryDirectory()
_bus = tempfile.TemporaryDirectory(prefix="sse-", dir="/tmp")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell has its background ignore Ctrl-C, and what is begun there inherits that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A bus that nobody else hears. Sockets lie in it, so that its path must be short. Of each
    # process of pytest-xdist, which would inherit that of the one that only gives them tests.
    runs_tests = hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None)
    if runs_tests:
        os.environ.setdefault("SSE_CHANNEL_BUS", f"local://{_bus.name}/bus")
    settings.configure(
        ALLOWED_HOSTS=["testserver"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                # In a file: Django never closes a connection to a database in memory.
                "NAME": Path(_directory.name) / "tests.sqlite3",
            }
        },
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
        MIDDLEWARE=["django.middleware.gzip.GZipMiddleware"],
        ROOT_URLCONF="urls",
        SECRET_KEY="only for tests",
        USE_TZ=True,
    )
    django.setup()


def pytest_unconfigure() -> None:
    _directory.cleanup()
    # Or its threads might still write while the directory is removed.
    _sse_channel.close_all()
    _bus.cleanup()


@pytest.fixture
def name() -> str:
    """A channel's name that no other test uses."""
    return f"test-{os.getpid()}-{next(_names)}"


@pytest.fixture
def channel(name: str) -> SSEChannel:
    """A named channel without clients and history."""
    return SSEChannel(name)


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait for a condition, and fail when it does not come."""

    def wait(condition: Callable[[], object], patience: float = PATIENCE) -> None:
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, f"not within {patience} s"
            time.sleep(0.005)

    return wait


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for buses: the path of pytest's own may be too long for the sockets in them."""
    with tempfile.TemporaryDirectory(prefix="sse-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """Run Python code in a process of its own, below `command`; its output, after a clean exit."""

    def run(code: str, *arguments: str, command: Sequence[str] = (), **environment: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(code)
        done = subprocess.run(
            [*command, sys.executable, "-W", "error", str(path), *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "PYTHONPATH": str(HERE), **environment},
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert not done.stderr, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def database() -> Iterator[None]:
    """The tables of Django's apps."""
    from django.core.management import call_command
    from django.db import connection

    call_command("migrate", verbosity=0)
    yield
    connection.close()


@pytest.fixture
def options() -> Iterator[Callable[..., None]]:
    """Options for one test."""
    from sse_channel import config

    before = dict(config._configured)
    yield configure
    config._configured.clear()
    config._configured.update(before)
    config._in_force = None
