"""What is published when a transaction is committed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from decimal import Decimal

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.contenttypes.models import ContentType
from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase

from sse_channel import Event, SSEChannel, config, stats
from sse_channel.django import apublish_on_commit, publish_on_commit
from sse_channel.testing import capture

pytestmark = pytest.mark.usefixtures("database")


@pytest.fixture
def q(channel):
    with contextlib.closing(channel.listen()) as queue:
        yield queue


def drain(queue):
    return [queue.get_nowait() for _ in range(queue.qsize())]


def test_it_is_published_at_the_commit_as_it_was_at_the_call(channel, q):
    message = {"headline": "Rain"}
    with transaction.atomic():
        publish_on_commit(channel, message)
        message["headline"] = "changed"
        assert q.empty()
        with transaction.atomic():
            publish_on_commit(channel.name, "by name")
        assert q.empty(), "the end of a savepoint is no commit"
    assert drain(q) == [{"headline": "Rain"}, "by name"]


def test_outside_of_a_transaction_it_is_published_at_once(channel, q):
    publish_on_commit(channel, [1])
    assert drain(q) == [[1]]


def test_a_rollback_publishes_nothing_and_a_savepoints_only_what_came_before(channel, q):
    with contextlib.suppress(ZeroDivisionError), transaction.atomic():
        publish_on_commit(channel, "lost")
        raise ZeroDivisionError
    with transaction.atomic():
        publish_on_commit(channel, "before")
        with contextlib.suppress(ZeroDivisionError), transaction.atomic():
            publish_on_commit(channel, "within")
            raise ZeroDivisionError
        publish_on_commit(channel, "after")
    assert drain(q) == ["before", "after"]


def test_all_of_an_event_arrives(channel):
    with channel.stream() as stream:
        next(stream)
        with transaction.atomic():
            publish_on_commit(channel, Event({"n": 1}, event="a", retry=7, comment="c"))
            publish_on_commit(channel, "text", event="b")
        sent = next(stream).decode()
    assert ': c\nevent: a\nretry: 7\ndata: {"n":1}\n\n' in sent
    assert sent.endswith("event: b\ndata: text\n\n")


@pytest.mark.parametrize(
    ("message", "event", "error", "says"),
    [
        (object(), None, TypeError, "cannot be sent as JSON"),
        (float("nan"), None, ValueError, "NaN"),
        ("\ud800", None, ValueError, "surrogate|UTF-8"),
        ("x", "error", ValueError, "error"),
        ("x", 7, TypeError, "event must be a str"),
        (Event("x", event="a"), "b", TypeError, "given twice"),
        ("x" * (1 << 20), None, ValueError, "MAX_EVENT_BYTES|bytes"),
    ],
)
def test_bad_input_raises_at_the_call(channel, q, message, event, error, says):
    with transaction.atomic():
        with pytest.raises(error, match=says):
            publish_on_commit(channel, message, event=event)
        publish_on_commit(channel, "good")
    assert drain(q) == ["good"]


def test_what_is_no_channel_is_refused():
    with pytest.raises(TypeError, match="channel must be an SSEChannel or its name, not int"):
        publish_on_commit(7, "x")


def test_a_private_channels_queue_gets_the_object_itself():
    private = SSEChannel()
    q = private.listen()
    message = {"a": 1}
    publish_on_commit(private, message)
    assert q.get_nowait() is message


def test_a_bus_that_fails_loses_no_data_and_no_other_hook(channel, short_path, caplog):
    short_path.chmod(0o777)
    before = stats()["unsent"]
    ran = []
    with config.overridden(bus=f"local://{short_path}"), caplog.at_level(logging.ERROR):
        with transaction.atomic():
            row = ContentType.objects.create(app_label="a", model=channel.name)
            publish_on_commit(channel, "x")
            transaction.on_commit(lambda: ran.append("behind"))
        publish_on_commit(channel, "at once")
    assert ContentType.objects.filter(pk=row.pk).exists()
    row.delete()
    assert ran == ["behind"]
    assert stats()["unsent"] == before + 2
    records = [record for record in caplog.records if record.name == "sse_channel"]
    assert len(records) == 2
    assert f"not published after the commit, on channel {channel.name!r}" in records[0].message
    assert str(short_path) in records[0].message
    assert records[0].exc_info is not None


class Stamped(SSEChannel):
    def publish(self, message, **options):
        return super().publish({"message": str(message), "stamp": 1}, **options)

    async def apublish(self, message, **options):
        return await super().apublish({"message": str(message), "stamp": 2}, **options)


def test_a_subclass_with_its_own_publish_has_it_called(name, caplog):
    channel = Stamped(name)
    with contextlib.closing(channel.listen()) as queue, transaction.atomic():
        # Only by it something that can be sent.
        publish_on_commit(channel, Decimal)
        publish_on_commit(channel, "x", event="named")
        async_to_sync(apublish_on_commit)(channel, "y")
        assert queue.empty()
    told = [{"message": text, "stamp": 1} for text in (str(Decimal), "x", "y")]
    assert drain(queue) == told
    with capture(channel) as published:
        publish_on_commit(channel, "x", event="named")
        before = stats()["unsent"]
        publish_on_commit(channel, "x", event="error")
    assert published.events == ["named"]
    assert stats()["unsent"] == before + 1
    assert "the browser's own" in caplog.text


def test_a_publish_that_is_replaced_has_it_called(channel, q, monkeypatch):
    got = []
    monkeypatch.setattr(SSEChannel, "publish", lambda self, message: got.append(message))
    publish_on_commit(channel, "x")
    assert got == ["x"]
    assert q.empty()


def test_manual_transactions_are_refused_as_django_does(channel, q):
    transaction.set_autocommit(False)
    try:
        with pytest.raises(transaction.TransactionManagementError, match="on_commit"):
            publish_on_commit(channel, "x")
    finally:
        transaction.set_autocommit(True)
    assert q.empty()


def test_a_coroutine_publishes_at_once_and_its_synchronous_code_at_the_commit(channel, q):
    def save():
        with transaction.atomic():
            publish_on_commit(channel, "saved")
            assert q.empty()

    async def main():
        await apublish_on_commit(channel, "now")
        assert drain(q) == ["now"]
        await sync_to_async(save)()
        assert drain(q) == ["saved"]
        with pytest.raises(TypeError, match="as JSON"):
            await apublish_on_commit(channel, object())
        await sync_to_async(lambda: connection.close())()

    asyncio.run(main())


class InATestCase(TestCase):
    def setUp(self):
        self.channel = SSEChannel(f"test-case-{id(self)}")
        self.queue = self.channel.listen()
        self.addCleanup(self.queue.close)

    def test_captured_callbacks_publish(self):
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            publish_on_commit(self.channel, "x")
            assert self.queue.empty()
        assert len(callbacks) == 1
        assert drain(self.queue) == ["x"]

    def test_without_them_nothing_is_published(self):
        publish_on_commit(self.channel, "x")
        assert self.queue.empty()

    def test_a_coroutine_that_synchronous_code_runs_publishes_at_the_commit_too(self):
        with self.captureOnCommitCallbacks(execute=True):
            async_to_sync(apublish_on_commit)(self.channel, "x")
            assert self.queue.empty()
        assert drain(self.queue) == ["x"]

    async def test_an_asynchronous_test_captures_in_synchronous_code_alone(self):
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            await apublish_on_commit(self.channel, "x")
        assert not callbacks

        def captured():
            with self.captureOnCommitCallbacks(execute=True):
                publish_on_commit(self.channel, "y")
                async_to_sync(apublish_on_commit)(self.channel, "z")

        await sync_to_async(captured)()
        assert drain(self.queue) == ["y", "z"]


class InATransactionTestCase(TransactionTestCase):
    available_apps = ()

    async def test_a_coroutine_publishes_at_once(self):
        channel = SSEChannel("transaction-test-case")
        with capture(channel) as published:
            await apublish_on_commit(channel, "x")
            assert published.messages == ["x"]
