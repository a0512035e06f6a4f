"""A view for streams: which channels, and who may listen.

# urls.py
from django.urls import path
from sse_channel.django import EventStreamView

def may_listen(request, channel):
    return request.user.has_perm("news.view_channel")

urlpatterns = [
    path("events/<str:channel>/", EventStreamView.as_view(permission=may_listen)),
]
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseBadRequest,
    HttpResponseForbidden,
)
from django.http.response import HttpResponseBase
from django.views.generic import View

from .. import _sse_channel
from ..channel import SSEChannel
from . import EventStreamResponse, _channel
from .identity import allow_origin, as_it_is_now

__all__ = ["EventStreamView", "Permission", "everybody"]

#: Says whether the user of a request may listen to a channel, which is given by its name.
Permission = Callable[[HttpRequest, str], bool | Awaitable[bool]]


def everybody(request: HttpRequest, channel: str) -> bool:
    """Permit everybody to listen to every channel: ``as_view(permission=everybody)``."""
    return True


class _NoSuchChannels(ValueError):
    """What a URL names is none: its text is for the client, which no other error's text is."""


class EventStreamView(View):
    """A stream of channels that the URL, or the project, names.

    It answers GET and HEAD, and OPTIONS for pages of other origins (`CORS_ORIGINS`). Who may not
    listen gets a 403 before anything is opened, and the browser does not come back by itself. When
    the right may have been taken away while the stream was opened (by the function `disconnect`),
    it is asked again, with the session and the user as they are stored then. What else a request
    was given, by a middleware of the project, is as it was. It is not part of `ATOMIC_REQUESTS`:
    within one transaction, the second answer could be that of the first.

    The channels are the first of these that there is:

    1. `channels`: a channel or its name, several of them, or a callable that is given the request
       and gives one or several;
    2. the URL's ``<str:channel>``, one name, or ``<str:channels>``, several with commas in between;
    3. with `query`, each ``?channel=``.

    Attributes (arguments of `as_view`):
        channels: see above.
        permission: called with the request and the name of each channel; True lets listen. It may
            be asynchronous. Without it, channels that the URL names are refused as a mistake in the
            project: anybody could listen to any channel. In a class, make it a method.
        query: whether ``?channel=`` may name the channels.
        most_channels: channels of one stream at the most, by the URL; more get a 400.
        stream_options: further arguments of `EventStreamResponse`, or a callable that is given the
            request and gives them: ``stream_options={"heartbeat": 15}``.

    Raises:
        ImproperlyConfigured: at a request, for a view without channels or permission.
    """

    http_method_names = ["get", "head", "options"]  # noqa: RUF012

    channels: (
        SSEChannel
        | str
        | Sequence[SSEChannel | str]
        | Callable[[HttpRequest], SSEChannel | str | Iterable[Any]]
        | None
    ) = None
    permission: Permission | None = None
    query = False
    most_channels = 10
    stream_options: dict[str, Any] | Callable[[HttpRequest], dict[str, Any]] | None = None

    @classmethod
    def as_view(cls, **initkwargs: Any) -> Callable[..., HttpResponseBase]:
        """The view for a route; the arguments are the attributes of the class."""
        view = super().as_view(**initkwargs)
        # Settings that are not there yet are no mistake of who makes a view.
        with contextlib.suppress(ImproperlyConfigured):
            for alias in settings.DATABASES:
                view = transaction.non_atomic_requests(alias)(view)
        return view

    def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        """Open the stream, if its user may listen."""
        try:
            channels = self.get_channels()
        except _NoSuchChannels as error:
            return self._answer(HttpResponseBadRequest, str(error))
        names = [channel.name or "" for channel in channels]
        if "" in names and self.permission is not None:
            raise ImproperlyConfigured(
                f"{type(self).__name__} has a permission and a private channel, which has no name "
                "to ask for; give the channel a name, or leave the permission out"
            )
        before = _sse_channel.revocations()
        refused = self._first_refused(request, names)
        if refused is None:
            given = self.stream_options or {}
            response = EventStreamResponse(
                request, *channels, **(given(request) if callable(given) else given)
            )
            if self.permission is None or (
                before is not None and before == _sse_channel.revocations()
            ):
                return response
            # Somebody was disconnected meanwhile, or nobody would have told of it.
            with contextlib.ExitStack() as stack:
                # The stream alone: to close a response tells Django that the request is over.
                if response._stream is not None:
                    stack.callback(response._stream.close)
                now = as_it_is_now(request)
                refused = names[0] if now is None else self._first_refused(now, names)
                if refused is None:
                    stack.pop_all()
                    return response
        return self._answer(
            HttpResponseForbidden, f"You may not listen to the channel {refused!r}."
        )

    def options(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        """Say what a page of another origin may send."""
        response = super().options(request, *args, **kwargs)
        response["Access-Control-Allow-Methods"] = "GET"
        response["Access-Control-Allow-Headers"] = "Last-Event-ID, Cache-Control"
        allow_origin(request, response)
        return response

    def get_channels(self) -> list[SSEChannel]:
        """The channels of this request.

        Raises:
            ValueError: what the URL names cannot be channels, or are too many: a 400. Any other is
                a mistake of the project, and a 500; one that overrides this raises Django's
                `BadRequest` for what the client did wrong.
            ImproperlyConfigured: as the view.
        """
        if self.channels is not None:
            given = self.channels(self.request) if callable(self.channels) else self.channels
            if isinstance(given, (SSEChannel, str)):
                # Text is iterable as well, by its letters.
                given = [given]
            channels = [_channel(channel) for channel in given]
            if not channels:
                raise ImproperlyConfigured(f"{type(self).__name__}.channels gives no channel")
            return channels
        if "channel" in self.kwargs:
            names = [self.kwargs["channel"]]
        elif "channels" in self.kwargs:
            names = self.kwargs["channels"].split(",")
        elif self.query:
            names = self.request.GET.getlist("channel")
        else:
            raise ImproperlyConfigured(
                f"{type(self).__name__} has no channels: give as_view(channels=[...]), put "
                "<str:channel> into the URL's pattern, or allow ?channel= by as_view(query=True)"
            )
        if self.permission is None:
            raise ImproperlyConfigured(
                f"{type(self).__name__} lets the URL name its channels and has no permission: give "
                "as_view(permission=...), a callable (request, channel) -> bool; "
                "sse_channel.django.everybody permits everything"
            )
        if not 1 <= len(names) <= self.most_channels:
            raise _NoSuchChannels(f"Name 1 to {self.most_channels} channels, not {len(names)}.")
        try:
            return [SSEChannel(name) for name in dict.fromkeys(names)]
        except ValueError as error:
            raise _NoSuchChannels(str(error)) from error

    def _first_refused(self, request: HttpRequest, names: Iterable[str]) -> str | None:
        permission = self.permission
        if permission is None:
            return None
        before, self.request = self.request, request
        try:
            refused = (name for name in names if not is_permitted(permission, request, name))
            return next(refused, None)
        finally:
            self.request = before

    def _answer(self, answer: type[HttpResponse], text: str) -> HttpResponse:
        response = answer(f"{text}\n", content_type="text/plain; charset=utf-8")
        # Also this a page of another origin is to read, to know that it must not come back.
        allow_origin(self.request, response)
        response["Cache-Control"] = "no-store"
        return response


def is_permitted(permission: Callable[..., Any], *args: Any) -> bool:
    """Ask `permission`, which may be asynchronous.

    Raises:
        TypeError: anything else than a clear yes or no, which must not let anybody in.
    """
    answer: Any = permission(*args)
    if inspect.isawaitable(answer):
        answer = async_to_sync(_awaited)(answer)
    if not isinstance(answer, bool):
        raise TypeError(
            f"permission must return True or False, not {type(answer).__name__}: {permission!r}"
        )
    return answer


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer
