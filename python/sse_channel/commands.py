"""Publishing to a channel and following one from a shell.

``python -m sse_channel publish|tail`` and Django's ``manage.py sse_publish|sse_tail`` are thin
layers over this.

| exit status | meaning                                                      |
| ----------- | ------------------------------------------------------------ |
| 0           | done: published, or as many events as `--count` asked for    |
| 1           | the bus cannot be used, or the stream ended; stderr says why |
| 2           | the arguments, the JSON or the configuration are wrong       |
| 130         | Ctrl-C                                                       |
| 141         | whoever read the output (`head`) wanted no more of it        |
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from . import _sse_channel
from .channel import SSEChannel
from .config import project
from .parser import EventStreamParser, ReceivedEvent

__all__ = ["Failure", "add_publish_arguments", "add_tail_arguments", "main", "publish", "tail"]

#: Prints one line and flushes it.
Print = Callable[[str], None]

INTERRUPTED = 130  # 128 + SIGINT, as a shell says it
NOBODY_READS = 141  # 128 + SIGPIPE

QUOTE = """quote it for the shell, as in '{"headline": "Rain by noon"}', or use --text for text"""

_RESETS = {
    "too-old": "history does not reach back so far; events before the following are missed",
    "future": "that id is newer than every event; going on with what is published from now on",
    "unknown": "that is no id of an event; going on with what is published from now on",
}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Failure(Exception):
    """Why a command ends without having done what it was asked for: one line for its user."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `publish`."""
    parser.add_argument("channel", metavar="CHANNEL", help='the channel\'s name, e.g. "default"')
    parser.add_argument(
        "message",
        metavar="JSON",
        help="""the message, such as '{"headline": "Rain by noon"}'; - reads standard input""",
    )
    parser.add_argument(
        "--text",
        action="store_true",
        help="send the argument as it is, not as JSON (standard input: without its last newline)",
    )
    parser.add_argument("--event", metavar="NAME", help="the event name that browsers dispatch")


def add_tail_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tail`."""
    parser.add_argument("channel", metavar="CHANNEL", help='the channel\'s name, e.g. "default"')
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per event: id, event (null without a name) and data",
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--last-event-id", metavar="ID", help="begin after this event, as far as history has it"
    )
    begin.add_argument(
        "--since",
        type=_age,
        metavar="AGE",
        help="begin with what history has of the last 30s, 10m, 2h or 1d",
    )
    parser.add_argument("--count", type=_count, metavar="N", help="end after N events")


def publish(options: argparse.Namespace, show: Print, say: Print) -> None:
    """Publish the message of `options` and show the event's id.

    Args:
        options: the arguments, as parsed.
        show: prints a line of the result.
        say: prints a line for the user, apart from the result.

    Raises:
        Failure: it was not published.
    """
    text = _read_input() if options.message == "-" else options.message
    if not isinstance(text, str):
        # Some versions of argparse take a second "--" for an argument without a value.
        raise Failure(f"not JSON: --; {QUOTE}", 2)
    if options.text:
        # A shell's `echo` ends what it writes so; the message does not.
        message: Any = text.removesuffix("\n") if options.message == "-" else text
    else:
        message = _parse(text)
    with _failures():
        event_id = SSEChannel(options.channel).publish(message, event=options.event)
    _warn(say, "which ends with this process: nobody has got this event")
    show(event_id)


def tail(options: argparse.Namespace, show: Print, say: Print) -> None:
    """Show the events of a channel as they come: until `--count`, or for ever.

    Args:
        options: the arguments, as parsed.
        show: prints a line of the result.
        say: prints a line for the user, apart from the result; among them ``listening on …``
            once no event is missed any more.

    Raises:
        Failure: the channel cannot be followed, or its stream ended.
        KeyboardInterrupt: Ctrl-C.
        BrokenPipeError: out of `show`.
    """
    line_of = _json_line if options.json else _human_line
    begin = options.last_event_id
    since = _parsed(options, "since", _age, (int, float), 0)
    count = _parsed(options, "count", _count, int, 1)
    if since is not None:
        if begin is not None:
            raise Failure("--since: not allowed with --last-event-id", 2)
        # An event id is a time in milliseconds and a counter.
        begin = f"{max(0, int((time.time() - since) * 1000))}-0"
    with _failures():
        stream = SSEChannel(options.channel).stream(last_event_id=begin, heartbeat=None)
    with stream:
        _warn(say, "which is this process's own: nothing that others publish arrives")
        say(f'listening on "{_visible(options.channel)}" (bus {_bus()})')
        parser = EventStreamParser()
        shown = dropped = 0
        for chunk in stream:
            for event in parser.feed(chunk):
                if event.type == _sse_channel.RESET_EVENT:
                    say(f"stream-reset: {_reason(event, options)}")
                    continue
                show(line_of(event))
                shown += 1
                if shown == count:
                    return
            if stream.dropped > dropped:
                say(f"{stream.dropped - dropped} events are missed: the output was too slow")
                dropped = stream.dropped
    raise Failure("the stream ended", 1)


def status_of(run: Callable[[], None]) -> int:
    """The exit status of a command that ends by itself, by Ctrl-C, or because nobody reads it.

    Raises:
        Failure: as the command.
    """
    try:
        run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes once more at its end, which must not fail a second time.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m sse_channel``; its exit status.

    With ``DJANGO_SETTINGS_MODULE`` in the environment and Django installed, the options, the bus
    and the JSON encoder are the project's; the local bus is the working directory's otherwise.

    Args:
        arguments: those after the program's name; None for the process's own.

    Raises:
        SystemExit: with 2 for wrong arguments, with 0 for ``--help`` and ``--version``.
    """
    parser = _Parser(
        prog="python -m sse_channel", description="Publish to channels and follow them."
    )
    parser.add_argument("--version", action="version", version=_sse_channel.__version__)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    summary = "publish a message and print its event id"
    adder = commands.add_parser("publish", help=summary, description=summary)
    add_publish_arguments(adder)
    summary = "print events as they come, one a line"
    adder = commands.add_parser("tail", help=summary, description=summary)
    add_tail_arguments(adder)
    options, rest = parser.parse_known_args(arguments)
    program = f"{parser.prog} {options.command}"
    if rest:
        hint = f"; {QUOTE}" if options.command == "publish" else ""
        parser.exit(2, f"{program}: unexpected arguments: {_visible(' '.join(rest))}{hint}\n")

    command = publish if options.command == "publish" else tail
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            # A terminal that cannot show a letter shows its number.
            output.reconfigure(errors="backslashreplace")
    if options.command == "tail" and options.json and isinstance(sys.stdout, io.TextIOWrapper):
        # RFC 8259, section 8.1: JSON that programs exchange is UTF-8.
        sys.stdout.reconfigure(encoding="utf-8")

    def run() -> None:
        _use_django()
        command(options, _show, _say)

    try:
        return status_of(run)
    except Failure as failure:
        _say(f"{program}: {failure}")
        return failure.status


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def _show(line: str) -> None:
    print(line, flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _use_django() -> None:
    """Have the project's settings loaded, if there is a project, for `config` to see them."""
    module = os.environ.get("DJANGO_SETTINGS_MODULE")
    if not module:
        return
    try:
        from django.conf import settings
    except ImportError:
        return
    try:
        getattr(settings, "SSE_CHANNEL", None)
    except Exception as error:
        raise Failure(
            f"the settings {module!r} of DJANGO_SETTINGS_MODULE cannot be loaded "
            f"({type(error).__name__}: {_one_line(error)}); run it where manage.py is, "
            "or unset the variable",
            2,
        ) from error


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """What a channel raises, as the `Failure` of a command."""
    try:
        yield
    except _sse_channel.BusError as error:
        raise Failure(_one_line(error), 1) from error
    except (TypeError, ValueError) as error:
        raise Failure(_one_line(error), 2) from error


def _warn(say: Print, alone: str) -> None:
    """Say what makes the bus of this process another one than its user may expect."""
    bus = _sse_channel.bus_url()
    if bus == "memory://":
        say(f"warning: the bus is memory://, {alone}; set BUS to local:// or redis://…")
    elif bus == "local://" and project().startswith("directory ") and os.path.exists("manage.py"):
        say(
            "warning: this is the bus of the directory, not of the project that manage.py is for; "
            "use manage.py, or set DJANGO_SETTINGS_MODULE"
        )


def _bus() -> str:
    """The bus, and of those with one name whose it is."""
    bus = str(_sse_channel.bus_url())
    return f"{bus} of {_visible(project())}" if bus == "local://" else bus


def _read_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise Failure(f"standard input is not UTF-8: {error}", 2) from None


def _parse(text: str) -> Any:
    try:
        return _strict(text)
    except (ValueError, RecursionError) as error:
        shown = _visible(text if len(text) <= 40 else f"{text[:39]}…")
        raise Failure(f"not JSON: {shown} ({error}); {QUOTE}", 2) from None


def _strict(text: str) -> Any:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"JSON has no {name}")

    return json.loads(text, parse_constant=refuse)


def _human_line(event: ReceivedEvent) -> str:
    parts = [event.last_event_id, event.data]
    if event.type != "message":
        parts.insert(1, event.type)
    return "  ".join(_visible(part) for part in parts)


def _json_line(event: ReceivedEvent) -> str:
    try:
        _strict(event.data)
        # As it was sent, so that no number changes; a line end can only be between its tokens.
        data = _inert(event.data.replace("\n", " ").strip())
    except (ValueError, RecursionError):
        data = _quoted(event.data)
    name = "null" if event.type == "message" else _quoted(event.type)
    return f'{{"id": {_quoted(event.last_event_id)}, "event": {name}, "data": {data}}}'


def _quoted(text: str) -> str:
    return _inert(json.dumps(text, ensure_ascii=False))


def _inert(line: str) -> str:
    """A line of JSON without what would steer a terminal, and with the same meaning.

    Control characters up to 0x1f are never in one; the others can only be within its strings.
    """
    return re.sub("[\x7f-\x9f\u2028\u2029]", lambda char: f"\\u{ord(char[0]):04x}", line)


def _visible(text: str) -> str:
    """`text` on one line, without what would steer a terminal."""
    return re.sub(
        "[\0-\x1f\x7f-\x9f\u2028\u2029]",
        lambda char: char[0].encode("unicode_escape").decode(),
        text,
    )


def _one_line(error: BaseException) -> str:
    return _visible(" ".join(str(error).split()))


def _reason(event: ReceivedEvent, options: argparse.Namespace) -> str:
    reason = ""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        reason = str(event.json()["reason"])
    if reason == "too-old" and options.since is not None:
        # Nothing need be missed: the channel may be younger.
        return "history begins later than that"
    return _RESETS.get(reason, "events are missed")


def _parsed(
    options: argparse.Namespace,
    name: str,
    parse: Callable[[str], Any],
    numbers: type | tuple[type, ...],
    least: int,
) -> Any:
    """An option's value: a program (`call_command`) gives it as a shell does, or as a number."""
    value: Any = getattr(options, name)
    if value is None:
        return None
    is_number = isinstance(value, numbers) and not isinstance(value, bool)
    if is_number and least <= value < 1 << 40:
        return value
    try:
        return parse(value if isinstance(value, str) else repr(value))
    except argparse.ArgumentTypeError as error:
        raise Failure(f"--{name}: {error}", 2) from None


def _age(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age such as 30s, 10m, 2h or 1d")
    return int(found[1]) * _SECONDS[found[2]]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
