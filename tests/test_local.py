"""`local://`: every process of one user and project on this host."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from parts import missing, small_file_system
from processes import Process, publish_as

PATIENCE = 60.0


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for a store, whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="sse-", dir="/tmp") as path:
        yield Path(path) / "bus"


@pytest.fixture
def process(directory: Path) -> Iterator[Callable[..., Process]]:
    """Start processes on the bus in `directory`."""
    with contextlib.ExitStack() as stack:

        def start(begin: str = "c = SSEChannel('news')", **options: object) -> Process:
            return stack.enter_context(Process(f"local://{directory}", begin, **options))

        yield start


LISTEN = "c = SSEChannel('news'); q = c.listen()"


def taken(reader: Process, count: int) -> list:
    return eval(reader(f"[q.get(timeout=60) for _ in range({count})]"))


# --- From process to process ---------------------------------------------------------------


def test_a_publish_reaches_the_clients_of_every_process(process):
    readers = [process(LISTEN) for _ in range(3)]
    publisher = process()
    event_id = eval(publisher("c.publish({'headline': 'Rain'})"))
    for reader in readers:
        assert reader("q.get(timeout=60)") == "{'headline': 'Rain'}"
    assert eval(readers[0]("c.publish('from a reader')")) > event_id
    for reader in readers:
        assert reader("q.get(timeout=60)") == "'from a reader'"
        assert reader("q.qsize()") == "0"


def test_all_processes_see_one_order(process):
    readers = [process("c = SSEChannel('news', capacity=10_000); q = c.listen()") for _ in range(3)]
    loop = "[c.publish([{}, n]) for n in range(200)][-1]"
    publishers = [process() for _ in range(2)] + readers
    for number, publisher in enumerate(publishers):
        publisher.send(loop.format(number))
    for publisher in publishers:
        assert publisher.answer().startswith("'")
    everything = [taken(reader, 200 * len(publishers)) for reader in readers]
    assert everything[0] == everything[1] == everything[2]
    for number in range(len(publishers)):
        of_one = [n for publisher, n in everything[0] if publisher == number]
        assert of_one == list(range(200))


def test_a_publisher_that_exits_at_once_has_lost_nothing(process, directory):
    reader = process(LISTEN)
    code = "import os; from sse_channel import SSEChannel; SSEChannel('news').publish(os.getpid())"
    for ending in ("", "; os._exit(0)", "; os.kill(os.getpid(), 9)"):
        subprocess.run(
            [sys.executable, "-c", code + ending],
            env={**os.environ, "SSE_CHANNEL_BUS": f"local://{directory}"},
            timeout=PATIENCE,
        )
        assert reader("type(q.get(timeout=60)).__name__") == "'int'"


def test_a_published_event_is_there_for_its_own_process_at_once(process):
    one, other = process(LISTEN), process(LISTEN)
    for number in range(50):
        other.send("c.publish('elsewhere')")
        assert one(f"c.publish({number}); ") == "None"
        found = eval(one("[q.get_nowait() for _ in range(q.qsize())]"))
        assert number in found
        other.answer()


def test_who_stops_waiting_leaves_the_doorbell_to_its_own_thread(process):
    # The main thread hears the doorbell while it waits in `get`; then it does something else, and
    # what another thread waits for comes all the same.
    reader = process(
        "c = SSEChannel('news'); q = c.listen(); other = c.listen(); found = [];"
        "thread = threading.Thread("
        "target=lambda: [found.append(other.get(timeout=60)) for _ in range(300)], daemon=True);"
        "thread.start()"
    )
    publisher = process()
    for number in range(100):
        reader.send("q.get(timeout=60)")
        publisher(f"c.publish({3 * number})")
        assert reader.answer() == str(3 * number)
        publisher(f"[c.publish({3 * number} + more) for more in (1, 2)]")
        wait = f"[time.sleep(0.001) for _ in range(60_000) if len(found) < {3 * number + 3}]"
        assert len(eval(reader(wait))) < 60_000
        assert reader("[q.get_nowait() for _ in range(2)]") == str([3 * number + 1, 3 * number + 2])
    assert reader("found == list(range(300))") == "True"


def test_events_before_the_listening_are_not_given(process):
    publisher, reader = process(), process()
    for number in range(20):
        publisher(f"c.publish({number})")
        reader("q = c.listen()")
        publisher("c.publish('after')")
        assert reader("q.get(timeout=60)") == "'after'"
        assert reader("c.unlisten(q)") == "None"


def test_waiting_threads_greenlets_and_tasks_hear_another_process(process):
    publisher = process()
    ways = {
        "threads": "q.get(timeout=60)",
        "gevent": "import gevent; print(repr(gevent.spawn(q.get, timeout=60).get()), flush=True)",
        "asyncio": "import asyncio; print(repr(asyncio.run(q.aget(timeout=60))), flush=True)",
    }
    for way in ways.values():
        reader = process(LISTEN)
        reader.send(way)
        time.sleep(0.05)
        publisher("c.publish('x')")
        assert reader.answer() == "'x'"


# --- History -------------------------------------------------------------------------------


def test_resuming_in_another_process_gives_exactly_what_was_missed(process):
    first, second = process(LISTEN), process()
    ids = [eval(first(f"c.publish({number})")) for number in range(5)]
    assert second(f"q = c.listen(last_event_id={ids[1]!r}); ") == "None"
    assert second("(q.reset, [q.get(timeout=60) for _ in range(3)], q.qsize())") == (
        "(None, [2, 3, 4], 0)"
    )
    first("c.publish('live')")
    assert second("q.get(timeout=60)") == "'live'"
    # The last one, and one that came from a third process.
    assert second(f"q = c.listen(last_event_id={ids[4]!r}); ") == "None"
    assert second("q.get(timeout=60)") == "'live'"
    newest = eval(process()("c.publish('third')"))
    assert second(f"q = c.listen(last_event_id={newest!r}); ") == "None"
    assert second("(q.reset, q.qsize())") == "(None, 0)"


def test_history_outlives_the_process_that_wrote_it(process):
    publisher = process()
    first = eval(publisher("c.publish('first')"))
    publisher("c.publish('second')")
    assert publisher.end() == 0
    reader = process()
    assert reader(f"q = c.listen(last_event_id={first!r}); ") == "None"
    assert reader("(q.reset, q.get(timeout=60))") == "(None, 'second')"


@pytest.mark.parametrize(
    ("last_event_id", "reset"),
    [
        ("1-0", "too-old"),
        ("99999999999999-0", "future"),
        ("18446744073709551615-18446744073709551615", "future"),
        ("rubbish", "unknown"),
        ("-1", "unknown"),
        ("\0", "unknown"),
        ("9" * 10_000, "unknown"),
    ],
)
def test_ids_that_cannot_be_resumed_from(process, last_event_id, reset):
    one, other = process(), process()
    one("c.publish('kept')")
    other(f"q = c.listen(last_event_id={last_event_id!r})")
    assert other("q.reset") == repr(reset)
    one("c.publish('live')")
    kept = ["kept"] if reset == "too-old" else []
    assert taken(other, len(kept) + 1) == [*kept, "live"]


def test_a_client_beyond_history_gets_what_is_left_and_a_reset(process):
    one = process("c = SSEChannel('news', history=10)")
    ids = eval(one("[c.publish(n) for n in range(3000)]"))
    other = process("c = SSEChannel('news', history=10)")
    other(f"q = c.listen(last_event_id={ids[-20]!r})")
    assert other("(q.reset, [q.get_nowait() for _ in range(q.qsize())])") == repr(
        ("too-old", list(range(2990, 3000)))
    )
    other(f"q = c.listen(last_event_id={ids[-11]!r})")
    assert other("(q.reset, q.qsize())") == "(None, 10)"


def test_the_store_is_bounded_by_count_age_and_bytes(process, directory):
    one = process("configure(history_age=2, history_bytes=1_000_000)")
    one("c = SSEChannel('news', history=1); d = SSEChannel('other')")
    one("[c.publish(n) for n in range(5000)][-1]")
    with contextlib.closing(sqlite3.connect(directory / "events-1.sqlite3")) as store:

        def rows(channel: str) -> int:
            select = "SELECT count(*) FROM readable WHERE channel = ?"
            return store.execute(select, [channel]).fetchone()[0]

        # A thousand are kept for slow processes, as are young ones, within the bytes.
        assert rows("news") == 5000
        one("[d.publish('x' * 100_000) for n in range(50)][-1]")
        assert 5 <= rows("other") <= 10
        noted = "SELECT sum(events), sum(bytes) FROM channel"
        counted = "SELECT count(*), sum(length(CAST(frame AS BLOB)) + 64) FROM event"
        assert store.execute(noted).fetchone() == store.execute(counted).fetchone()
        deadline = time.monotonic() + PATIENCE
        while rows("news") + rows("other") > 30:
            assert time.monotonic() < deadline
            time.sleep(0.2)
            one("d.publish('y')")
        assert store.execute("SELECT name FROM channel").fetchall() == [("other",)]


def test_an_operator_can_read_the_store(process, directory):
    event_id = eval(process()("c.publish({'headline': 'Rain'})"))
    with contextlib.closing(sqlite3.connect(directory / "events-1.sqlite3")) as store:
        rows = store.execute("SELECT id, channel, frame FROM readable").fetchall()
    assert rows == [(event_id, "news", 'data: {"headline":"Rain"}\n\n')]


def test_every_field_of_an_event_crosses(process):
    one, other = process(), process("c = SSEChannel('news'); s = c.stream(); next(s)")
    one(r"c.publish(Event('a\r\nb\0c\rü', event='e', retry=7, comment='k'))")
    data = b"data: a\ndata: b\0c\ndata: \xc3\xbc\n\n"
    frame = eval(other("next(s)"))
    assert frame.startswith(b"id: ")
    assert frame.endswith(b": k\nevent: e\nretry: 7\n" + data)
    queue_reader = process(LISTEN)
    one(r"c.publish('a\r\nb\0c\rü')")
    assert queue_reader("q.get(timeout=60)") == repr("a\r\nb\0c\rü")
    one("c.publish(Event(comment='only'))")
    one("c.publish({'last': True})")
    assert queue_reader("q.get(timeout=60)") == "{'last': True}"


# --- Where it lies -------------------------------------------------------------------------


def default_directory(code: str, cwd: Path, **environment: str) -> str:
    """Where a process that runs `code` first has its store."""
    shown = "; from sse_channel import sse_channel; sse_channel.publish('x'); import os; "
    shown += "print([os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') "
    shown += "if os.path.islink(f'/proc/self/fd/{n}')])"
    done = subprocess.run(
        [sys.executable, "-c", code + shown],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (name for name in eval(done.stdout) if name.endswith("/events-1.sqlite3"))
    return os.path.dirname(path)


@pytest.fixture
def projects(tmp_path: Path) -> Iterator[tuple[list[Path], list[str]]]:
    """Two Django projects with one name and one secret key; and what to delete in the end."""
    made = []
    for name in ("one", "two"):
        project = tmp_path / name
        (project / "mysite").mkdir(parents=True)
        (project / "mysite" / "__init__.py").write_text("")
        (project / "mysite" / "settings.py").write_text("SECRET_KEY = 'x'\n")
        made.append(project)
    used: list[str] = []
    yield made, used
    for path in set(used):
        shutil.rmtree(path)


def test_the_default_directory_is_the_projects_whatever_the_process(projects, tmp_path):
    (one, two), used = projects
    django = "import django; django.setup()"
    of_one = {"DJANGO_SETTINGS_MODULE": "mysite.settings", "PYTHONPATH": str(one)}
    of_two = {"DJANGO_SETTINGS_MODULE": "mysite.settings", "PYTHONPATH": str(two)}
    web = default_directory(django, one, **of_one)
    used.append(web)
    cron = default_directory(
        django, Path("/"), **of_one, HOME="/nonexistent", TMPDIR=str(tmp_path), LANG="C"
    )
    other = default_directory(django, two, **of_two)
    used.append(other)
    assert web == cron != other
    assert web.startswith((f"/dev/shm/sse_channel-{os.getuid()}/", "/tmp/"))
    for path in (Path(web), Path(web).parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    # Without Django: the working directory's.
    plain = [default_directory("pass", path) for path in (one, one, two)]
    used.extend(plain)
    assert plain[0] == plain[1] != plain[2]
    assert len({web, other, *plain}) == 4


def refused(path: Path | str) -> str:
    """What a publish to a store in `path` says."""
    code = """
        from sse_channel import BusError, SSEChannel
        try:
            SSEChannel("news").publish("x")
        except BusError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "SSE_CHANNEL_BUS": f"local://{path}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_directory_that_is_not_the_users_own_is_refused(directory, tmp_path):
    assert refused(directory) == ""
    directory.chmod(0o755)
    assert f"chmod 700 {directory}" in refused(directory)
    directory.chmod(0o700)
    link = directory.parent / "link"
    link.symlink_to(directory)
    assert "symbolic link" in refused(link)
    file = directory.parent / "file"
    file.write_text("")
    assert "no directory" in refused(file)
    assert "too long" in refused("/tmp/" + "x" * 100)
    assert "local:///a/directory" in refused("/proc/nonexistent")


def test_a_second_user_is_told_whose_it_is(directory):
    if os.getuid() != 0:
        missing("root, to become another user")
    directory.parent.chmod(0o711)
    assert refused(directory) == ""
    done = publish_as(65534, f"local://{directory}")
    assert done.returncode == 0, done.stderr
    assert "belongs to the user 0, and this process runs as the user 65534" in done.stdout
    # With the default, each user has a place of their own.
    code = "import os, sse_channel; os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    path = default_directory(code, Path("/"))
    assert "sse_channel-65534" in path
    subprocess.run(["rm", "-rf", path], check=True)


def test_a_stranger_who_was_first_is_noticed():
    """Somebody else made the directory that this user would choose."""
    if os.getuid() != 0:
        missing("root, to become another user")
    taken = Path("/dev/shm/sse_channel-65534")
    if not taken.parent.is_dir():
        missing("/dev/shm")
    subprocess.run(["rm", "-rf", str(taken)], check=True)
    taken.mkdir(mode=0o700)
    try:
        done = publish_as(65534, "local://")
        assert "belongs to the user 0" in done.stdout, done.stderr
    finally:
        taken.rmdir()


def in_own_mounts(commands: str, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python where file systems are mounted differently."""
    if os.getuid() != 0 or subprocess.run(["unshare", "-m", "true"]).returncode != 0:
        missing("the right to mount in a namespace of one's own")
    return subprocess.run(
        ["unshare", "-m", "sh", "-ec", f'{commands}\nexec "$0" -c "$1"', sys.executable, code],
        env={"PATH": os.environ["PATH"], **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize(
    "commands",
    [
        "mount -t tmpfs -o size=16m tmpfs /dev/shm",
        "mount -t tmpfs -o size=1m tmpfs /dev; [ ! -e /dev/shm ]",
        "mount -t tmpfs -o ro tmpfs /dev/shm",
    ],
    ids=["small", "absent", "read-only"],
)
def test_without_a_usable_dev_shm_the_store_lies_elsewhere(commands):
    code = """
from sse_channel import sse_channel
q = sse_channel.listen()
sse_channel.publish("x")
import os
links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
stores = {os.path.dirname(os.readlink(link)) for link in links if os.path.islink(link)
          and os.readlink(link).endswith(".sqlite3")}
print(q.get(timeout=30), *stores)
"""
    done = in_own_mounts(commands, code)
    assert done.stdout.startswith(f"x /tmp/sse_channel-{os.getuid()}/"), done.stderr
    shutil.rmtree(done.stdout.split()[1])


def test_a_read_only_file_system_is_named(directory):
    code = """
from sse_channel import BusError, sse_channel
try:
    sse_channel.publish("x")
except BusError as error:
    print(error)
"""
    place = directory.parent
    done = in_own_mounts(
        f"mount -t tmpfs -o ro tmpfs {place}", code, SSE_CHANNEL_BUS=f"local://{place}/bus"
    )
    assert "Read-only file system" in done.stdout, done.stderr
    assert "local:///a/directory" in done.stdout


# --- What happens to the store -------------------------------------------------------------


def remove(directory: Path) -> None:
    """Delete it with all its files, though its processes make them anew."""
    gone = directory.parent / "gone"
    directory.rename(gone)
    shutil.rmtree(gone)


def test_a_store_that_is_deleted_while_in_use_is_begun_anew(process, directory):
    readers = [process(LISTEN) for _ in range(2)]
    publisher = process()
    ids = [eval(publisher("c.publish('before')"))]
    for way in ("deleted", "moved", "deleted"):
        for reader in readers:
            assert reader("q.get(timeout=60)") in ("'before'", "'after'")
        if way == "deleted":
            remove(directory)
        else:
            directory.rename(directory.parent / "moved")
        ids.append(eval(publisher("c.publish('after')")))
    for reader in readers:
        assert reader("q.get(timeout=60)") == "'after'"
        assert reader("q.qsize()") == "0"
    assert ids == sorted(ids)
    # What was before the new store is too old, and said to be.
    late = process()
    late(f"q = c.listen(last_event_id={ids[0]!r})")
    assert late("q.reset") == "'too-old'"


@pytest.mark.parametrize("files", ["*", "*-wal", "*-shm", "*.sqlite3", "lock", "bell-*"])
def test_single_files_of_a_store_that_are_deleted_under_it(process, directory, until, files):
    """What nobody can know any more may be lost; everything goes on with the next publish."""
    reader, publisher, other = process(LISTEN), process(), process()
    publisher("c.publish('before')")
    other("c.publish('before')")
    for path in directory.glob(files):
        path.unlink(missing_ok=True)

    def all_is_well() -> bool:
        assert publisher("c.publish('one')").startswith("'")
        assert other("c.publish('two')").startswith("'")
        return reader("{q.get() for _ in range(q.qsize())} >= {'one', 'two'}") == "True"

    until(all_is_well, PATIENCE)
    newest = eval(publisher("c.publish('three')"))
    late = process()
    late(f"q = c.listen(last_event_id={newest!r})")
    assert late("(q.reset, q.qsize())") == "(None, 0)"


def test_a_reader_alone_notices_that_the_store_is_gone(process, directory, until):
    reader = process(LISTEN)
    remove(directory)
    until(lambda: list(directory.glob("bell-*")), PATIENCE)
    process()("c.publish('x')")
    assert reader("q.get(timeout=60)") == "'x'"
    assert reader("stats()['bus']['reconnects']") == "1"


def test_a_store_of_another_version_is_named(process, directory):
    process()("c.publish('x')")
    path = directory / "events-1.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as store:
        store.execute("PRAGMA user_version = 7")
    says = refused(directory)
    assert f"the store {path} was written by another version" in says
    assert "layout 7" in says
    assert "delete the file" in says


@pytest.mark.parametrize(
    "content", [b"no database at all" * 1000, b"SQLite format 3\0" + b"x" * 8192]
)
def test_a_damaged_store_is_put_aside(process, directory, content):
    directory.mkdir(mode=0o700)
    (directory / "events-1.sqlite3").write_bytes(content)
    reader = process(LISTEN)
    process()("c.publish('x')")
    assert reader("q.get(timeout=60)") == "'x'"
    assert (directory / "broken.sqlite3").read_bytes() == content


def test_a_full_file_system_is_a_clear_error_and_heals(directory):
    place = directory.parent / "small"
    bus = f"local://{place}/bus"
    with small_file_system(place, "2m"), Process(bus) as one, Process(bus) as other:
        one("c = SSEChannel('news')")
        other(LISTEN)
        assert one("c.publish('fits')").startswith("'")
        assert other("q.get(timeout=60)") == "'fits'"
        filler = place / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        says = ""
        for _ in range(2000):
            says = one("c.publish('y' * 10_000)")
            if says.startswith("BusError"):
                break
        assert "file system" in says
        assert "make room" in says or "want of room" in says
        sent = eval(other("[q.get_nowait() for _ in range(q.qsize())]"))
        assert set(sent) <= {"y" * 10_000}
        filler.unlink()
        assert one("c.publish('room again')").startswith("'")
        assert other("q.get(timeout=60)") == "'room again'"


# --- Who is killed or stopped --------------------------------------------------------------


def test_a_stopped_process_with_the_lock_costs_a_clear_error(process, directory):
    """No publisher waits for ever, none blocks its gevent hub, nothing is sent half."""
    publisher = process("configure(publish_timeout=0.5)")
    publisher("c = SSEChannel('news')")
    reader = process(LISTEN)
    assert publisher("c.publish('x')").startswith("'")
    with (directory / "lock").open("r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        says = publisher("c.publish('never sent')")
        assert says.startswith("BusError: ")
        gevent = process("configure(publish_timeout=30)")
        gevent.send(
            "import gevent; c = SSEChannel('news'); g = gevent.spawn(c.publish, 'late'); "
            "gevent.sleep(0.2); print('the hub runs', g.ready(), flush=True); g.get()"
        )
        assert gevent.answer() == "the hub runs False"
    assert gevent.answer() == "None"
    assert publisher("c.publish('y')").startswith("'")
    assert taken(reader, 3) == ["x", "late", "y"]
    assert "the process" in says
    assert "lock" in says


def test_killed_listeners_leave_nothing_behind(process, directory):
    readers = [process(LISTEN) for _ in range(3)]
    assert len(list(directory.glob("bell-*"))) == 3
    for reader in readers:
        reader.kill()
        psutil.Process(reader.pid).wait(PATIENCE)
    publisher = process()
    publisher("c.publish('x')")
    publisher("c.publish('y')")
    assert list(directory.glob("bell-*")) == []
    with contextlib.closing(sqlite3.connect(directory / "events-1.sqlite3")) as store:
        assert store.execute("SELECT * FROM listener").fetchall() == []


def test_a_listener_that_was_stopped_catches_up(process):
    reader = process("c = SSEChannel('news', capacity=100_000); q = c.listen()")
    publisher = process()
    reader.kill(signal.SIGSTOP)
    publisher("[c.publish(n) for n in range(900)][-1]")
    reader.kill(signal.SIGCONT)
    assert taken(reader, 900) == list(range(900))


def test_old_events_beyond_the_count_are_let_go_of(process, directory):
    one = process()
    one("[c.publish(n) for n in range(3000)][-1]")
    time.sleep(10.5)
    one("[c.publish(n) for n in range(10)][-1]")
    with contextlib.closing(sqlite3.connect(directory / "events-1.sqlite3")) as store:
        (kept,) = store.execute("SELECT count(*) FROM event").fetchone()
    assert 1000 <= kept <= 1125


def test_a_listener_that_was_stopped_for_too_long_is_told(process):
    reader = process("c = SSEChannel('news', capacity=100_000); s = c.stream(); next(s)")
    publisher = process("configure(history_bytes=200_000)")
    publisher("c = SSEChannel('news')")
    # Nobody could publish while one is stopped that has the lock: its registration is over now.
    assert publisher("c.publish('before')").startswith("'")
    reader.kill(signal.SIGSTOP)
    assert publisher("[c.publish(n) for n in range(6000)][-1]").startswith("'")
    reader.kill(signal.SIGCONT)
    read = b""
    while not read.endswith(b"data: 5999\n\n"):
        read += eval(reader("next(s)"))
    before, reset, after = read.partition(b'event: stream-reset\ndata: {"reason":"too-old"}\n\n')
    assert reset
    # What rings had brought before, and what the store still had.
    for part, last in ((before, None), (after, 5999)):
        numbers = [int(number) for number in re.findall(rb"^data: (\d+)$", part, re.MULTILINE)]
        if numbers:
            assert numbers == list(range(numbers[0], numbers[-1] + 1))
            assert last in (None, numbers[-1])


def test_a_listener_that_was_stopped_until_all_was_too_old_is_told(process, directory, until):
    reader = process("c = SSEChannel('news', capacity=1000); s = c.stream(); next(s)")
    publisher = process("configure(history_age=1)")
    publisher("c = SSEChannel('news')")
    assert publisher("c.publish('before')").startswith("'")
    assert b"before" in eval(reader("next(s)"))
    threads = list(Path(f"/proc/{reader.pid}/task").iterdir())

    def is_stopped_without_the_lock() -> bool:
        reader.kill(signal.SIGSTOP)
        until(lambda: all(") T " in (thread / "stat").read_text() for thread in threads))
        if publisher("c.publish('probe')").startswith("'"):
            return True
        reader.kill(signal.SIGCONT)
        return False

    until(is_stopped_without_the_lock)
    # More than the reader's socket takes; then the channel's own row goes with its last event.
    assert publisher("[c.publish(n) for n in range(50)][-1]").startswith("'")

    def is_forgotten() -> bool:
        publisher("[SSEChannel('other').publish(n) for n in range(100)][-1]")
        with contextlib.closing(sqlite3.connect(directory / "events-1.sqlite3")) as store:
            return not store.execute("SELECT 1 FROM channel WHERE name = 'news'").fetchall()

    until(is_forgotten)
    reader.kill(signal.SIGCONT)
    assert publisher("c.publish('later')").startswith("'")
    read = b""
    while not read.endswith(b"data: later\n\n"):
        read += eval(reader("next(s)"))
    before, reset, after = read.partition(b'event: stream-reset\ndata: {"reason":"too-old"}\n\n')
    numbers = [int(number) for number in re.findall(rb"^data: (\d+)$", before, re.MULTILINE)]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) < 50, "nothing was missed, which tests nothing"
    assert reset
    assert re.fullmatch(rb"id: .*\ndata: later\n\n", after)


# --- Costs ---------------------------------------------------------------------------------


def wakeups(pid: int) -> int:
    """How often the threads of a process were put to sleep so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = (task / "status").read_text()
        total += int(status.split("\nvoluntary_ctxt_switches:\t")[1].split("\n")[0])
    return total


def test_an_idle_process_wakes_zero_times(process):
    reader, publisher = process(LISTEN), process()
    publisher("c.publish('x')")
    assert reader("q.get(timeout=60)") == "'x'"
    # It looks once, some seconds after its first client, whether that one is still there.
    time.sleep(6)
    before = wakeups(reader.pid), wakeups(publisher.pid)
    time.sleep(3)
    assert (wakeups(reader.pid), wakeups(publisher.pid)) == before


def test_a_process_whose_clients_left_is_not_rung(process, directory, until):
    reader, publisher = process(LISTEN), process()
    publisher("c.publish('x')")
    assert len(list(directory.glob("bell-*"))) == 1
    threads = psutil.Process(reader.pid).num_threads()
    reader("c.unlisten(q)")
    until(lambda: not list(directory.glob("bell-*")), PATIENCE)
    until(lambda: psutil.Process(reader.pid).num_threads() < threads, PATIENCE)
    last = eval(publisher("c.publish('unheard')"))
    publisher("c.publish('missed')")
    # It hears again, and has missed nothing.
    assert reader(f"q = c.listen(last_event_id={last!r})") == "None"
    assert reader("(q.reset, q.get(timeout=60))") == "(None, 'missed')"
    publisher("c.publish('live')")
    assert reader("q.get(timeout=60)") == "'live'"


def test_concurrent_publishers_share_transactions(process, directory):
    """While another process holds the lock they queue up; then one transaction takes them all."""
    publisher = process()
    publisher("c.publish('first')")
    reader = process("c = SSEChannel('news', capacity=10_000); q = c.listen()")
    log = directory / "events-1.sqlite3-wal"
    with (directory / "lock").open("r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        publisher("threads = [threading.Thread(target=c.publish, args=[n]) for n in range(100)]")
        publisher("[t.start() for t in threads][0]")
        deadline = time.monotonic() + PATIENCE
        while publisher("stats()['bus']['waiting']") != "100":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        size = log.stat().st_size
    publisher("[t.join() for t in threads][0]")
    assert sorted(taken(reader, 100)) == list(range(100))
    # Each transaction writes each page that it changes once: a hundred would be 3 MB.
    assert log.stat().st_size - size < 500_000


def test_the_bus_of_one_process_does_not_leak(process):
    reader, publisher = process("c = SSEChannel('news')"), process()
    count = "(len(os.listdir('/proc/self/fd')), len(os.listdir('/proc/self/task')))"
    reader("q = c.listen()")
    before = eval(reader(count))
    reader("[c.unlisten(c.listen()) for _ in range(2000)][0]")
    publisher("[c.publish(n) for n in range(100)][0]")
    assert reader("q.get(timeout=60)") == "0"
    descriptors, threads = eval(reader(count))
    assert descriptors <= before[0]
    assert threads <= before[1]


# --- Forks ---------------------------------------------------------------------------------


def test_children_forked_from_a_process_with_a_bus_in_use(script, directory):
    """Parent and children publish and listen while more are forked; nothing is lost or doubled."""
    out = script(
        """
import os, threading
from sse_channel import SSEChannel
channel = SSEChannel("news", capacity=100_000)
q = channel.listen()
stop = threading.Event()
def publish():
    while not stop.is_set():
        channel.publish("parent")
threads = [threading.Thread(target=publish) for _ in range(2)]
for thread in threads: thread.start()
for child in range(20):
    pid = os.fork()
    if pid == 0:
        mine = channel.listen()
        channel.publish(child)
        while mine.get(timeout=30) != child: pass
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
stop.set()
for thread in threads: thread.join()
channel.publish("end")
seen = []
while (got := q.get(timeout=30)) != "end":
    if got != "parent": seen.append(got)
print(seen == list(range(20)))
""",
        SSE_CHANNEL_BUS=f"local://{directory}",
        PYTHONWARNINGS="ignore",
    )
    assert out == "True\n"


def test_a_child_does_not_keep_its_parents_doorbell(script, directory):
    out = script(
        """
import os, time
from sse_channel import SSEChannel
channel = SSEChannel("news")
q = channel.listen()
def sockets():
    names = (os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
             if os.path.islink(f"/proc/self/fd/{n}"))
    return [name for name in names if name.startswith("socket:") or "inotify" in name
            or "sqlite" in name or name.endswith("/lock")]
before = sockets()
assert before
pid = os.fork()
if pid == 0:
    print(sockets(), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
channel.publish("x")
print(q.get(timeout=30), set(sockets()) & set(before) != set())
""",
        SSE_CHANNEL_BUS=f"local://{directory}",
        PYTHONWARNINGS="ignore",
    )
    assert out == "[]\nx True\n"


def test_a_publisher_in_the_same_process_never_waits_for_a_slow_reader(process):
    """Backpressure is the reader's own: a full queue drops, publishers go on."""
    reader = process("c = SSEChannel('news', capacity=10); q = c.listen()")
    publisher = process()
    assert publisher("[c.publish(n) for n in range(500)][-1]").startswith("'")
    publisher("c.publish('end')")
    deadline = time.monotonic() + PATIENCE
    while reader("stats()['channels']['news']['received']") != "501":
        assert time.monotonic() < deadline
    assert reader("(q.qsize(), q.dropped)") == "(10, 491)"


def test_errors_reach_threads_that_wait_together(process, directory):
    publisher = process("configure(publish_timeout=0.3)")
    publisher("c = SSEChannel('news')")
    publisher("c.publish('x')")
    with (directory / "lock").open("r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        publisher("import concurrent.futures; pool = concurrent.futures.ThreadPoolExecutor(8)")
        publisher("futures = [pool.submit(c.publish, n) for n in range(8)]")
        kinds = publisher("[type(f.exception(60)).__name__ for f in futures]")
    assert eval(kinds) == ["BusError"] * 8
    assert publisher("c.publish('z')").startswith("'")


# --- Found by review -----------------------------------------------------------------------


def test_neither_forks_nor_exits_nor_timeouts_wait_for_another_process(process, directory):
    """Another process has the store's lock and does not give it back."""
    one = process(LISTEN)
    one("import warnings; warnings.simplefilter('ignore')")
    one("c.publish('x')")
    one("configure(publish_timeout=0.2)")
    with (directory / "lock").open("r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert one("c.publish('never')").startswith("BusError: ")
        fork = "pid = os.fork(); pid or os._exit(0); print(os.waitpid(pid, 0)[1], flush=True)"
        one.send(fork)
        assert (one.answer(), one.answer()) == ("0", "None")
        assert one("q.get(timeout=60)") == "'x'"
        assert one("q.get(timeout=0.2)") == "Empty: "
        assert one("c.publish('never')").startswith("BusError: ")
        assert one.end() == 0


def test_an_event_beyond_all_bounds_reaches_everybody_all_the_same(process):
    reader = process(LISTEN)
    publisher = process("configure(history_bytes=1000)")
    publisher("c = SSEChannel('news')")
    publisher("c.publish('x' * 5000)")
    # Each before the next, for which the store forgets it: a reader that is late has a gap.
    assert len(eval(reader("q.get(timeout=60)"))) == 5000
    for n in range(20):
        publisher(f"c.publish({n})")
        assert taken(reader, 1) == [n]


def test_a_store_at_its_largest_goes_on(process):
    """Events whose rows take far more than their bytes, on a small file system."""
    code = """
from sse_channel import SSEChannel
channels = [SSEChannel(f"c{n}") for n in range(12)]
for number in range(12_000):
    channels[number % 12].publish("x" * 2100)
print("done")
"""
    done = in_own_mounts("mount -t tmpfs -o size=64m tmpfs /dev/shm", code)
    assert done.stdout == "done\n", done.stderr


def test_another_program_that_writes_to_the_store_holds_up_no_loop(process, directory):
    publisher = process()
    publisher("c.publish('x')")
    publisher("import gevent, time")
    with contextlib.closing(sqlite3.connect(directory / "events-1.sqlite3")) as store:
        store.execute("BEGIN IMMEDIATE")
        publisher.send(
            "g = gevent.spawn(c.publish, 'late'); gevent.sleep(0.2); "
            "print('the hub runs', g.ready(), flush=True)"
        )
        assert publisher.answer() == "the hub runs False"
        assert publisher.answer() == "None"
        store.rollback()
    assert publisher("g.get(timeout=60)").startswith("'")


def test_another_programs_transaction_that_does_not_end_is_an_error(process, directory):
    publisher = process()
    publisher("c.publish('x')")
    with contextlib.closing(sqlite3.connect(directory / "events-1.sqlite3")) as store:
        store.execute("BEGIN IMMEDIATE")
        assert publisher("c.publish('never')").startswith("BusError: ")
        store.rollback()
    reader = process(LISTEN)
    assert publisher("c.publish('after')").startswith("'")
    assert reader("q.get(timeout=60)") == "'after'"


def test_clients_that_left_are_forgotten_though_others_publish(process, directory, until):
    reader, publisher = process(LISTEN), process()
    publisher("c.publish('x')")
    reader("c.unlisten(q)")

    def is_forgotten() -> bool:
        publisher("c.publish('y')")
        return not list(directory.glob("bell-*"))

    until(is_forgotten, PATIENCE)


def test_a_process_that_lost_its_entry_is_rung_again(process, directory, until):
    reader, publisher = process(LISTEN), process()
    publisher("c.publish('x')")
    assert reader("q.get(timeout=60)") == "'x'"
    with contextlib.closing(sqlite3.connect(directory / "events-1.sqlite3")) as store, store:
        store.execute("DELETE FROM listener")
    # Any deletion in the directory makes it look.
    (directory / "anything").write_text("")
    (directory / "anything").unlink()

    def is_rung() -> bool:
        publisher("c.publish('y')")
        return reader("q.qsize()") != "0"

    until(is_rung, PATIENCE)


def test_a_damaged_store_is_replaced_for_its_readers_too(process, directory, until):
    reader, publisher = process(LISTEN), process()
    publisher("[c.publish('x' * 900) for n in range(200)][0]")
    assert len(taken(reader, 200)) == 200
    path = directory / "events-1.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as store:
        store.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(b"\xff" * (path.stat().st_size - 1024))

    def is_well() -> bool:
        late = process("c = SSEChannel('news')")
        late("q2 = c.listen(last_event_id='1-0')")
        publisher("c.publish('after')")
        return "'after'" in reader("[q.get() for _ in range(q.qsize())]")

    until(is_well, PATIENCE)


def test_a_process_that_was_idle_reads_back_again_what_it_has_forgotten(script, short_path):
    """What it read back before is forgotten with the last client, some seconds after it."""
    script(
        """
import sys, time
from sse_channel import SSEChannel, configure

configure(bus=f"local://{sys.argv[1]}")
channel = SSEChannel("a")
first = channel.publish("first")

def missed():
    with channel.stream(last_event_id=first) as stream:
        opening = next(stream)
        assert b"stream-reset" not in opening, opening
        return next(stream)

channel.publish("second")
assert missed().endswith(b"data: second\\n\\n")
deadline = time.monotonic() + 60
while channel.stats()["history"]["events"]:
    assert time.monotonic() < deadline
    time.sleep(0.1)
channel.publish("third")
assert missed().endswith(b"data: third\\n\\n")
""",
        str(short_path / "bus"),
    )
