"""Who may listen: permissions, rights that are taken away, limits, and pages of other origins."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.test import RequestFactory
from django.utils.functional import SimpleLazyObject

import sse_channel
from buses import BUSES, bus_of, lock_holder
from handover import taken
from redis_server import Worker
from servers import Server, cover_workers, open_stream, open_streams
from servers import until as until_
from sse_channel import SSEChannel, stats
from sse_channel.django import EventStreamResponse, EventStreamView, everybody
from sse_channel.django.identity import address_of, user_of

COME_BACK_LATER = b"retry: 30000\n\n"


def request_of(path: str = "/", **headers: str):
    return RequestFactory().get(path, headers=headers)


def body_of(response) -> bytes:
    return b"".join(response)


# --- Disconnecting ---------------------------------------------------------------------------


def test_disconnect_ends_the_streams_of_a_user_and_of_a_channel(name):
    one, other = SSEChannel(name), SSEChannel(f"{name}-other")

    def opened(channel, user):
        return EventStreamResponse(request_of(), channel, user=user)._stream

    streams = {
        (channel.name, user): opened(channel, user) for channel in (one, other) for user in "ab"
    }
    both = EventStreamResponse(request_of(), one, other, user="c")._stream
    nobody = opened(one, None)
    queue = one.listen()

    def ended():
        return {key for key, stream in streams.items() if stream.closed}

    sse_channel.disconnect(user="a", channel=one)
    assert ended() == {(one.name, "a")}
    sse_channel.disconnect(user="a")
    assert ended() == {(one.name, "a"), (other.name, "a")}
    assert not both.closed
    assert not nobody.closed
    one.disconnect()
    assert ended() == {*streams} - {(other.name, "b")}
    # That of another channel as well goes with it.
    assert both.closed
    assert nobody.closed
    assert not queue.closed
    assert one.stats()["disconnected"]["revoked"] == 4
    assert sum(one.stats()["clients"].values()) == 1
    other.disconnect(user="b")
    assert ended() == {*streams}
    one.unlisten(queue)


def test_what_waits_for_one_who_is_disconnected_is_not_sent(channel):
    stream = channel.stream()
    next(stream)
    channel.publish("secret")
    channel.disconnect()
    assert list(stream) == []


def test_rendered_streams_are_disconnected_too(channel):
    with channel.stream(render=str) as stream, channel.stream(render=str) as other:
        SSEChannel(f"{channel.name}-other").disconnect()
        assert not stream.closed
        channel.disconnect()
        assert stream.closed
        assert other.closed


def test_a_private_channel_disconnects_its_own(until):
    private, named = SSEChannel(), SSEChannel()
    with private.stream() as stream, named.stream() as other:
        connection = taken(private)
        connection.settimeout(30)
        elsewhere = taken(named)
        private.disconnect()
        assert stream.closed
        assert not other.closed
        while connection.recv(4096):
            pass
        until(lambda: private.stats()["clients"]["socket"] == 0)
        assert named.stats()["clients"]["socket"] == 1
        for each in (connection, elsewhere):
            each.close()
    with pytest.raises(ValueError, match="private"):
        sse_channel.disconnect(channel=private)


def test_an_offloaded_client_that_is_disconnected_gets_nothing_more_and_a_clean_end(channel, until):
    connection = taken(channel, chunked=True)
    connection.settimeout(30)
    until(lambda: channel.stats()["clients"]["socket"] == 1)
    # It does not read: most of this waits.
    for n in range(50):
        channel.publish(f"{n}:" + "x" * 20_000)
    channel.disconnect()
    received = b""
    with connection:
        while data := connection.recv(1 << 16):
            received += data
    assert received.endswith(b"\r\n0\r\n\r\n")
    assert b"49:" not in received
    until(lambda: channel.stats()["disconnected"]["revoked"] == 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "needs user="),
        ({"channel": 5}, TypeError, "channel must be a str"),
        ({"user": AnonymousUser()}, ValueError, "no primary key: .* not logged in"),
        ({"user": User(username="deleted")}, ValueError, r"taken before delete\(\).*user\.pk"),
    ],
)
def test_disconnect_says_what_it_needs(arguments, error, message):
    with pytest.raises(error, match=message):
        sse_channel.disconnect(**arguments)


def test_the_librarys_own_channel_is_nobody_elses():
    with pytest.raises(ValueError, match="the library's own"):
        SSEChannel("sse_channel.control")
    assert "sse_channel.control" not in stats()["channels"]


# --- The view --------------------------------------------------------------------------------


def answer(path="/", view=None, method="get", headers=None, **kwargs):
    request = getattr(RequestFactory(), method)(path, headers=headers)
    request.user = AnonymousUser()
    return (view or EventStreamView.as_view(permission=everybody))(request, **kwargs)


def test_who_may_not_listen_gets_403_and_opens_nothing(name):
    asked = []

    def permission(request, channel):
        asked.append(channel)
        return channel == name

    view = EventStreamView.as_view(permission=permission)
    refused = answer(view=view, channels=f"{name},{name}-secret,{name}-third")
    assert refused.status_code == 403
    assert f"{name}-secret" in refused.content.decode()
    assert asked[:2] == [name, f"{name}-secret"]
    assert f"{name}-secret" not in stats()["channels"]
    assert len(SSEChannel(name).listeners) == 0
    response = answer(view=view, channel=name)
    assert response.status_code == 200
    assert len(SSEChannel(name).listeners) == 1
    response.close()


def test_a_right_that_is_taken_away_while_the_stream_is_opened_is_asked_for_again(name):
    rights = {"5"}

    class Late(EventStreamView):
        def permission(self, request, channel):
            may = "5" in rights
            # From here on it has it no more: what was asked is not true any more.
            rights.clear()
            sse_channel.disconnect(user="5")
            return may

    assert answer(view=Late.as_view(stream_options={"user": "5"}), channel=name).status_code == 403
    assert len(SSEChannel(name).listeners) == 0


@pytest.mark.parametrize(
    ("lost", "status"),
    [
        ("permission", 403),
        ("is_active", 403),
        ("user", 403),
        ("session", 403),
        ("of another", 200),
        ("nothing", 200),
    ],
)
@pytest.mark.parametrize("logged_in", ["by session", "by token"])
@pytest.mark.parametrize("asks", ["user", "auser", "property"])
def test_it_is_asked_again_with_the_user_and_the_session_of_then(
    script, lost, status, logged_in, asks
):
    if (lost, logged_in) == ("session", "by token"):
        status = 200
    out = script(
        """
import functools, sys
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=[f"django.contrib.{name}" for name in ("contenttypes", "auth", "sessions")],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    SSE_CHANNEL={"BUS": "memory://"}, SECRET_KEY="only for tests",
)
django.setup()
from importlib import import_module
from asgiref.sync import async_to_sync
from django.contrib.auth import login
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.auth.models import Permission, User
from django.core.management import call_command
from django.test import RequestFactory
from sse_channel import SSEChannel, disconnect
from sse_channel.django import EventStreamView, everybody

User.may = functools.cached_property(lambda user: user.has_perm("auth.view_user"))
User.may.__set_name__(User, "may")
call_command("migrate", verbosity=0)
lost, logged_in, asks = sys.argv[1:]
user = User.objects.create(username="reader")
user.user_permissions.add(Permission.objects.get(codename="view_user"))
store = import_module(settings.SESSION_ENGINE).SessionStore
asked = []

def revoke(session):
    if lost == "permission":
        User.objects.get().user_permissions.clear()
    elif lost == "is_active":
        User.objects.update(is_active=False)
    elif lost == "user":
        User.objects.all().delete()
    elif lost == "session":
        store(session).flush()
    if lost != "nothing":
        disconnect(user=user.pk if lost != "of another" else 999)

async def user_of(request):
    return await request.auser()

class View(EventStreamView):
    def permission(self, request, channel):
        assert request is self.request
        asked.append(request)
        its = async_to_sync(user_of)(request) if asks == "auser" else request.user
        # What a middleware put beside it, of a second factor for one.
        may = its.has_perm("auth.view_user") and (asks == "auser" or its.is_verified())
        if asks == "property":
            may = getattr(its, "may", False)
        if len(asked) == 1:
            revoke(request.session.session_key)
        return may

request = RequestFactory().get("/")
request.session = store()
if logged_in == "by session":
    login(request, user)
    request.session.save()
    request.session = store(request.session.session_key)
    AuthenticationMiddleware(lambda request: None).process_request(request)
else:
    request.session.save()
    request.user = User.objects.get()
    async def auser():
        return request.user
    request.auser = auser
request.user.is_verified = lambda: True
# Before a process has its first stream, it is asked twice in any case.
first = EventStreamView.as_view(permission=everybody)(RequestFactory().get("/"), channel="first")
response = View.as_view()(request, channel="news")
assert len(SSEChannel("news").listeners) == (response.status_code == 200)
assert asked[0] is request
print(response.status_code, len(asked))
""",
        lost,
        logged_in,
        asks,
    )
    answered, asked = out.split()
    assert int(answered) == status
    if lost == "nothing":
        assert asked == "1"


@pytest.mark.parametrize(
    "its",
    [User(pk=5, username="of a gateway"), User(username="guest"), AnonymousUser(), object(), None],
)
def test_a_user_that_is_not_stored_is_asked_again_as_it_was(name, its):
    asked = []

    class Asks(EventStreamView):
        def permission(self, request, channel):
            asked.append(request.user)
            sse_channel.disconnect(user="another")
            return True

    request = request_of()
    request.user = its
    response = Asks.as_view()(request, channel=name)
    assert response.status_code == 200
    assert asked == [its, its]
    response.close()


def test_the_stream_ends_when_the_second_ask_fails(name):
    asked = []

    class Fails(EventStreamView):
        def permission(self, request, channel):
            asked.append(channel)
            if len(asked) == 2:
                raise PermissionDenied
            sse_channel.disconnect(user="another")
            return True

    with pytest.raises(PermissionDenied) as held:
        answer(view=Fails.as_view(), channel=name)
    assert len(SSEChannel(name).listeners) == 0
    del held


def test_it_is_asked_again_outside_of_what_the_request_has_seen(script, tmp_path):
    out = script(
        """
import sys, threading
import django
from django.conf import settings
database = {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1], "ATOMIC_REQUESTS": True}
settings.configure(
    ROOT_URLCONF=__name__, SECRET_KEY="only for tests", ALLOWED_HOSTS=["*"],
    DATABASES={"default": database}, SSE_CHANNEL={"BUS": "memory://"},
)
django.setup()
from django.db import connection
from django.test import Client
from django.urls import path
from django.views.decorators.http import require_safe
from sse_channel import disconnect
from sse_channel.django import EventStreamView

def execute(statement):
    with connection.cursor() as cursor:
        return cursor.execute(statement).fetchone()

# Where a transaction goes on to see what it has seen, and nobody waits for its end.
execute("PRAGMA journal_mode=WAL")
execute("CREATE TABLE readers (name)")
execute("INSERT INTO readers VALUES ('reader')")
asked = []

def revoke():
    execute("DELETE FROM readers")
    disconnect(channel="news")
    connection.close()

def may_listen(request, channel):
    may = execute("SELECT count(*) FROM readers") == (1,)
    asked.append(may)
    if len(asked) == 1:
        other = threading.Thread(target=revoke)
        other.start()
        other.join()
    return may

urlpatterns = [
    path("<str:channel>/", require_safe(EventStreamView.as_view(permission=may_listen))),
]
print(Client().get("/news/").status_code, asked)
""",
        str(tmp_path / "database"),
    )
    assert out == "403 [True, False]\n"


def test_an_asynchronous_permission_is_awaited_however_it_is_written(name):
    async def permission(request, channel):
        return channel == name

    class Callable:
        async def __call__(self, request, channel):
            return channel == name

    for each in (permission, lambda *arguments: permission(*arguments), Callable()):
        view = EventStreamView.as_view(permission=each)
        assert answer(view=view, channel="other").status_code == 403
        response = answer(view=view, channel=name)
        assert response.status_code == 200
        response.close()


def test_a_permission_that_answers_neither_yes_nor_no_lets_nobody_in(name):
    for unclear in (None, 1, "yes"):
        view = EventStreamView.as_view(permission=lambda request, channel, is_it=unclear: is_it)
        with pytest.raises(TypeError, match="permission must return True or False"):
            answer(view=view, channel=name)
    assert len(SSEChannel(name).listeners) == 0


def test_channels_come_from_the_project_the_route_or_the_query(name):
    other = SSEChannel(f"{name}-other", history=7)
    for view, path, kwargs, want in [
        (EventStreamView.as_view(channels=[name, other]), "/", {}, {name, other.name}),
        (EventStreamView.as_view(channels=lambda request: [other]), "/", {}, {other.name}),
        (EventStreamView.as_view(channels=name), "/", {}, {name}),
        (EventStreamView.as_view(channels=other), "/", {}, {other.name}),
        (EventStreamView.as_view(channels=lambda request: name), "/", {}, {name}),
        (EventStreamView.as_view(channels=lambda request: other), "/", {}, {other.name}),
        (None, "/", {"channel": name}, {name}),
        (None, "/", {"channels": f"{name},{other.name},{name}"}, {name, other.name}),
        (
            EventStreamView.as_view(query=True, permission=everybody),
            f"/?channel={name}&channel={other.name}",
            {},
            {name, other.name},
        ),
    ]:
        response = answer(path, view, **kwargs)
        assert response.status_code == 200
        listening = {each for each in (name, other.name) if len(SSEChannel(each).listeners)}
        assert listening == want
        response.close()


def test_channels_that_cannot_be_are_refused(name):
    query = EventStreamView.as_view(query=True, permission=everybody)
    for path, view, kwargs, message in [
        ("/", query, {}, "Name 1 to 10 channels, not 0"),
        ("/?" + "&".join(f"channel={n}" for n in range(11)), query, {}, "not 11"),
        ("/", None, {"channels": "a,,b"}, "1 to 255 bytes"),
        ("/", None, {"channel": "x" * 256}, "1 to 255 bytes"),
        ("/", None, {"channel": "sse_channel.control"}, "library's own"),
    ]:
        refused = answer(path, view, **kwargs)
        assert refused.status_code == 400
        assert message in refused.content.decode()


def test_a_mistake_of_the_project_is_no_bad_request_and_not_told_to_the_client(name):
    def channels(request):
        return [int("the project's secret")]

    class Overridden(EventStreamView):
        def get_channels(self):
            return super().get_channels() + [SSEChannel(each) for each in channels(self.request)]

    for view, says in [
        (EventStreamView.as_view(channels=channels), "secret"),
        (Overridden.as_view(permission=everybody), "secret"),
        (EventStreamView.as_view(channels=["x" * 256]), "1 to 255 bytes"),
    ]:
        with pytest.raises(ValueError, match=says):
            answer(view=view, channel=name)
    # What the URL says is the client's all the same.
    assert answer(view=Overridden.as_view(permission=everybody), channel="").status_code == 400


def test_a_view_without_channels_or_permission_is_a_mistake_of_the_project():
    for view, kwargs, message in [
        (EventStreamView.as_view(), {}, "has no channels"),
        (EventStreamView.as_view(), {"channel": "a"}, "has no permission"),
        (EventStreamView.as_view(query=True), {}, "has no permission"),
        (EventStreamView.as_view(channels=lambda request: []), {}, "gives no channel"),
        (
            EventStreamView.as_view(channels=[SSEChannel()], permission=everybody),
            {},
            "no name to ask for",
        ),
    ]:
        with pytest.raises(ImproperlyConfigured, match=message):
            answer(view=view, **kwargs)


def test_other_methods_are_not_allowed(name):
    assert answer(method="post", channel=name).status_code == 405
    assert answer(method="head", channel=name).status_code == 200
    assert len(SSEChannel(name).listeners) == 0


# --- Pages of other origins ------------------------------------------------------------------


def test_pages_of_other_origins_need_to_be_named_exactly(name, options):
    options(cors_origins=["https://app.example", "http://localhost:5173"])

    def headers_for(origin, **kwargs):
        response = answer(headers={"Origin": origin} if origin else {}, **kwargs)
        response.close()
        return {
            key: value
            for key, value in response.headers.items()
            if key.startswith("Access-Control") or key == "Vary"
        }

    allowed = {
        "Access-Control-Allow-Origin": "https://app.example",
        "Access-Control-Allow-Credentials": "true",
        "Vary": "Origin",
    }
    assert headers_for("https://app.example", channel=name) == allowed
    for origin in (None, "https://evil.example", "https://app.example:8443", "null"):
        assert headers_for(origin, channel=name) == {"Vary": "Origin"}
    # A page must be able to read that it may not listen, too.
    nobody = EventStreamView.as_view(permission=lambda request, channel: False)
    assert headers_for("https://app.example", view=nobody, channel=name) == allowed
    preflight = headers_for("https://app.example", method="options", channel=name)
    assert preflight == {
        **allowed,
        "Access-Control-Allow-Methods": "GET",
        "Access-Control-Allow-Headers": "Last-Event-ID, Cache-Control",
    }
    options(cors_origins=["*"])
    assert headers_for("https://evil.example", channel=name) == {"Access-Control-Allow-Origin": "*"}


@pytest.mark.parametrize(
    ("origins", "error", "message"),
    [
        ("https://app.example", TypeError, "must be a list of origins, not str"),
        ([5], TypeError, "must hold origins as str"),
        (["app.example"], ValueError, "write scheme and host"),
        (["https://app.example/"], ValueError, "without a path"),
        (["https://App.example"], ValueError, "as the browser does"),
        (["*", "https://app.example"], ValueError, "either all or some"),
    ],
)
def test_origins_are_checked(options, origins, error, message):
    with pytest.raises(error, match=message):
        options(cors_origins=origins)


# --- Limits ----------------------------------------------------------------------------------


def test_a_user_and_an_address_have_limits(name, options):
    options(max_clients_per_user=2, max_clients_per_address=3)
    refused = stats()["offload"]["refused"]
    opened = []

    def is_let_in(user, address):
        request = RequestFactory().get("/", REMOTE_ADDR=address)
        response = EventStreamResponse(request, name, user=user)
        opened.append(response)
        if response._stream is not None:
            return True
        assert response.status_code == 200
        assert body_of(response) == COME_BACK_LATER
        return False

    assert [is_let_in("u", f"10.0.0.{n}") for n in range(4)] == [True, True, False, False]
    assert [is_let_in(f"v{n}", "10.1.0.1") for n in range(4)] == [True, True, True, False]
    # Who is nobody's, and from nowhere, counts with the process alone.
    assert all(is_let_in(None, "") for _ in range(5))
    now = stats()["offload"]["refused"]
    assert now["user"] - refused.get("user", 0) == 2
    assert now["address"] - refused.get("address", 0) == 1
    opened[0].close()
    assert is_let_in("u", "10.0.0.9")
    for response in opened:
        response.close()


def test_the_address_is_told_by_as_many_proxies_as_there_are(options):
    def address(**meta):
        return address_of(RequestFactory().get("/", **meta))

    forwarded = "6.6.6.6, 203.0.113.7, 10.0.0.2"
    assert address(REMOTE_ADDR="10.0.0.1", HTTP_X_FORWARDED_FOR=forwarded) == "10.0.0.1"
    options(proxies=1)
    assert address(REMOTE_ADDR="10.0.0.1", HTTP_X_FORWARDED_FOR=forwarded) == "10.0.0.2"
    options(proxies=2)
    assert address(REMOTE_ADDR="10.0.0.1", HTTP_X_FORWARDED_FOR=forwarded) == "203.0.113.7"
    for written in ("203.0.113.7:4711", "[2001:db8::1]:4711", "2001:db8::1"):
        told = address(REMOTE_ADDR="", HTTP_X_FORWARDED_FOR=f"{written}, 10.0.0.2")
        assert told in ("203.0.113.7", "2001:db8::1")
    # Not by way of them: the connection's.
    assert address(REMOTE_ADDR="10.0.0.1", HTTP_X_FORWARDED_FOR="1.1.1.1") == "10.0.0.1"
    assert address(REMOTE_ADDR="") is None


def test_the_user_is_that_of_the_request():
    request = request_of()
    assert user_of(request) is None
    request.user = AnonymousUser()
    assert user_of(request) is None
    # One that was asked for before another way of logging in knew better.
    request._cached_user = AnonymousUser()
    request.user = User(pk=5)
    assert user_of(request) == "5"


def test_a_coroutine_knows_a_user_that_was_asked_for_in_any_way():
    def lazy(of, is_asked):
        user = SimpleLazyObject(lambda: of)
        if is_asked:
            str(user)
        return user

    async def user_of_it(request):
        return user_of(request)

    for user, cached, known in [
        (lazy(User(pk=5), True), {}, "5"),
        # A middleware's way of logging in knows better than the session.
        (lazy(User(pk=5), True), {"_cached_user": AnonymousUser()}, "5"),
        (lazy(AnonymousUser(), True), {}, None),
        # To ask now would hold up the loop.
        (lazy(User(pk=5), False), {}, None),
        (lazy(User(pk=5), False), {"_acached_user": User(pk=6)}, "6"),
        (lazy(User(pk=5), False), {"_cached_user": User(pk=6)}, "6"),
    ]:
        request = request_of()
        vars(request).update(cached, user=user)
        assert asyncio.run(user_of_it(request)) == known


# --- Real servers ----------------------------------------------------------------------------


@pytest.mark.parametrize("bus", BUSES)
def test_what_is_published_after_a_disconnect_reaches_none_of_its_streams(bus):
    """Also where their process learns of both at once, because it was busy."""
    with bus_of(bus) as shared, ExitStack() as workers:
        held, other = (workers.enter_context(closing(Worker(shared.url))) for _ in range(2))
        for number in range(20):
            name = f"news-{number}"
            held("follow_stream", name)

            def is_told(name: str = name) -> bool:
                with held.stopped():
                    # Who is stopped with the bus's lock keeps all others from it.
                    if lock_holder(shared.url) == held.pid:
                        return False
                    other("disconnect_and_publish", name, "for others")
                    return True

            until_(is_told, "it is published")
            until_(lambda name=name: held("followed_so_far", name)[-1:] == ["end"], "the end")
            assert held("followed_so_far", name) == ["end"]


@pytest.mark.parametrize("bus", BUSES)
@pytest.mark.parametrize("kind", ["gunicorn-sync-3", "gunicorn-gevent-3", "uvicorn-asyncio"])
def test_who_loses_the_right_is_disconnected_in_every_worker(tmp_path, kind, bus):
    offload = kind != "gunicorn-gevent-3"
    with (
        bus_of(bus) as shared,
        Server(
            kind, tmp_path, bus=shared.url, settings="observed.users_settings", offload=offload
        ) as server,
    ):
        bob = {"Cookie": server.cookie_of("bob", "news,other")}
        eve = {"Cookie": server.cookie_of("eve", "news")}
        # Django's asynchronous half does not run beside greenlets.
        awaiting = "/events/news/" if kind == "gunicorn-gevent-3" else "/awaited/news/"
        for path in ("/events/news/", awaiting):
            refused = server.request("GET", path)
            assert refused.status == 403
            assert b"may not listen" in refused.body
        assert server.clients() == 0
        with (
            cover_workers(server, "/events/news/", **bob) as his,
            cover_workers(server, "/events/news/", **eve) as hers,
            open_stream(server, "/events/other/", **bob) as elsewhere,
            open_stream(server, awaiting, **bob) as awaited,
        ):
            before = server.request("GET", "/publish/news/before/").body.decode()
            until_(lambda: all(stream.events for stream in [*his, *hers, awaited]), "an event")
            assert server.request("GET", "/revoke/bob/news/").status == 200
            server.request("GET", "/publish/news/after/")
            until_(lambda: all(len(stream.events) == 2 for stream in hers), "the next")
            until_(lambda: all(stream.is_ended for stream in [*his, awaited]), "their end")
            for stream in [*his, awaited]:
                assert [event.data for event in stream.events] == ["before"]
                assert stream.events[0].last_event_id == before
            server.request("GET", "/publish/other/still/")
            until_(lambda: elsewhere.events, "an event of another channel")
            assert not any(stream.is_ended for stream in hers)
            # He does not come back.
            assert server.request("GET", "/events/news/", **bob).status == 403
        counts = [figures["disconnected"]["revoked"] for figures in server.figures().values()]
        assert sum(counts) == len(his) + 1


def test_nothing_of_another_channel_ever_arrives(tmp_path):
    names = [f"c{n}" for n in range(40)]
    chance = random.Random(5)
    with Server("gunicorn-sync-3", tmp_path, settings="observed.users_settings") as server:
        wanted = [chance.sample(names, chance.randint(1, 5)) for _ in range(120)]
        with ThreadPoolExecutor(8) as threads:
            contexts = [
                open_streams(server, "/public/?" + "&".join(f"channel={name}" for name in its))
                for its in wanted
            ]
            opened = [context.__enter__()[0] for context in contexts]
            try:
                sent = [(name, f"{name}-{n}") for n in range(5) for name in names]
                chance.shuffle(sent)
                list(
                    threads.map(
                        lambda one: server.request("GET", f"/publish/{one[0]}/{one[1]}/"), sent
                    )
                )
                # Comes last, to each of them.
                for name in names:
                    server.request("GET", f"/publish/{name}/end-{name}/")
                for stream, its in zip(opened, wanted, strict=True):
                    until_(lambda s=stream, i=its: len(s.events) >= 6 * len(i), "all of its own")
                    got = sorted(event.data for event in stream.events)
                    want = [f"{name}-{n}" for name in its for n in range(5)]
                    assert got == sorted([*want, *(f"end-{name}" for name in its)])
            finally:
                for context in contexts:
                    context.__exit__(None, None, None)
