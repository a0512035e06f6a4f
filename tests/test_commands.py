"""Publishing and following from a shell: `python -m sse_channel` and the management commands."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from buses import bus_of
from servers import EXAMPLE
from sse_channel import SSEChannel, _sse_channel
from sse_channel.commands import main
from sse_channel.django.management.commands import sse_publish, sse_tail

ID = r"[0-9]{13,}-[0-9]+"
COMMANDS = {
    "module": {"publish": ["-m", "sse_channel", "publish"], "tail": ["-m", "sse_channel", "tail"]},
    "django": {"publish": ["manage.py", "sse_publish"], "tail": ["manage.py", "sse_tail"]},
}
BY_SHELL = pytest.mark.parametrize("kind", COMMANDS)


@pytest.fixture
def bus() -> Iterator[str]:
    with bus_of("local") as bus:
        yield bus.url


class Shell:
    """Runs the commands of one kind as processes of their own, on one bus."""

    def __init__(self, kind: str, bus: str | None) -> None:
        self._commands = COMMANDS[kind]
        self.cwd = EXAMPLE
        self.environment = {name: os.environ[name] for name in os.environ if "SSE_" not in name}
        if bus is not None:
            self.environment["SSE_CHANNEL_BUS"] = bus

    def __call__(self, command: str, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        """Run a command to its end: its exit status, output and errors."""
        done = subprocess.run(
            [sys.executable, "-W", "error", *self._commands[command], *arguments],
            cwd=self.cwd,
            env=self.environment,
            input=stdin,
            capture_output=True,
            timeout=60,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def publish(self, *arguments: str, stdin: bytes = b"") -> str:
        """Publish, which must succeed, and return the event's id."""
        status, output, errors = self("publish", *arguments, stdin=stdin)
        assert (status, errors) == (0, "")
        assert re.fullmatch(f"{ID}\n", output), output
        return output.strip()

    @contextmanager
    def tail(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A command that listens, killed at the end if it still runs."""
        process = subprocess.Popen(
            [sys.executable, "-W", "error", *self._commands["tail"], *arguments],
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        with process:
            try:
                line = process.stderr.readline()
                assert line.startswith('listening on "'), line + process.stderr.read()
                yield process
            finally:
                process.kill()


@pytest.fixture
def shell(kind: str, bus: str) -> Shell:
    return Shell(kind, bus)


@BY_SHELL
def test_what_one_shell_publishes_another_prints(shell: Shell, kind: str) -> None:
    other = Shell("module" if kind == "django" else "django", shell.environment["SSE_CHANNEL_BUS"])
    with shell.tail("news", "--count", "5") as tail:
        ids = [
            shell.publish("news", '{"headline": "Gdańsk", "n": 1.50}'),
            shell.publish("news", "--text", "no\x1b[31m JSON", "--event", "ticker"),
            other.publish("news", "-", stdin=b'["two",\n "lines"]'),
            other.publish("news", "--text", "-", stdin=b"two\nlines\n"),
            other.publish("other channel", "1"),
            shell.publish("news", "-5"),
        ]
        lines = [tail.stdout.readline() for _ in range(5)]
        assert tail.wait(30) == 0
        assert tail.stderr.read() == ""
    assert lines == [
        f'{ids[0]}  {{"headline":"Gdańsk","n":1.5}}\n',
        f"{ids[1]}  ticker  no\\x1b[31m JSON\n",
        f'{ids[2]}  ["two","lines"]\n',
        f"{ids[3]}  two\\nlines\n",
        f"{ids[5]}  -5\n",
    ]


@BY_SHELL
def test_json_lines_carry_the_data_as_it_was_sent(shell: Shell, kind: str) -> None:
    if kind == "module":
        # JSON is UTF-8 wherever it is written.
        shell.environment["PYTHONIOENCODING"] = "latin-1"
    sent = [
        '{"price": 1.10, "big": 12345678901234567890123, "łódź": "\\ud83c\\udf89"}',
        "no JSON \u2028 NaN",
        "NaN",
        '"text"\n',
        '{"in":\n"lines"}',
    ]
    publish = "import sys; from sse_channel import SSEChannel\n" + "".join(
        f"SSEChannel('news').publish({text!r}, event={'ticker' if n else None!r})\n"
        for n, text in enumerate(sent)
    )
    with shell.tail("news", "--json", "--count", str(len(sent))) as tail:
        subprocess.run([sys.executable, "-c", publish], env=shell.environment, check=True)
        # Not splitlines, which knows more ends of lines than JSON.
        *lines, rest = tail.stdout.read().split("\n")
        assert (tail.wait(30), rest) == (0, "")
    objects = [json.loads(line) for line in lines]
    assert [[*each] for each in objects] == [["id", "event", "data"]] * len(sent)
    assert [each["event"] for each in objects] == [None] + ["ticker"] * 4
    assert all(re.fullmatch(ID, each["id"]) for each in objects)
    assert [each["data"] for each in objects] == [
        json.loads(sent[0]),
        sent[1],
        "NaN",
        "text",
        {"in": "lines"},
    ]
    assert lines[0].endswith(f'"data": {sent[0]}}}')


@BY_SHELL
def test_tail_goes_on_after_an_event_and_since_a_time(shell: Shell) -> None:
    ids = [shell.publish("news", str(n)) for n in range(3)]
    status, output, _ = shell("tail", "news", "--last-event-id", ids[0], "--count", "2")
    assert (status, output) == (0, f"{ids[1]}  1\n{ids[2]}  2\n")
    status, output, errors = shell("tail", "news", "--since", "10m", "--count", "3")
    assert (status, output) == (0, "".join(f"{id_}  {n}\n" for n, id_ in enumerate(ids)))
    assert errors.endswith("\nstream-reset: history begins later than that\n")


def test_tail_says_when_events_are_missed(bus: str) -> None:
    shell = Shell("module", bus)
    event_id = shell.publish("news", "1")
    with shell.tail("news", "--last-event-id", "rubbish", "--count", "1") as tail:
        assert "stream-reset: that is no id" in tail.stderr.readline()
        shell.publish("news", "2")
        assert tail.stdout.readline().endswith("  2\n")
    with shell.tail("news", "--last-event-id", "1-1", "--count", "1") as tail:
        assert "stream-reset: history does not reach" in tail.stderr.readline()
        assert tail.stdout.readline() == f"{event_id}  1\n"


@BY_SHELL
def test_ctrl_c_ends_tail_without_a_word(shell: Shell) -> None:
    with shell.tail("news") as tail:
        shell.publish("news", "1")
        assert tail.stdout.readline().endswith("  1\n")
        tail.send_signal(signal.SIGINT)
        assert tail.wait(30) == 130
        assert (tail.stdout.read(), tail.stderr.read()) == ("", "")


@BY_SHELL
def test_tail_ends_quietly_when_nobody_reads_it(shell: Shell) -> None:
    with shell.tail("news") as tail:
        tail.stdout.close()
        shell.publish("news", "1")
        assert tail.wait(30) == 141
        assert tail.stderr.read() == ""


@BY_SHELL
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["news", "{headline: 1}"], """not JSON: {headline: 1} .*quote.*'{"headline": "Rain"""),
        (["news", "NaN"], "not JSON: NaN"),
        (["news", '{"n": 1e999}'], "NaN and infinities"),
        (["news", "[" * 100_000], "not JSON: "),
        (["", "1"], "name must have 1 to 255 bytes"),
        (["news", "1", "--event", "error"], "the browser's own"),
        (["news", "--text", b"\xff"], "cannot"),
    ],
)
def test_a_message_that_cannot_be_sent_is_one_line_and_status_2(
    shell: Shell, arguments: list[str], says: str
) -> None:
    status, output, errors = shell("publish", *arguments)
    assert (status, output) == (2, "")
    assert re.search(says, errors), errors
    assert errors.count("\n") == 1
    assert len(errors) < 400


def test_arguments_that_a_shell_has_torn_apart_are_told_to_be_quoted() -> None:
    assert told("publish", "news", "{headline:", "1}") == (
        2,
        "python -m sse_channel publish: unexpected arguments: 1}; quote it for the shell, as in "
        """'{"headline": "Rain by noon"}', or use --text for text\n""",
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["send"], "invalid choice: 'send'"),
        (["publish", "news"], "JSON"),
        (["publish", "news", "1", "--loud"], "unexpected arguments: --loud"),
        (["tail"], "CHANNEL"),
        (["tail", "news", "--count", "0"], "'0' is not a whole number from 1 on"),
        (["tail", "news", "--since", "yesterday"], "'yesterday' is not an age such as 30s"),
        (["tail", "news", "--since", "1m", "--last-event-id", "1-0"], "not allowed with"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(arguments: list[str], says: str) -> None:
    status, errors = told(*arguments)
    assert status == 2
    assert says in errors
    assert errors.startswith("python -m sse_channel")
    assert errors.count("\n") == 1


def told(*arguments: str) -> tuple[int, str]:
    """The exit status and the errors of wrong arguments."""
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code, errors.getvalue()


@BY_SHELL
@pytest.mark.parametrize("command", ["publish", "tail"])
def test_a_bus_that_cannot_be_used_is_one_line_and_status_1(kind: str, command: str) -> None:
    shell = Shell(kind, "local:///proc/no/such/place")
    status, output, errors = shell(command, "news", *(["1"] if command == "publish" else []))
    assert (status, output) == (1, "")
    assert "/proc/no/such/place" in errors
    assert errors.count("\n") == 1


def test_a_bus_url_that_is_none_is_one_line_and_status_2() -> None:
    status, _, errors = Shell("module", "amqp://host")("tail", "news")
    assert status == 2
    assert "SSE_CHANNEL_BUS is 'amqp://host'" in errors
    assert errors.count("\n") == 1


@BY_SHELL
def test_a_bus_that_nobody_else_hears_is_warned_of(kind: str) -> None:
    shell = Shell(kind, "memory://")
    status, output, errors = shell("publish", "news", "1")
    assert status == 0
    assert re.fullmatch(f"{ID}\n", output)
    assert errors.startswith("warning: the bus is memory://")
    process = subprocess.Popen(
        [sys.executable, *COMMANDS[kind]["tail"], "news"],
        cwd=shell.cwd,
        env=shell.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr.readline().startswith("warning: the bus is memory://")
        assert process.stderr.readline() == 'listening on "news" (bus memory://)\n'
        process.kill()


def test_a_directorys_bus_is_named_and_that_a_project_there_has_another(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not that bus itself: it would lie where those of the machine's projects do.
    monkeypatch.setattr(_sse_channel, "bus_url", lambda: "local://")
    monkeypatch.chdir(tmp_path)
    begin = SSEChannel(name).publish("begin")

    def says(*arguments: str) -> str:
        errors = io.StringIO()
        with redirect_stdout(io.StringIO()), redirect_stderr(errors):
            assert main(arguments) == 0
        return errors.getvalue()

    assert says("publish", name, "1") == ""
    tail = ("tail", name, "--last-event-id", begin, "--count", "1")
    listening = f'listening on "{name}" (bus local:// of directory {tmp_path})\n'
    assert says(*tail) == listening
    (tmp_path / "manage.py").touch()
    warning = (
        "warning: this is the bus of the directory, not of the project that manage.py is for; "
        "use manage.py, or set DJANGO_SETTINGS_MODULE\n"
    )
    assert says("publish", name, "1") == warning
    assert says(*tail) == warning + listening


# --- With and without Django ----------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, bus: str) -> Path:
    """A Django project whose settings name the bus."""
    settings = f"SSE_CHANNEL = {{'BUS': {bus!r}}}\nINSTALLED_APPS = ['sse_channel.django']\n"
    (tmp_path / "mysettings.py").write_text(settings + "SECRET_KEY = 'only for tests'\n")
    return tmp_path


def test_the_module_uses_the_settings_of_the_project(project: Path, bus: str) -> None:
    shell, by_environment = Shell("module", None), Shell("module", bus)
    shell.cwd = project
    shell.environment["DJANGO_SETTINGS_MODULE"] = "mysettings"
    with by_environment.tail("news", "--count", "1") as tail:
        event_id = shell.publish("news", "1")
        assert tail.stdout.readline() == f"{event_id}  1\n"


def test_settings_that_cannot_be_loaded_are_named(project: Path) -> None:
    shell = Shell("module", None)
    shell.cwd = project
    shell.environment["DJANGO_SETTINGS_MODULE"] = "theirsettings"
    status, output, errors = shell("publish", "news", "1")
    assert (status, output) == (2, "")
    assert "'theirsettings' of DJANGO_SETTINGS_MODULE cannot be loaded" in errors
    assert errors.count("\n") == 1


def test_without_django_the_settings_variable_means_nothing(project: Path, bus: str) -> None:
    (project / "django.py").write_text("raise ImportError('none here')\n")
    shell = Shell("module", bus)
    shell.cwd = project
    shell.environment["DJANGO_SETTINGS_MODULE"] = "theirsettings"
    shell.publish("news", "1")


def test_the_commands_are_found_where_the_app_is_installed(project: Path) -> None:
    shell = Shell("module", None)
    shell.environment["DJANGO_SETTINGS_MODULE"] = "mysettings"
    done = subprocess.run(
        [sys.executable, "-m", "django", "help", "--commands"],
        cwd=project,
        env={**shell.environment, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"sse_publish", "sse_tail"} <= set(done.stdout.split())


def test_the_commands_can_be_called_by_a_program(channel: SSEChannel) -> None:
    output, errors = io.StringIO(), io.StringIO()
    begin = channel.publish({"n": 1})
    for n in (2, 3):
        call_command(
            sse_publish.Command(), channel.name, f'{{"n": {n}}}', stdout=output, stderr=errors
        )
    ids = output.getvalue().split()
    output = io.StringIO()
    call_command(
        sse_tail.Command(),
        channel.name,
        last_event_id=begin,
        count=2,
        stdout=output,
        stderr=errors,
    )
    assert output.getvalue() == "".join(
        f'{id_}  {{"n":{n}}}\n' for id_, n in zip(ids, (2, 3), strict=True)
    )
    assert f'listening on "{channel.name}"' in errors.getvalue()
    with pytest.raises(CommandError, match="not JSON"):
        call_command(sse_publish.Command(), channel.name, "{n: 1}")


def test_a_program_gives_options_as_a_shell_does_or_as_numbers(channel: SSEChannel) -> None:
    channel.publish("x")

    def tail(**options: object) -> str:
        output = io.StringIO()
        call_command(
            sse_tail.Command(), channel.name, **options, stdout=output, stderr=io.StringIO()
        )
        return output.getvalue()

    for since in ("10m", 600, 600.5):
        for count in ("1", 1):
            assert tail(since=since, count=count).endswith("  x\n")
    for options, says in [
        ({"since": "10"}, "--since: '10' is not an age"),
        ({"since": -1}, "--since: '-1' is not an age"),
        ({"since": float("inf")}, "--since: 'inf' is not an age"),
        ({"since": True}, "--since: 'True' is not an age"),
        ({"since": ["10m"]}, r"--since: .* is not an age"),
        ({"since": "10m", "last_event_id": "1-0"}, "not allowed with --last-event-id"),
        ({"count": "none"}, "--count: 'none' is not a whole number"),
        ({"count": 0}, "--count: '0' is not a whole number"),
        ({"count": 1.5}, r"--count: '1\.5' is not a whole number"),
        ({"last_event_id": 5}, "last_event_id must be a str"),
    ]:
        with pytest.raises(CommandError, match=says) as raised:
            tail(**options)
        assert raised.value.returncode == 2


def test_events_lost_to_a_slow_output_are_told(name: str) -> None:
    channel = SSEChannel(name)

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            # While the first line is written, more is published than waits for one client.
            if not self.getvalue():
                for n in range(1500):
                    channel.publish(n)
            return super().write(text)

    begin = channel.publish("begin")
    channel.publish("first")
    output, errors = Slow(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        assert main(["tail", name, "--last-event-id", begin, "--count", "1000"]) == 0
    # 1000 wait: the one that was replayed has been taken.
    assert "\n500 events are missed: the output was too slow\n" in errors.getvalue()
