"""Django's system checks for the known traps, and what a server's process tells of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from django.core import checks
from django.core.handlers.wsgi import WSGIHandler
from django.middleware.gzip import GZipMiddleware
from django.test import RequestFactory, override_settings
from django.urls import path as url

from servers import EXAMPLE, Server, open_stream, open_streams
from sse_channel import config
from sse_channel.django import EventStreamResponse
from sse_channel.django.checks import TAG, register


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch, tmp_path):
    """No gunicorn, no uvicorn, and no file of either in sight."""
    register()
    for name in os.environ:
        if name.startswith(("GUNICORN_", "UVICORN_", "WEB_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def memory():
    with config.overridden(bus="memory://"):
        yield


class OwnCompressor(GZipMiddleware):
    """A project's own, which compresses more."""

    max_random_bytes = 0


def check(deploy: bool = False) -> dict[str, checks.CheckMessage]:
    """What the checks say, by the ends of their ids."""
    found = checks.run_checks(tags=[TAG], include_deployment_checks=deploy)
    assert all(message.hint for message in found)
    return {message.id.removeprefix("sse_channel."): message for message in found}


def gunicorn_has(tmp_path: Path, text: str) -> None:
    (tmp_path / "gunicorn.conf.py").write_text(text)


def test_a_project_in_order_has_nothing_told():
    assert check(deploy=True) == {}


# --- settings -----------------------------------------------------------------------------


def test_each_mistake_in_the_settings_is_an_error(monkeypatch):
    monkeypatch.setenv("SSE_CHANNEL_IO_THREADS", "many")
    with override_settings(SSE_CHANNEL={"RETYR": 1, "RETRY": "x", "OFFLOAD": 1}):
        found = checks.run_checks(tags=[TAG])
    assert {message.id for message in found} == {"sse_channel.E001"}
    assert all(message.level == checks.ERROR for message in found)
    told = [message.msg for message in found]
    assert len(told) == 4
    assert "no option 'RETYR'; did you mean 'RETRY'?" in told[0]
    assert "SSE_CHANNEL_IO_THREADS must be a whole number, not 'many'" in told[1]
    assert "SSE_CHANNEL['OFFLOAD'] in Django's settings must be True or False" in told[2]
    assert "SSE_CHANNEL['RETRY'] in Django's settings must be an int, not str" in told[3]


def test_settings_that_are_no_dict_are_an_error():
    with override_settings(SSE_CHANNEL=["BUS"]):
        assert "must be a dict, not list" in check()["E001"].msg


def test_a_variable_that_is_nearly_an_options_is_asked_back(monkeypatch):
    monkeypatch.setenv("SSE_CHANNEL_MAX_CLIENT", "5")
    monkeypatch.setenv("SSE_CHANNEL_OF_OUR_OWN", "5")
    found = check()
    assert found.keys() == {"W006"}
    assert "SSE_CHANNEL_MAX_CLIENT is not an option's" in found["W006"].msg
    assert found["W006"].hint == "Did you mean SSE_CHANNEL_MAX_CLIENTS?"


def manage(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=EXAMPLE,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "news_api.settings", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_mistake_is_told_by_manage_py_as_a_check_and_elsewhere_at_the_start():
    done = manage("manage.py", "check", SSE_CHANNEL_RETRY="soon")
    assert done.returncode == 1
    assert "(sse_channel.E001)" in done.stderr
    assert "SSE_CHANNEL_RETRY must be a whole number, not 'soon'" in done.stderr
    assert "Traceback" not in done.stderr
    done = manage("-c", "import news_api.wsgi", SSE_CHANNEL_RETRY="soon")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: the environment variable SSE_")


def test_the_example_is_in_order():
    done = manage("manage.py", "check")
    assert done.returncode == 0, done.stderr
    assert "no issues" in done.stdout + done.stderr


# --- a bus for one process ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("workers = 3", "workers = 3 in "),
        (
            "import multiprocessing\nworkers: int = multiprocessing.cpu_count() * 2 + 1",
            "workers = multiprocessing.cpu_count() * 2 + 1 in ",
        ),
        ("workers = 1", None),
        ("import os\nworkers = int(os.environ['N'])", None),
        ("raise SystemExit  # it is not run", None),
        ("workers = (", None),
    ],
)
def test_a_memory_bus_with_several_workers_of_gunicorns_file(memory, tmp_path, text, told):
    gunicorn_has(tmp_path, text)
    found = check()
    if told is None:
        assert found == {}
    else:
        assert found.keys() == {"W001"}
        assert f"({told}{tmp_path}/gunicorn.conf.py): an event reaches only" in found["W001"].msg


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--workers 4", "--workers 4 in GUNICORN_CMD_ARGS"),
        ("-w4 --reload", "--workers 4 in GUNICORN_CMD_ARGS"),
        ("--workers=1", None),
        ("-c other.py", "workers = 5 in other.py"),
        ("-c file:other.py --workers=2", "--workers 2 in GUNICORN_CMD_ARGS"),
        ("-c missing.py -w", None),
        ("--workers 'unclosed", None),
    ],
)
def test_a_memory_bus_with_several_workers_of_gunicorns_arguments(
    memory, tmp_path, monkeypatch, arguments, told
):
    (tmp_path / "other.py").write_text("workers = 5")
    monkeypatch.setenv("GUNICORN_CMD_ARGS", arguments)
    found = check()
    assert found.keys() == ({"W001"} if told else set())
    if told:
        assert f"({told})" in found["W001"].msg


def test_a_memory_bus_with_web_concurrency(memory, tmp_path, monkeypatch):
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    assert "(2 in WEB_CONCURRENCY)" in check()["W001"].msg
    monkeypatch.setattr(sys, "argv", ["manage.py", "test"])
    assert check() == {}, "the bus of a test run"
    monkeypatch.undo()
    with config.overridden(bus="local://"):
        monkeypatch.setenv("WEB_CONCURRENCY", "2")
        assert check() == {}


def test_a_memory_bus_in_production(memory):
    assert check() == {}
    assert "no other process" in check(deploy=True)["W002"].msg
    with override_settings(DEBUG=True):
        assert check(deploy=True) == {}


# --- workers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "offload", "told"),
    [
        ("", False, "since OFFLOAD is off"),
        ("worker_class = 'sync'", False, "since OFFLOAD is off"),
        ("worker_class = 'gevent'", False, None),
        ("threads = 8", False, None),
        ("worker_class = choose()", False, None),
        ("", True, None),
        ("certfile = '/etc/cert.pem'", True, "speaks TLS (certfile = '/etc/cert.pem' in "),
        ("certfile = None", True, None),
        ("certfile = '/etc/cert.pem'\nworker_class = 'gthread'", True, None),
    ],
)
def test_sync_workers_that_keep_their_streams(tmp_path, text, offload, told):
    gunicorn_has(tmp_path, text)
    with config.overridden(offload=offload):
        found = check()
    assert found.keys() == ({"W003"} if told else set())
    if told:
        assert told in found["W003"].msg


def test_without_a_word_of_gunicorn_nothing_is_guessed():
    with config.overridden(offload=False):
        assert check() == {}


# --- ASGI ---------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package with an `asgi.py`, which must not be imported."""
    package = types.ModuleType("asgi_project")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "asgi_project", package)

    def write(text: str) -> None:
        (tmp_path / "asgi.py").write_text(text + "\nraise AssertionError('imported')\n")

    with override_settings(WSGI_APPLICATION="asgi_project.wsgi.application"):
        yield write


PLAIN = "from django.core.asgi import get_asgi_application\napplication = get_asgi_application()"


@pytest.mark.parametrize("where", ["worker class", "variable", "setting"])
def test_asgi_for_uvicorn_without_the_wrapper(project, tmp_path, monkeypatch, where):
    project(PLAIN)
    assert check() == {}, "an asgi.py alone is in every project"
    if where == "worker class":
        gunicorn_has(tmp_path, "worker_class = 'uvicorn_worker.UvicornWorker'")
        found = check()
    elif where == "variable":
        monkeypatch.setenv("UVICORN_PORT", "8000")
        found = check()
    else:
        monkeypatch.setenv("UVICORN_PORT", "8000")
        with override_settings(WSGI_APPLICATION=None, ASGI_APPLICATION="asgi_project.asgi.app"):
            found = check()
    assert found.keys() == {"W004"}
    assert found["W004"].msg.startswith(f"{tmp_path}/asgi.py does not use sse_channel.asgi.offload")
    with config.overridden(offload=False):
        assert check() == {}


@pytest.mark.parametrize(
    "text",
    [
        f"from sse_channel.asgi import offload\n{PLAIN}",
        f"from sse_channel import asgi\n{PLAIN}",
        f"import sse_channel.asgi\n{PLAIN}",
        "not (Python",
    ],
)
def test_asgi_with_the_wrapper(project, monkeypatch, text):
    monkeypatch.setenv("UVICORN_PORT", "8000")
    project(text)
    assert check() == {}


# --- transactions -------------------------------------------------------------------------


async def asynchronous(request):
    return EventStreamResponse(request, "x")


async def no_stream(request):
    raise NotImplementedError


def synchronous(request):
    return EventStreamResponse(request, "x")


def test_asynchronous_streams_where_requests_are_transactions(monkeypatch):
    from django.conf import settings
    from django.db import transaction
    from django.views import View

    class Streams(View):
        async def get(self, request):
            return EventStreamResponse(request, "x")

    @transaction.non_atomic_requests
    async def exempt(request):
        return EventStreamResponse(request, "x")

    views = [asynchronous, no_stream, synchronous, Streams.as_view(), exempt]
    urls = types.ModuleType("urls_of_streams")
    urls.urlpatterns = [url(f"{number}/", view) for number, view in enumerate(views)]
    monkeypatch.setitem(sys.modules, "urls_of_streams", urls)
    with override_settings(ROOT_URLCONF="urls_of_streams"):
        assert check() == {}
        monkeypatch.setitem(settings.DATABASES["default"], "ATOMIC_REQUESTS", True)
        found = [message.msg for message in checks.run_checks(tags=[TAG])]
    assert len(found) == 2
    assert found[0].startswith("test_checks.asynchronous is asynchronous, and the database")
    assert "<locals>.Streams is asynchronous" in found[1]


# --- what a server's process tells --------------------------------------------------------


def told(server: Server) -> list[str]:
    """The ids of what the processes have logged."""
    return re.findall(r"\(sse_channel\.(\w+)\)", server.output())


def test_a_worker_tells_once_that_streams_hold_it(tmp_path):
    with Server("gunicorn-sync", tmp_path, offload=False) as server:
        assert told(server) == []
        for _ in range(2):
            # With a heartbeat of a second, by which the worker sees that the client has left.
            with open_stream(server, "/dressed/"):
                pass
        assert told(server) == ["W003"]
        assert "holds one of gunicorn's sync workers for itself, since OFFLOAD" in server.output()


def test_each_worker_tells_once_that_the_others_do_not_hear_it(tmp_path):
    with Server("gunicorn-sync-3", tmp_path, bus="memory://") as server:
        worker = server.workers[0]
        with server.only(worker), open_streams(server, "/news/events/", 3):
            pass
        assert told(server) == ["W001"]
        assert "there are several workers (gunicorn's, 3)" in server.output()


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "uvicorn-asyncio-h11"])
def test_a_process_tells_once_what_stands_between(tmp_path, kind):
    with Server(kind, tmp_path) as server:
        with open_streams(server, "/news/events/", 2):
            assert told(server) == []
        for _ in range(2):
            with open_stream(server, "/compressed/"):
                pass
        assert told(server) == ["W007"]
        assert re.search(r"\(compressed\.<locals>\.<genexpr> in .*/urls\.py\)", server.output())


def test_a_process_tells_of_a_compressor_around_the_application(tmp_path):
    arguments = ("observed.encoded:application",)
    with Server("gunicorn-gevent", tmp_path, arguments=arguments) as server:
        with open_stream(server, "/news/events/"):
            pass
        assert told(server) == ["W007"]
        assert "the response got a Content-Encoding around the application" in server.output()


@pytest.mark.parametrize(
    "middleware", ["django.middleware.gzip.GZipMiddleware", "test_checks.OwnCompressor"]
)
def test_a_compressor_among_the_middleware_is_no_trap(name, middleware):
    request = RequestFactory().get(f"/stream/{name}/", headers={"Accept-Encoding": "gzip, br"})
    with override_settings(MIDDLEWARE=[middleware]):
        response = WSGIHandler().get_response(request)
        assert check() == {}
    assert "Content-Encoding" not in response.headers
    assert not response._is_wrapped
    response.close()


@pytest.mark.parametrize(
    ("application", "says"),
    [
        (
            "observed.plain_asgi:application",
            "The ASGI application is not wrapped by sse_channel.asgi.offload",
        ),
        (
            "observed.behind_asgi:application",
            "observed.behind_asgi.application.<locals>.passed_on stands between the server and "
            "sse_channel.asgi.offload",
        ),
    ],
    ids=["nothing", "before"],
)
def test_uvicorn_tells_once_what_keeps_its_streams_with_python(tmp_path, application, says):
    with Server("uvicorn-plain", tmp_path, arguments=(application,)) as server:
        with open_streams(server, "/news/events/", 2):
            pass
        assert told(server) == ["W004"]
        assert says in server.output()


@pytest.mark.parametrize("kind", ["uvicorn-asyncio-h11", "uvicorn-uvloop-httptools"])
def test_streams_are_offloaded_also_where_uvicorn_logs_each_message(tmp_path, kind):
    with Server(kind, tmp_path, arguments=("--log-level", "trace")) as server:
        with open_streams(server, "/news/events/", 2):
            (figures,) = server.figures().values()
            assert figures["clients"] == {"queue": 0, "stream": 0, "socket": 2}
            server.publish("An article")
        assert told(server) == []
        assert "TRACE" in server.output()
        assert "Traceback" not in server.output()
