"""The package as others meet it: import, configuration, what it needs and does not."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

import sse_channel
from parts import missing
from sse_channel import configure
from sse_channel.config import options

ROOT = Path(__file__).parent.parent


def test_importing_needs_neither_django_nor_gevent_and_starts_nothing(script):
    script(
        """
import os, sys, threading
for name in ("django", "gevent", "greenlet", "asgiref", "redis"):
    sys.modules[name] = None
descriptors = set(os.listdir("/proc/self/fd"))
import sse_channel
assert set(os.listdir("/proc/self/fd")) == descriptors
assert len(os.listdir("/proc/self/task")) == 1
q = sse_channel.sse_channel.listen()
sse_channel.sse_channel.publish({"a": 1})
assert q.get(timeout=1) == {"a": 1}
assert len(os.listdir("/proc/self/task")) == 1
""",
        SSE_CHANNEL_BUS="memory://",
    )


def test_importing_imports_neither(script):
    out = script(
        "import sys, sse_channel\n"
        "print([name for name in ('django', 'gevent', 'greenlet') if name in sys.modules])"
    )
    assert out == "[]\n"


SUBINTERPRETERS = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
run = getattr(interpreters, "exec", None) or interpreters.run_string
for config in ("legacy", "isolated") if hasattr(interpreters, "new_config") else (None,):
    other = interpreters.create() if config is None else interpreters.create(config)
    for name in ("sse_channel", "sse_channel._sse_channel"):
        run(other, f"try: import {name}\\nexcept ImportError as e: print(e, flush=True)")
    import sse_channel
print(sse_channel.SSEChannel().publish("x") > "")
"""


def test_a_subinterpreter_is_refused_before_and_after_the_main_one(script):
    if all(importlib.util.find_spec(n) is None for n in ("_interpreters", "_xxsubinterpreters")):
        pytest.skip("neither _interpreters nor _xxsubinterpreters is part of this Python")
    out = script(SUBINTERPRETERS).splitlines()
    assert len(out) in (3, 5), out
    assert out[-1] == "True"
    assert all("WSGIApplicationGroup %{GLOBAL}" in line for line in out[:-1]), out


def test_a_bus_that_is_in_use_cannot_be_changed(script):
    script(
        """
from sse_channel import configure, sse_channel
configure(bus="memory://", retry=1)
sse_channel.publish("x")
configure(bus="memory://", retry=2)
try:
    configure(bus="local://", retry=3)
except ValueError as error:
    assert "comes too late" in str(error) and "memory://" in str(error)
else:
    raise AssertionError("not refused")
from sse_channel import configure
from sse_channel.config import options
assert options().retry == 2
"""
    )


def test_everything_that_it_exports_is_there():
    assert "sse_channel" in sse_channel.__all__
    missing = [name for name in sse_channel.__all__ if not hasattr(sse_channel, name)]
    assert missing == []


@pytest.fixture
def fresh_options(monkeypatch):
    """Options as a process reads them that configured nothing."""
    monkeypatch.setattr(sse_channel.config, "_configured", {})
    monkeypatch.setattr(sse_channel.config, "_in_force", None)
    monkeypatch.delenv("SSE_CHANNEL_BUS")


def shown():
    found = options()
    return found.bus, found.max_event_bytes, found.retry


def test_options_come_from_configure_then_environment_then_settings(
    fresh_options, monkeypatch, settings_with
):
    assert shown() == ("local://", 1 << 20, 3000)
    settings_with({"RETRY": 1, "MAX_EVENT_BYTES": 11})
    assert shown() == ("local://", 11, 1)
    monkeypatch.setenv("SSE_CHANNEL_RETRY", "2")
    sse_channel.config._in_force = None
    assert shown() == ("local://", 11, 2)
    configure(retry=3)
    assert shown() == ("local://", 11, 3)
    configure(publish_timeout=2)
    assert options().retry == 3
    assert options().publish_timeout == 2.0


@pytest.fixture
def settings_with(monkeypatch):
    from django.conf import settings

    def use(value):
        monkeypatch.setattr(settings, "SSE_CHANNEL", value, raising=False)
        sse_channel.config._in_force = None

    return use


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"bus": "amqp://me:secret@host"}, ValueError, r"bus=.*'amqp://\*\*\*@host'"),
        ({"bus": 7}, TypeError, "bus=.*URL"),
        ({"bus": "local://relative"}, ValueError, "bus=.*no bus"),
        ({"publish_timeout": 0}, ValueError, "publish_timeout=.*more than 0"),
        ({"publish_timeout": "1"}, TypeError, "publish_timeout=.*seconds"),
        ({"history_age": 0}, ValueError, "history_age=.*at least 1"),
        ({"retry": -1}, ValueError, "retry=.*at least 0"),
        ({"retry": "3"}, TypeError, "retry=.*int"),
        ({"max_event_bytes": 0}, ValueError, "max_event_bytes=.*at least 1"),
        ({"max_event_bytes": True}, TypeError, "max_event_bytes=.*int"),
        ({"max_event_bytes": 1 << 63}, ValueError, "max_event_bytes=.*below"),
        ({"retry": 1 << 70}, ValueError, "retry=.*below"),
    ],
)
def test_a_bad_option_is_named_and_changes_nothing(fresh_options, given, error, says):
    before = options()
    with pytest.raises(error, match=says):
        configure(retry=given.pop("retry", 77), **given)
    assert options() == before


def test_a_bad_option_elsewhere_is_named_with_its_place(fresh_options, monkeypatch, settings_with):
    settings_with({"RETRI": 1})
    with pytest.raises(ValueError, match="no option 'RETRI'; did you mean 'RETRY'"):
        options()
    settings_with({"RETRY": None})
    with pytest.raises(TypeError, match=r"SSE_CHANNEL\['RETRY'\] in Django's settings"):
        options()
    settings_with([])
    with pytest.raises(TypeError, match="must be a dict"):
        options()
    settings_with({})
    monkeypatch.setenv("SSE_CHANNEL_RETRY", "soon")
    with pytest.raises(ValueError, match="SSE_CHANNEL_RETRY must be a whole number, not 'soon'"):
        options()
    monkeypatch.setenv("SSE_CHANNEL_RETRY", "5")
    monkeypatch.setenv("SSE_CHANNEL_BUS", "amqp://")
    with pytest.raises(ValueError, match="environment variable SSE_CHANNEL_BUS is 'amqp://'"):
        options()


def test_settings_configured_after_an_early_use_still_count(script):
    out = script(
        """
from sse_channel import sse_channel
with sse_channel.stream() as stream:
    print(next(stream).split()[1])
from django.conf import settings
with sse_channel.stream() as stream:
    print(next(stream).split()[1])
settings.configure(SSE_CHANNEL={"RETRY": 5})
with sse_channel.stream() as stream:
    print(next(stream).split()[1])
"""
    )
    assert out == "b'3000'\nb'3000'\nb'5'\n"


def test_every_public_method_of_the_extension_has_a_docstring_in_the_stub():
    import ast

    stub = ast.parse((ROOT / "python/sse_channel/_sse_channel.pyi").read_text())
    missing = [
        f"{each.name}.{method.name}"
        for each in ast.walk(stub)
        if isinstance(each, ast.ClassDef) and each.name in ("Client", "Queue", "Stream")
        for method in each.body
        if isinstance(method, ast.FunctionDef)
        and not ast.get_docstring(method)
        and method.name not in ("__new__", "__iter__")
    ]
    assert missing == []


@pytest.mark.parametrize("cls", ["Client", "Queue", "Stream"])
def test_help_says_what_the_stub_says(cls):
    import ast
    import inspect

    from sse_channel import _sse_channel

    stub = ast.parse((ROOT / "python/sse_channel/_sse_channel.pyi").read_text())
    (node,) = (each for each in stub.body if getattr(each, "name", "") == cls)
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
            continue
        runtime = inspect.getdoc(getattr(getattr(_sse_channel, cls), method.name))
        assert runtime == ast.get_docstring(method), method.name


def test_a_name_of_the_channel_looked_up_in_the_module_is_explained():
    with pytest.raises(AttributeError, match="from sse_channel import sse_channel"):
        sse_channel.publish  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        sse_channel.nonsense  # noqa: B018


def test_type_checkers_see_what_is_loaded_late_and_no_other_name(tmp_path):
    api = pytest.importorskip("mypy.api", reason="make lint installs mypy")
    code = tmp_path / "project.py"
    code.write_text("""
import sse_channel
from sse_channel import nonsense
from sse_channel.django import EventStreamView, everybody, metrics, monitor
from sse_channel.django import other_nonsense
reveal_type(EventStreamView())
reveal_type(everybody)
reveal_type(metrics)
reveal_type(monitor.urls)
sse_channel.publish
""")
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\ncheck_untyped_defs = true\n")
    out, _, _ = api.run(["--config-file", str(config), "--cache-dir", str(tmp_path), str(code)])
    told = [line.partition(": ")[2] for line in out.splitlines()[:-1]]
    revealed = [re.sub(r'.*Revealed type is "(.*)"', r"\1", line) for line in told if "Rev" in line]
    assert revealed[0] == "sse_channel.django.views.EventStreamView"
    assert len(revealed) == 4
    assert all(each.startswith("def (") for each in revealed[1:])
    assert [line for line in told if line.startswith("error")] == [
        'error: Module "sse_channel" has no attribute "nonsense"  [attr-defined]',
        'error: Module "sse_channel.django" has no attribute "other_nonsense"  [attr-defined]',
        'error: Module has no attribute "publish"  [attr-defined]',
    ]


def test_a_mistake_in_the_settings_is_told_at_the_start(script):
    out = script(
        """
from django.conf import settings
settings.configure(SSE_CHANNEL={"RETYR": 5})
try:
    import sse_channel.django
except ValueError as error:
    print(error)
"""
    )
    assert "has no option 'RETYR'; did you mean 'RETRY'? The options are BACKLOG_BYTES" in out


@pytest.mark.timeout(600)
def test_pip_install_works_in_a_clean_virtual_environment(tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYO3_PYTHON"}
    for command in (
        [python, "-m", "pip", "install", "--quiet", ROOT],
        [python, "-W", "error", "-c", "from sse_channel import sse_channel as c; "
         "q = c.listen(); c.publish('x'); assert q.get(timeout=1) == 'x'"],
    ):  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
    installed = list((tmp_path / "venv").glob("lib/python*/site-packages/sse_channel"))
    kept = {path.name for path in installed[0].iterdir() if path.suffix != ".py"}
    assert kept - {"__pycache__"} == {
        *("_sse_channel.abi3.so", "_sse_channel.pyi", "py.typed", "django", "testing")
    }
    assert script_files(installed[0] / "django") == SCRIPT_FILES


SCRIPT_FILES = {"shared-event-source.js", "shared-event-source.d.ts"}


def script_files(app):
    return {path.name for path in (app / "static" / "sse_channel").iterdir()}


def test_the_sdist_has_the_script_for_browsers(tmp_path):
    maturin = Path(sys.executable).with_name("maturin")
    if not maturin.exists():
        missing("maturin")
    subprocess.run(
        [maturin, "sdist", "--out", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=100,
    )
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (each for each in tmp_path.iterdir() if each.is_dir())
    assert script_files(unpacked / "python" / "sse_channel" / "django") == SCRIPT_FILES


def test_django_finds_the_script_for_browsers(script):
    out = script(
        """
import django
from django.conf import settings
settings.configure(INSTALLED_APPS=["sse_channel.django", "django.contrib.staticfiles"])
django.setup()
from django.contrib.staticfiles.finders import find
print(find("sse_channel/shared-event-source.js"))
"""
    )
    assert Path(out.strip()).read_text().startswith("/**")


def test_collectstatic_keeps_the_script_for_browsers_also_where_it_follows_modules(
    script, tmp_path
):
    (tmp_path / "storages.py").write_text(
        "from django.contrib.staticfiles.storage import ManifestStaticFilesStorage\n"
        "class Modules(ManifestStaticFilesStorage):\n"
        "    support_js_module_import_aggregation = True\n"
    )
    out = script(
        f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["sse_channel.django", "django.contrib.staticfiles"],
    STATIC_ROOT={str(tmp_path / "static")!r},
    STATIC_URL="/static/",
    STORAGES={{"staticfiles": {{"BACKEND": "storages.Modules"}}}},
)
django.setup()
from django.core.management import call_command
call_command("collectstatic", interactive=False, verbosity=0)
from django.contrib.staticfiles.storage import staticfiles_storage
print(staticfiles_storage.stored_name("sse_channel/shared-event-source.js"))
"""
    )
    source = ROOT / "python" / "sse_channel" / "django" / "static" / "sse_channel"
    collected = tmp_path / "static" / out.strip()
    assert collected.name != "shared-event-source.js", "it has a hash in its name"
    assert collected.read_bytes() == (source / "shared-event-source.js").read_bytes()
