"""The compatibility matrix: one wheel, and a slice of the tests in an environment for each cell.

    python scripts/matrix.py                     # all cells
    python scripts/matrix.py --quick             # the oldest and the newest, in short
    python scripts/matrix.py --python 3.13 --django 6.0
    python scripts/matrix.py gevent              # cells whose name contains the text

It needs maturin beside its own Python, pip 25.1 or newer in it, and Rust's cargo. What it makes is
under .matrix: the wheel, the environments (used again by the next run), the logs and report.md.
The exit status is 0 when no cell failed and at least one passed, else 1; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".matrix"
CELL_WITHIN = 900  # seconds for the tests of a cell
ENDS_WITHIN = 60  # seconds for tests that are interrupted to stop their servers

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Each release that is supported, with the oldest Python that it runs on.
DJANGOS = {"5.2": "3.10", "6.0": "3.12", "6.1": "3.12"}
# The newest Python that the oldest gevent has a wheel for; the Django that all Pythons have.
BASE = ("3.12", "5.2")
OLDEST_GUNICORN = "gunicorn==23.0.0"  # the newest one of November 2024
OLDEST_GEVENT = "gevent==24.2.1"  # the oldest one that the extra `gevent` takes

# --- What is tested ---------------------------------------------------------------------------

_SERVERS = "tests/test_offload_servers.py::"
_OFFLOAD = (
    f"{_SERVERS}test_200_streams_get_each_article_once_in_one_order",
    f"{_SERVERS}test_the_head_is_the_servers_with_all_that_middleware_made_of_it",
    f"{_SERVERS}test_at_sigterm_streams_are_told_when_to_come_back_and_ended",
)
_KEPT = f"{_SERVERS}test_a_server_that_is_not_known_keeps_its_streams"
_REDIS = (
    "tests/test_redis.py::test_an_event_reaches_every_process_as_it_was",
    "tests/test_redis.py::test_a_client_resumes_in_another_process",
    "tests/test_redis.py::test_gevents_hub_runs_while_a_publish_waits",
)
QUICK = (
    "tests/test_queue.py",
    "tests/test_asyncio.py",
    "tests/test_greenlets.py",
    "tests/test_django.py",
    *_OFFLOAD[1:],
    *_REDIS,
)
# What a Python or a Django can break.
CORE = (
    *("tests/test_queue.py", "tests/test_channel.py", "tests/test_stream.py"),
    *("tests/test_asyncio.py", "tests/test_bus_asyncio.py", "tests/test_greenlets.py"),
    *("tests/test_django.py", "tests/test_asgi.py", "tests/test_commands.py"),
    *("tests/test_commit.py", "tests/test_checks.py", "tests/test_prometheus.py"),
    "tests/test_news_example.py",
    *_OFFLOAD,
    _KEPT,
    *_REDIS,
)
# What a server's release can break.
SERVERS = (
    *_OFFLOAD,
    f"{_SERVERS}test_http_1_0_gets_the_frames_as_they_are",
    f"{_SERVERS}test_the_request_is_logged_and_over_while_the_stream_goes_on",
    f"{_SERVERS}test_a_client_that_leaves_is_noticed_without_a_word_to_it",
    f"{_SERVERS}test_streams_end_when_the_stop_begins_and_not_when_other_requests_end",
    f"{_SERVERS}test_uvicorn_ends_streams_however_it_comes_to_stop",
    f"{_SERVERS}test_one_client_more_than_allowed_is_told_to_come_later",
    "tests/test_servers.py::test_ordinary_requests_are_answered_beside_200_streams",
    "tests/test_servers.py::test_a_client_that_comes_back_gets_what_it_missed_and_goes_on",
    "tests/test_clients.py::test_signals_are_sent_for_the_streams_of_a_server",
)
WORKERS = (
    "tests/test_workers.py::test_streams_of_all_workers_get_what_all_workers_publish",
    "tests/test_workers.py::test_a_reload_loses_nothing",
    f"{_SERVERS}test_hooks_of_gunicorn_are_called_as_ever",
    f"{_SERVERS}test_a_stream_that_holds_a_sync_worker_ends_when_the_stop_begins",
)
GEVENT = (
    "tests/test_greenlets.py",
    "tests/test_news_example.py::test_the_generator_under_gevent",
    "tests/test_clients.py::test_hooks_are_told_under_gevent",
    "tests/test_redis.py::test_gevents_hub_runs_while_a_publish_waits",
    *SERVERS,
    *WORKERS[:2],
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination: an interpreter, requirements, and the tests that must pass with them."""

    name: str
    python: str
    django: str
    tests: tuple[str, ...]
    keyword: str = ""  # pytest's -k
    pins: tuple[str, ...] = ()
    is_quick: bool = False

    @property
    def slug(self) -> str:
        """Its name as that of a file."""
        return re.sub(r"[^\w.]+", "-", self.name).strip("-")

    @property
    def constraints(self) -> tuple[str, ...]:
        return (f"Django=={self.django}.*", *self.pins)

    @property
    def environment(self) -> Path:
        """The directory of its environment; cells with the same requirements share one."""
        parts = [f"python{self.python}", f"django{self.django}", *self.pins]
        return WORK / "environments" / "-".join(parts).replace("==", "")


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def cells() -> list[Cell]:
    """The whole matrix: Python and Django in full, servers, gevent and Redis one at a time."""
    newest = (PYTHONS[-1], list(DJANGOS)[-1])
    found = [
        Cell(
            f"Python {python}, Django {django}",
            *(python, django, CORE),
            is_quick=(python, django) == newest,
        )
        for python in PYTHONS
        for django, oldest in DJANGOS.items()
        if number(python) >= number(oldest)
    ]
    found.append(
        Cell(
            "the oldest of all",
            *(PYTHONS[0], next(iter(DJANGOS)), CORE),
            # The ASGI worker came with gunicorn 24.
            keyword="not gunicorn-asgi",
            pins=(OLDEST_GUNICORN, OLDEST_GEVENT),
            is_quick=True,
        )
    )
    workers = "(gunicorn and not gunicorn-asgi) or holds_a_sync_worker"
    greenlets = "gunicorn-gevent or test_greenlets or under_gevent or gevents_hub"
    found += [
        Cell("gunicorn, current", *BASE, (*SERVERS, *WORKERS), workers),
        Cell("gunicorn, oldest", *BASE, (*SERVERS, *WORKERS), workers, (OLDEST_GUNICORN,)),
        Cell("gevent, current", *BASE, GEVENT, greenlets),
        Cell("gevent, oldest", *BASE, GEVENT, greenlets, (OLDEST_GEVENT,)),
        Cell("uvicorn", *BASE, SERVERS, "uvicorn and not gunicorn-uvicorn"),
        Cell("daphne", *BASE, (_KEPT,), "daphne"),
        Cell("hypercorn", *BASE, (_KEPT,), "hypercorn"),
        Cell("gunicorn, ASGI worker", *BASE, (_KEPT,), "gunicorn-asgi"),
        Cell("Redis, sharded Pub/Sub", *BASE, ("tests/test_redis.py",), "sharded"),
        Cell("Redis, plain Pub/Sub", *BASE, ("tests/test_redis.py",), "plain"),
    ]
    return found


# --- What came of it --------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What became of a cell. `why` says what is missing, or went wrong before its tests ran."""

    cell: Cell
    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)  # by their reason
    seconds: float = 0.0  # of the tests alone
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    why: str = ""
    is_absent: bool = False  # nothing ran, for want of what the machine does not have
    log: Path | None = None

    @property
    def outcome(self) -> str:
        """``passed``, ``failed`` or ``skipped``."""
        if self.failed or (self.why and not self.is_absent):
            return "failed"
        return "passed" if self.passed else "skipped"

    @property
    def figures(self) -> str:
        if self.why:
            return f"{self.outcome}: {self.why}"
        figures = f"{self.passed} passed, {self.failed} failed, {self.skipped.total()} skipped"
        return f"{figures} in {self.seconds:.0f} s"


SHOWN = ("Django", "gunicorn", "gevent", "uvicorn", "daphne", "Hypercorn")
HEAD = ("cell", "Python", *SHOWN, "passed", "failed", "skipped", "s")


def table(results: Iterable[Result]) -> str:
    """A Markdown table that can be read on a terminal as well."""
    rows: list[tuple[str, ...]] = [HEAD]
    for result in results:
        ran = "" if result.why else f"{result.seconds:.0f}"
        rows.append(
            (
                result.cell.name,
                *(result.versions.get(name, "-") for name in ("Python", *SHOWN)),
                *(str(result.passed), str(result.failed), str(result.skipped.total()), ran),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    first_number = len(HEAD) - 4
    marks = [
        "-" * (width - 1) + ":" if column >= first_number else "-" * width
        for column, width in enumerate(widths)
    ]
    lines = [
        [
            cell.rjust(width) if column >= first_number else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], marks, *lines[1:]])


def report(results: Sequence[Result], conditions: str) -> str:
    """The table, the conditions, what was skipped and why, and where the logs of failures are."""
    parts = [table(results), conditions]
    notes = []
    for result in results:
        if result.outcome == "failed":
            what = result.why or f"{result.failed} of its tests failed"
            log = f"; see {result.log.relative_to(ROOT)}" if result.log else ""
            notes.append(f"- Failed: {result.cell.name}: {what}{log}")
        elif result.why:
            notes.append(f"- Skipped: {result.cell.name}: {result.why}")
        for reason, count in result.skipped.items():
            tests = "1 test" if count == 1 else f"{count} tests"
            notes.append(f"- Skipped: {tests} of {result.cell.name}: {reason}")
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts) + "\n"


def read_junit(path: Path, result: Result) -> None:
    """Count what pytest reported in `path`; a test that is skipped counts by its reason."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed += 1
        elif skipped is not None:
            result.skipped[skipped.get("message") or "no reason given"] += 1
        else:
            result.passed += 1


def conditions(wheel: Path) -> str:
    """Where and on what the figures were made, in words."""
    model = ""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = f" ({found[1]})" if found else ""
    except OSError:
        pass  # Not Linux.
    commit = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "no commit"
    if output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    redis = re.search(r"v=([\d.]+)", output("redis-server", "--version"))
    return (
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, commit {commit}, {wheel.name}; "
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores{model}; "
        f"{'Redis ' + redis[1] if redis else 'no Redis'}."
    )


def output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


# --- How it is done ---------------------------------------------------------------------------


class Failure(Exception):
    """A step failed; the text is for the user."""


def interpreter(version: str) -> str | None:
    """The path of Python `version`: the one on the PATH, or the newest that pyenv has."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    patches = [path for path in root.glob(f"versions/{version}.*") if path.name[-1].isdigit()]
    patches.sort(key=lambda path: number(path.name), reverse=True)
    candidates = [shutil.which(f"python{version}"), *(str(p / "bin" / "python") for p in patches)]
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        # A shim of pyenv is on the PATH for versions, too, that are not active.
        if candidate and output(candidate, "-c", ask) == version:
            return candidate
    return None


def how_to_get(version: str) -> str:
    return f"Python {version} is missing; `pyenv install {version}` brings it"


def run(command: Sequence[str | Path], log: IO[bytes], *, within: float = 600) -> int:
    """Run a command to its end, with its output in `log`, and return its exit status.

    After `within` seconds, and at Ctrl-C, it is interrupted, so that tests stop their servers; in
    the first case `Failure` is raised.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        # Each could bring another interpreter's packages, or other tests, into the cell.
        if name not in ("PYTHONPATH", "PYTHONHOME", "PYTEST_ADDOPTS", "VIRTUAL_ENV", "PYO3_PYTHON")
    }
    log.write(f"$ {' '.join(map(str, command))}\n".encode())
    log.flush()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(within)
    except subprocess.TimeoutExpired:
        raise Failure(f"it did not end within {within:g} s") from None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def build() -> Path:
    """Build the wheel, and return its path."""
    directory, path = WORK / "wheel", WORK / "logs" / "build.txt"
    maturin = Path(sys.executable).with_name("maturin")
    if not maturin.exists():
        raise Failure("maturin is missing: start this with `make matrix`, which installs it")
    if shutil.which("cargo") is None:
        raise Failure("Rust's cargo, which builds the wheel, is not on the PATH: see rustup.rs")
    shutil.rmtree(directory, ignore_errors=True)
    with path.open("wb") as log:
        options = ("--release", "--locked", "--out", directory, "--interpreter", sys.executable)
        if run([maturin, "build", *options], log, within=1800):
            raise Failure(f"the wheel could not be built; see {path.relative_to(ROOT)}")
    (wheel,) = directory.glob("*.whl")
    return wheel


def install(cell: Cell, python: str, wheel: Path, log: IO[bytes]) -> Path:
    """Make the environment of `cell`, or bring it up to date; the path of its interpreter."""
    inside = cell.environment / "bin" / "python"
    stamp = cell.environment / "installed.txt"
    # What was asked for, so that an environment is made anew when that changes.
    wanted = "\n".join((python, *cell.constraints, groups()))
    if not (stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(cell.environment, ignore_errors=True)
        # Debian keeps `ensurepip` in a package of its own: pip is the caller's.
        if run([python, "-m", "venv", "--without-pip", cell.environment], log):
            raise Failure(f"{python} could not make a virtual environment")
        constraints = cell.environment / "constraints.txt"
        constraints.write_text("\n".join(cell.constraints) + "\n")
        options = ("--only-binary", "gevent", "--constraint", constraints, "--group", "matrix")
        if run([*pip(inside), "install", "--quiet", *options], log):
            raise Failure("its requirements could not be installed")
        stamp.write_text(wanted)
    # The version does not change with the code.
    if run([*pip(inside), "install", "--quiet", "--force-reinstall", "--no-deps", wheel], log):
        raise Failure("the wheel could not be installed")
    return inside


def groups() -> str:
    """The dependency groups, as pyproject.toml has them."""
    text = (ROOT / "pyproject.toml").read_text()
    return text.partition("[dependency-groups]\n")[2].partition("\n[")[0]


def pip(inside: Path) -> list[str | Path]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", inside]


VERSIONS = """
import importlib.metadata, json, platform, sys, sse_channel
versions = {each.name: each.version for each in importlib.metadata.distributions()}
print(json.dumps([sse_channel.__file__, {**versions, "Python": platform.python_version()}]))
"""


def look_into(cell: Cell, inside: Path) -> dict[str, str]:
    """The versions that are installed, once it is sure that the wheel is what is imported."""
    try:
        path, versions = json.loads(output(str(inside), "-W", "error", "-c", VERSIONS))
    except ValueError:
        raise Failure("sse_channel cannot be imported") from None
    if not Path(path).is_relative_to(cell.environment):
        raise Failure(f"sse_channel is imported from {path}, not from the wheel")
    return dict(versions)


def test(cell: Cell, wheel: Path, *, is_quick: bool) -> Result:
    """Install what `cell` is made of, and run its tests."""
    result = Result(cell)
    python = interpreter(cell.python)
    if python is None:
        # CI has to provide all of them.
        result.is_absent = not os.environ.get("CI")
        result.why = how_to_get(cell.python)
        return result
    result.log = WORK / "logs" / f"{cell.slug}.txt"
    junit = result.log.with_suffix(".xml")
    junit.unlink(missing_ok=True)
    with result.log.open("wb") as log:
        try:
            inside = install(cell, python, wheel, log)
            result.versions = look_into(cell, inside)
            begun = time.monotonic()
            options = [f"--junitxml={junit}", "--tb=short", "-q", "-p", "no:cacheprovider"]
            if cell.keyword:
                options += ["-k", cell.keyword]
            tests = QUICK if is_quick else cell.tests
            status = run([inside, "-m", "pytest", *options, *tests], log, within=CELL_WITHIN)
            result.seconds = time.monotonic() - begun
        except Failure as failure:
            result.why = str(failure)
            return result
    if junit.exists():
        read_junit(junit, result)
    if status and not result.failed:
        result.why = f"pytest ended with status {status}"
    return result


def chosen(arguments: argparse.Namespace) -> list[Cell]:
    return [
        cell
        for cell in cells()
        if (not arguments.quick or cell.is_quick)
        and arguments.python in (None, cell.python)
        and arguments.django in (None, cell.django)
        and all(text.lower() in cell.name.lower() for text in arguments.text)
    ]


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="matrix.py", description="Test one wheel with each combination of versions."
    )
    parser.add_argument("text", nargs="*", help="only cells whose name contains all of these")
    parser.add_argument("--python", choices=PYTHONS, help="only cells with this Python")
    parser.add_argument("--django", choices=list(DJANGOS), help="only cells with this Django")
    parser.add_argument(
        "--quick", action="store_true", help="the newest and the oldest, with fewer tests"
    )
    parser.add_argument("--list", action="store_true", help="name the cells, and do nothing")
    parser.add_argument("--fresh", action="store_true", help="make the environments anew")
    parser.add_argument("--wheel", type=Path, help="test this wheel instead of building one")
    parser.add_argument(
        "--report", type=Path, help="write the report there, too, beside .matrix/report.md"
    )
    arguments = parser.parse_args(words)
    if arguments.wheel is not None and not arguments.wheel.is_file():
        parser.error(f"--wheel: there is no file {arguments.wheel}")
    if not chosen(arguments):
        parser.error("no cell is chosen by all of that: --list names them")
    return arguments


def results_of(some: Sequence[Cell], wheel: Path, *, is_quick: bool) -> Iterator[Result]:
    """One cell after the other, told on the terminal."""
    width = max(len(cell.name) for cell in some)
    for count, cell in enumerate(some, 1):
        print(f"[{count}/{len(some)}] {cell.name.ljust(width)}  ", end="", flush=True)
        result = test(cell, wheel, is_quick=is_quick)
        print(result.figures, flush=True)
        yield result


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    some = chosen(arguments)
    if arguments.list:
        print("\n".join(cell.name for cell in some))
        return 0
    (WORK / "logs").mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        for cell in some:
            shutil.rmtree(cell.environment, ignore_errors=True)
    try:
        wheel = arguments.wheel.resolve() if arguments.wheel else build()
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    where = conditions(wheel)
    results: list[Result] = []
    try:
        for result in results_of(some, wheel, is_quick=arguments.quick):
            results.append(result)
    except KeyboardInterrupt:
        print("interrupted")
    text = report(results, where)
    for path in filter(None, (WORK / "report.md", arguments.report)):
        path.write_text(text)
    outcomes = Counter(result.outcome for result in results)
    print(f"\n{text}")
    counts = (f"{outcomes[name]} {name}" for name in ("passed", "failed", "skipped"))
    print(f"cells: {', '.join(counts)}")
    is_complete = len(results) == len(some)
    return 0 if is_complete and outcomes["passed"] and not outcomes["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
