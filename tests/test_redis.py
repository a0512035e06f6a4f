"""The Redis bus, with a real Redis: every test once with sharded Pub/Sub and once without."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parts import missing
from ports import HOST, free_port
from redis_server import RedisServer, RespError, Until, Worker, command
from sse_channel import configure

PATIENT = {"SSE_CHANNEL_PUBLISH_TIMEOUT": "60"}


@pytest.fixture(params=[True, False], ids=["sharded", "plain"])
def redis(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis", sharded=request.param)
    server.start()
    yield server
    server.close()


@pytest.fixture
def worker(redis: RedisServer) -> Iterator[Callable[..., Worker]]:
    """Processes that use the bus, ended with the test."""
    with contextlib.ExitStack() as workers:

        def start(*options: str, url: str = "", **environment: str) -> Worker:
            started = Worker(url or redis.url(), *options, **environment)
            workers.callback(started.close)
            return started

        yield start


def subscriptions(redis: RedisServer) -> list[bytes]:
    return redis.call("PUBSUB", "SHARDCHANNELS" if redis.sharded else "CHANNELS")


def key(event_id: str) -> tuple[int, int]:
    ms, n = event_id.split("-")
    return int(ms), int(n)


def check_each_once_in_order(
    published: list[list[str | None]], messages: list[str], *, all_of_them: bool = True
) -> None:
    """`messages` are those acknowledged, once each, in the order of their ids.

    What raised may have arrived or not.
    """
    ids = {message: event_id for message, event_id, _ in published}
    assert len(set(messages)) == len(messages), "doubles"
    acknowledged = [message for message in messages if ids[message] is not None]
    assert acknowledged == sorted(acknowledged, key=lambda message: key(ids[message] or ""))
    if all_of_them:
        assert set(acknowledged) == {m for m, event_id in ids.items() if event_id is not None}
    by_publisher: dict[str, list[int]] = {}
    for message in messages:
        publisher, _, number = message.rpartition(".")
        by_publisher.setdefault(publisher, []).append(int(number))
    for publisher, numbers in by_publisher.items():
        assert numbers == sorted(numbers), publisher


def test_an_event_reaches_every_process_as_it_was(worker, name):
    one, other = worker(), worker()
    assert one("listen", name) is None
    assert other("listen", name) is None
    messages = ["text", {"json": [1, None, "ü"]}, "two\r\nlines\n", "", "日本 🎉", 0]
    ids = [one("publish", name, message) for message in messages]
    assert ids == sorted(ids, key=key)
    assert one("got", name) == messages
    assert other("get", name, len(messages)) == messages


@pytest.mark.parametrize("name", ["a}b", "}", "{", "{}", "a:state", "%", "a\nb", "日本"])
def test_any_name_is_a_channel(worker, name):
    one, other = worker(), worker()
    other("listen", name, None, "label")
    event_id = one("publish", name, "message")
    assert other("get", "label", 1) == ["message"]
    assert other("publish", name, "next")
    assert one("listen", name, event_id, "label") is None
    assert one("got", "label") == ["next"]


def test_databases_of_one_server_do_not_hear_each_other(redis, worker, name):
    one, other = worker(url=redis.url(path="/0")), worker(url=redis.url(path="/1"))
    third = worker(url=redis.url(path="/1"))
    for each in (one, other, third):
        each("listen", name)
    one("publish", name, "of 0")
    other("publish", name, "of 1")
    # Announced by one server in one order: what came from the other database would be first.
    assert third("get", name, 1) == ["of 1"]
    assert (one("got", name), other("got", name)) == (["of 0"], ["of 1"])


def test_an_own_event_is_there_when_its_publish_returns(worker, name):
    assert worker()("echo", name, 300) == 300


def test_all_processes_get_one_order(worker, name):
    workers = [worker() for _ in range(3)]
    for listener in workers:
        listener("listen", name)
    for tag, publisher in enumerate(workers):
        publisher("start_publishing", name, str(tag), 150, 0, 2)
    published = [done for publisher in workers for done in publisher("join_publishers")]
    orders = [listener("get", name, 900) for listener in workers]
    assert orders[0] == orders[1] == orders[2]
    check_each_once_in_order(published, orders[0])


def test_a_client_resumes_in_another_process(worker, name):
    one, other = worker(), worker()
    one("listen", name)
    ids = [one("publish", name, number) for number in range(2000)]
    for last, reset, messages in [
        (ids[-3], None, [1998, 1999]),
        (ids[1500], None, list(range(1501, 2000))),
        (ids[-1], None, []),
        ("1-0", "too-old", None),
        ("99999999999999-0", "future", []),
        ("rubbish", "unknown", []),
        ("18446744073709551615-18446744073709551615", "future", []),
    ]:
        for process in (one, other):
            assert process("listen", name, last) == reset, last
            found = process("got", name)
            assert messages is None or found == messages, last
            process("unlisten", name)
    assert other("listen", name, ids[-2]) is None
    one("publish", name, "live")
    assert other("get", name, 2) == [1999, "live"]


def test_a_cursor_from_an_empty_channel_stays_valid(worker, name):
    one, other = worker(), worker()
    opening = one("open_stream", name)
    cursor = opening.partition("id: ")[2].split("\n")[0]
    other("publish", name, "first")
    third = worker()
    for process in (other, third):
        assert process("listen", name, cursor) is None
        assert process("got", name) == ["first"]


def test_a_client_ahead_of_its_process_gets_no_double(worker, name):
    one, other = worker(), worker()
    other("listen", name)
    for number in range(100):
        event_id = one("publish", name, number)
        assert other("listen", name, event_id, "ahead") is None
        one("publish", name, "next")
        assert other("get", "ahead", 1) == ["next"], number
        other("unlisten", "ahead")


def test_what_was_acknowledged_survives_a_crash_of_redis(redis, worker, name, until: Until):
    publisher, listener = worker(**PATIENT), worker()
    listener("listen", name)
    publisher("start_publishing", name, "p", 0, 0.002, 2)
    until(lambda: publisher("acknowledged") > 50)
    for _ in range(3):
        redis.kill()
        redis.start()
        before = publisher("acknowledged")
        until(lambda before=before: publisher("acknowledged") > before + 50)
    published = publisher("stop_publishing")
    assert [error for _, _, error in published if error] == []
    messages = listener("get", name, len(published))
    assert listener("got", name) == []
    check_each_once_in_order(published, messages)
    assert listener("bus")["reconnects"] == 3
    first = published[0][1]
    late = worker()
    assert late("listen", name, first) is None or len(published) > 1000


def test_a_redis_that_lost_everything_is_a_gap_and_no_end(redis, worker, name):
    one, other = worker(**PATIENT), worker()
    before = one("publish", name, "before")
    opening = other("open_stream", name)
    assert one("listen", name) is None
    redis.kill()
    redis.forget()
    redis.start()
    after = one("publish", name, "after")
    assert key(after) > key(before)
    assert one("get", name, 1) == ["after"]
    seen = ""
    while "data: after" not in seen:
        seen += other("read_stream", name)
    assert seen.index("event: stream-reset") < seen.index("data: after")
    cursor = opening.partition("id: ")[2].split("\n")[0]
    assert worker()("listen", name, cursor) == "too-old"


def test_ten_seconds_without_redis_lose_and_double_nothing(redis, worker, name, until: Until):
    publishers = [worker(**PATIENT), worker(SSE_CHANNEL_PUBLISH_TIMEOUT="2")]
    listener = worker()
    listener("listen", name)
    for tag, publisher in enumerate(publishers):
        publisher("start_publishing", name, str(tag), 0, 0.005, 2)
        until(lambda publisher=publisher: publisher("acknowledged") > 20)
    redis.kill()
    time.sleep(10)
    redis.start()
    for publisher in publishers:
        before = publisher("acknowledged")
        until(lambda before=before, p=publisher: p("acknowledged") > before + 50)
    published = [done for publisher in publishers for done in publisher("stop_publishing")]
    # Ten seconds were within the first one's patience, and not within the other's.
    errors = [(message[0], error) for message, _, error in published if error]
    assert {tag for tag, _ in errors} == {"1"}
    for _, error in errors:
        assert f"Redis at {HOST}:{redis.port} cannot be reached since" in error
    acknowledged = sum(event_id is not None for _, event_id, _ in published)
    messages = listener("get", name, acknowledged)
    messages += listener("got", name)
    check_each_once_in_order(published, messages)


def test_a_thousand_publishes_at_once_are_stored_each_in_the_order_of_their_calls(worker, name):
    publisher, listener = worker(**PATIENT), worker()
    listener("listen", name)
    # Once while it connects, once on the connection.
    for number in range(2):
        ids = publisher("publish_together", name, 1000)
        assert len(set(ids)) == 1000, f"round {number}: acknowledged with the id of another"
        assert ids == sorted(ids, key=key)
        assert listener("get", name, 1000) == list(range(1000))
    assert listener("got", name) == []


def test_hundreds_of_publishes_that_meet_a_crash_are_stored_each(redis, worker, name):
    publisher, listener = worker(**PATIENT), worker()
    listener("listen", name)
    publisher("publish", name, "first.0.0")
    # What is under way then, or waits, is given again all at once.
    redis.signal(signal.SIGSTOP)
    publisher("start_publishing", name, "p", 2, 0, 300)
    time.sleep(1)
    redis.kill()
    redis.start()
    published = publisher("join_publishers")
    assert [error for _, _, error in published if error] == []
    assert len({event_id for _, event_id, _ in published}) == 600
    messages = listener("get", name, 601)[1:]
    assert listener("got", name) == []
    check_each_once_in_order(published, messages)


def test_a_publish_that_is_given_twice_lands_once(redis, worker, name):
    """Redis stands still for so long that the connection is given up; then it gets the bytes of
    both connections.
    """
    publisher, listener = worker(**PATIENT), worker()
    listener("listen", name)
    publisher("publish", name, "first.0.0")
    redis.signal(signal.SIGSTOP)
    publisher("start_publishing", name, "p", 40, 0, 8)
    time.sleep(8)
    redis.signal(signal.SIGCONT)
    published = publisher("join_publishers")
    assert [error for _, _, error in published if error] == []
    messages = listener("get", name, 321)[1:]
    assert listener("got", name) == []
    check_each_once_in_order(published, messages)
    assert publisher("bus")["reconnects"] >= 1


def test_who_was_disconnected_while_its_process_was_cut_off_gets_nothing_later(
    redis, worker, until
):
    held, other = worker(), worker(**PATIENT)
    # As if something had been told before Redis's clock was set back by an hour.
    early = f"{round(time.time() + 3600) * 1000}-0"
    redis.call("HSET", "sse_channel:{sse_channel.control}:state", "last", early)
    for number in range(10):
        name = f"news-{number}"
        held("follow_stream", name)
        with held.stopped():
            redis.call("CLIENT", "KILL", "SKIPME", "yes")
            other("disconnect_and_publish", name, "for others")
        until(lambda name=name: held("followed_so_far", name)[-1:] == ["end"])
        assert held("followed_so_far", name) == ["end"]


def test_who_is_disconnected_gets_nothing_later_where_a_message_was_missing(
    redis, worker, name, until
):
    """It is read from the store, which has what is later than the disconnect as well."""
    held, other = worker(), worker(**PATIENT)
    held("follow_stream", name)
    first = other("publish", name, "first")
    until(lambda: "first" in "".join(held("followed_so_far", name)))
    # An event whose message never came: stored, and not announced.
    stream = f"sse_channel:{{{name}}}"
    ((_, fields),) = redis.call("XRANGE", stream, "-", "+")
    texts = [field.decode() for field in fields]
    texts[texts.index("prev") + 1] = first
    ms, n = key(first)
    redis.call("XADD", stream, f"{ms}-{n + 1}", *texts)
    redis.call("HSET", f"{stream}:state", "last", f"{ms}-{n + 1}")
    with held.stopped():
        other("publish", name, "second")
        other("disconnect_and_publish", name, 0)
        # More than are delivered in one go.
        other("publish_together", name, 1000)
    until(lambda: held("followed_so_far", name)[-1:] == ["end"])
    got = "".join(held("followed_so_far", name))
    assert set(re.findall("data: (.*)", got)) <= {"first", "second"}


def test_connections_that_are_cut_all_the_time_lose_and_double_nothing(redis, worker, name):
    publishers, listener = [worker(**PATIENT), worker(**PATIENT)], worker()
    listener("listen", name)
    for tag, publisher in enumerate(publishers):
        publisher("start_publishing", name, str(tag), 300, 0.002, 4)
    with socket.create_connection((HOST, redis.port)) as connection:
        for _ in range(15):
            time.sleep(0.15)
            command(connection, "CLIENT", "KILL", "SKIPME", "yes")
    published = [done for publisher in publishers for done in publisher("join_publishers")]
    assert [error for _, _, error in published if error] == []
    messages = listener("get", name, 2400)
    assert listener("got", name) == []
    check_each_once_in_order(published, messages)


def test_flushed_scripts_are_loaded_again(redis, worker, name):
    publisher = worker()
    publisher("listen", name)
    publisher("publish", name, 1)
    redis.call("SCRIPT", "FLUSH")
    publisher("publish", name, 2)
    assert publisher("got", name) == [1, 2]


def test_without_redis_a_publish_and_a_client_are_told_why(redis, worker, name, until: Until):
    publisher = worker(SSE_CHANNEL_PUBLISH_TIMEOUT="0.3")
    redis.kill()
    error = publisher("refused", name, "x")
    assert "nothing was sent" in error
    assert f"Redis at {HOST}:{redis.port} cannot be reached since" in error
    assert "refused" in error
    assert not publisher("bus")["connected"]
    with pytest.raises(AssertionError, match="BusError"):
        publisher("listen", name)
    redis.start()
    until(lambda: publisher("bus")["connected"])
    assert publisher("publish", name, "x")


def test_a_user_and_its_password(redis, worker, name):
    rights = ["~app:*", "&app:*", "+@read", "+@write", "+@pubsub", "+@scripting", "+@connection"]
    redis.call("ACL", "SETUSER", "me", "on", ">p@ss/word", *rights, "+time", "+command")
    user = worker(url=redis.url(user="me:p%40ss%2Fword@", path="/3?prefix=app:"))
    user("listen", name)
    user("publish", name, "let in")
    assert user("got", name) == ["let in"]
    bus = user("bus")
    assert bus["url"] == f"redis://{HOST}:{redis.port}/3?prefix=app:"
    wrong = worker(url=redis.url(user="me:wr0ng@"))
    error = wrong("refused", name, "x")
    assert "WRONGPASS" in error
    assert "check the user and the password in BUS" in error
    assert "wr0ng" not in error
    elsewhere = worker(url=redis.url(user="me:p%40ss%2Fword@", path="/0?prefix=other:"))
    assert "grant its user" in elsewhere("refused", name, "x")
    redis.call("CONFIG", "SET", "requirepass", "word")
    assert "AUTH" in worker()("refused", name, "x")
    assert worker(url=redis.url(user=":word@"))("publish", name, "x")


def test_a_full_redis_says_so_and_recovers(redis, worker, name):
    publisher = worker()
    publisher("listen", name)
    publisher("publish", name, 1)
    redis.call("CONFIG", "SET", "maxmemory", 1)
    error = publisher("refused", name, 2)
    assert "OOM" in error
    assert "maxmemory" in error
    redis.call("CONFIG", "SET", "maxmemory", 0)
    publisher("publish", name, 3)
    assert publisher("get", name, 2) == [1, 3]


def test_a_replica_is_refused_until_it_is_a_primary(redis, worker, name, until: Until):
    publisher = worker()
    publisher("publish", name, 1)
    redis.call("REPLICAOF", HOST, 1)
    error = publisher("refused", name, 2)
    assert "READONLY" in error
    assert "primary" in error
    redis.call("REPLICAOF", "NO", "ONE")

    def publishes() -> bool:
        try:
            return bool(publisher("publish", name, 3))
        except AssertionError:
            return False

    until(publishes)


def test_a_key_that_something_else_uses_is_told(redis, worker, name):
    redis.call("SET", f"sse_channel:{{{name}}}", "mine")
    error = worker()("refused", name, "x")
    assert "WRONGTYPE" in error
    assert "another prefix" in error


def test_what_others_write_is_left_out(redis, worker, name):
    one, other = worker(), worker()
    stream = f"sse_channel:{{{name}}}"
    one("listen", name)
    first = one("publish", name, "first")
    announce = "SPUBLISH" if redis.sharded else "PUBLISH"
    for rubbish in ["", "\n", "x", "9-9 1-1 jd 99999999999999999999\n", "9-9 1-1 td 3\nabc"]:
        redis.call(announce, stream, rubbish)
    redis.call("XADD", stream, "*", "hello", "world")
    one("publish", name, "second")
    assert one("get", name, 2) == ["first", "second"]
    assert other("listen", name, first) is None
    assert other("got", name) == ["second"]


def test_history_is_bounded_by_count_and_bytes(redis, worker, name):
    publisher = worker(SSE_CHANNEL_HISTORY_BYTES="200000")
    for number in range(60):
        publisher("publish", name, str(number % 10) * 20_000)
    length = redis.call("XLEN", f"sse_channel:{{{name}}}")
    assert 5 <= length <= 15
    publisher("start_publishing", "other", "p", 3000, 0, 1)
    publisher("join_publishers")
    assert 1000 <= redis.call("XLEN", "sse_channel:{other}") <= 1200
    assert 0 < redis.call("PTTL", "sse_channel:{other}") <= 86_400_000 * 9 // 8
    assert 0 < redis.call("PTTL", "sse_channel:{other}:state") <= 86_400_000 * 9 // 4


def test_many_long_histories_are_read_at_once(redis, worker, name):
    """More than Redis lets a subscriber fall behind by, in all."""
    redis.config = "client-output-buffer-limit pubsub 12mb 6mb 60\n"
    redis.kill()
    redis.start()
    one, other = worker(), worker()
    names = [f"{name}-{number}" for number in range(24)]
    firsts = [one("publish", name, "first") for name in names]
    for name in names:
        for _ in range(3):
            one("publish", name, "x" * 400_000)
    other("listen_to_all", list(zip(names, firsts, strict=True)))
    for name in names:
        assert [len(message) for message in other("get", name, 3)] == [400_000] * 3
    assert other("bus")["reconnects"] == 0


def test_gevents_hub_runs_while_a_publish_waits(redis, worker, name):
    process = worker("gevent", **PATIENT)
    process("publish", name, "connects")
    redis.signal(signal.SIGSTOP)
    try:
        ticks, _ = process("ticks_while_publishing", name, 1)
    finally:
        redis.signal(signal.SIGCONT)
    assert ticks > 10
    assert process("echo", name, 50) == 50


def test_more_publishes_than_the_buffer_holds_are_refused_at_once(redis, worker, name):
    process = worker("gevent", SSE_CHANNEL_PUBLISH_TIMEOUT="5")
    redis.kill()
    early, why = process("flood", name, 10_100)
    assert early == 100
    assert "10000 publishes wait for the bus already" in why
    redis.start()
    assert process("echo", name, 10) == 10


def test_a_forked_child_has_a_connection_of_its_own(redis, worker, name):
    process = worker()
    process("listen", name)
    process("publish", name, "before")
    assert process("fork_and_echo", name, 20) == 20
    assert process("connections_in_child") == [1, 0]
    process("publish", name, "after")
    assert process("get", name, 22) == ["before", *range(20), "after"]


def test_a_channel_without_clients_is_let_go_of(redis, worker, name, until: Until):
    process = worker()
    process("listen", name)
    process("listen", "stays")
    assert len(subscriptions(redis)) == 2
    process("unlisten", name)
    until(lambda: subscriptions(redis) == [b"sse_channel:{stays}"])
    event_id = process("publish", name, "unheard")
    assert process("listen", name) is None
    process("publish", name, "heard")
    assert process("got", name) == ["heard"]
    assert process("listen", name, event_id, "again") is None
    assert process("got", "again") == ["heard"]
    process("publish", "stays", 1)
    assert process("got", "stays") == [1]


def test_an_idle_process_sleeps(worker, name):
    process = worker()
    process("listen", name)
    process("publish", name, 1)
    time.sleep(1)
    before = process("wakeups")
    time.sleep(3)
    assert process("wakeups") == before
    assert before


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for localhost that nobody else signed."""
    for line in [
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-keyout ca.key -out ca.pem -subj /CN=authority",
        "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
        "-keyout server.key -out server.csr -subj /CN=localhost",
        "openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 "
        "-extfile names -out server.pem",
    ]:
        (tmp_path / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        subprocess.run(line.split(), cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "ca.pem"


def test_tls(redis, worker, certificate, name):
    home = certificate.parent
    for option, file in [("cert", "server.pem"), ("key", "server.key"), ("ca-cert", "ca.pem")]:
        redis.call("CONFIG", "SET", f"tls-{option}-file", home / file)
    redis.call("CONFIG", "SET", "tls-auth-clients", "no")
    port = free_port()
    try:
        redis.call("CONFIG", "SET", "tls-port", port)
    except RespError as error:
        missing(f"TLS in redis-server ({error})")
    one = worker(url=f"rediss://localhost:{port}/0?ca={certificate}")
    other = worker()
    other("listen", name)
    assert one("echo", name, 20) == 20
    assert other("get", name, 20) == list(range(20))
    untrusting = worker(url=f"rediss://localhost:{port}")
    assert "certificate" in untrusting("refused", name, "x")
    plain = worker(url=f"rediss://{HOST}:{redis.port}", SSE_CHANNEL_PUBLISH_TIMEOUT="8")
    assert "TLS" in plain("refused", name, "x")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("redis://", "host"),
        ("redis://u:secret@h/x", "database"),
        ("redis://u:se/cret@h", "%2F"),
        ("redis://h?prefx=x", "prefx"),
        ("redis://h?ca=/x", "rediss://"),
        ("redis://u:12?secret@h", "%3F"),
        ("redis://u:12?prefix=secret@h", "%3F"),
        ("redis://h?password=secret", "before the host"),
        ("redis:/u:secret@h", "redis://host"),
        ("redis:u:secret@h", "redis://host"),
        ("u:secret@h:6379", "redis://host"),
        ("redis://u:secret", "redis://u:***"),
        ("redis://:secret/0", "redis://:***"),
        ("redis:secret", "redis:***"),
        ("u:sec/ret", "u:***"),
        ("redis://[::1]:secret", "redis://[::1]:***"),
        # Nothing that is needed to see the mistake is hidden.
        ("redis://h:6379/x", "redis://h:6379/x"),
        ("redis://[::1]:6379/x", "redis://[::1]:6379/x"),
        ("h:6379", "h:6379"),
        ("local:/a:b", "local:/a:b"),
    ],
)
def test_a_bad_url_is_named_without_its_password(url, named):
    with pytest.raises(ValueError, match="bus") as refused:
        configure(bus=url)
    assert named in str(refused.value)
    assert "cret" not in str(refused.value)
