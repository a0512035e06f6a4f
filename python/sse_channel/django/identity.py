"""Whose a request is: its user, its address, and whether its page may read the answer."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth import SESSION_KEY, get_user
from django.contrib.sessions.backends.base import SessionBase
from django.core.exceptions import ObjectDoesNotExist, PermissionDenied
from django.db.models import Model
from django.http import HttpRequest, HttpResponseBase
from django.utils.cache import patch_vary_headers
from django.utils.functional import LazyObject, cached_property, empty

from ..config import options
from ..control import user_key

__all__ = ["address_of", "allow_origin", "as_it_is_now", "user_of"]

_CACHED = (functools.cached_property, cached_property)


def user_of(request: HttpRequest) -> str | None:
    """The key of the user that is logged in, None for nobody.

    In a coroutine, only a user that was asked for already (``await request.auser()``, or
    `request.user` before in synchronous code): to ask now would hold up the loop.
    """
    user: Any = getattr(request, "user", None)
    if isinstance(user, LazyObject) and asyncio._get_running_loop() is not None:
        # What was asked for already, in one way or the other.
        asked = vars(request)
        user = (
            asked.get("_acached_user") or asked.get("_cached_user")
            if user._wrapped is empty
            else user._wrapped
        )
    if user is None or not getattr(user, "is_authenticated", False):
        return None
    # One that another way of logging in made may have no key.
    return None if getattr(user, "pk", user) is None else user_key(user)


def as_it_is_now(request: HttpRequest) -> HttpRequest | None:
    """The request with its session and its user as they are stored now; None for a deleted user.

    A user keeps what it was once asked, its permissions above all. What is not stored is as it was.
    """
    now = copy.copy(request)
    session: Any = getattr(request, "session", None)
    # What this very request changed is not stored yet.
    logged_in = None
    if isinstance(session, SessionBase):
        logged_in = session.get(SESSION_KEY)
        if session.session_key and not session.modified:
            vars(now)["session"] = type(session)(session.session_key)
    attributes = vars(request)
    asked = attributes.get("auser")
    if asked is not None:

        async def auser() -> Any:
            try:
                return await sync_to_async(_read_again)(await asked(), now, logged_in)
            except ObjectDoesNotExist:
                raise PermissionDenied("the user was deleted") from None

        vars(now)["auser"] = auser
    if "user" in attributes:
        try:
            vars(now)["user"] = _read_again(attributes["user"], now, logged_in)
        except ObjectDoesNotExist:
            return None
    return now


def _read_again(user: Any, now: HttpRequest, logged_in: str | None) -> Any:
    """A user as the database and the session of `now` have it, with all that was put beside it.

    `logged_in` is the key of the user that the session was of.
    """
    while isinstance(user, LazyObject):
        if user._wrapped is empty:
            return user
        user = user._wrapped
    if not isinstance(user, Model) or user._state.adding or user._state.db is None:
        # One that a middleware made of something else, of a token's claims for one.
        return user
    if logged_in is not None and logged_in == user._meta.pk.value_to_string(user):
        theirs: Any = get_user(now)
        if theirs.pk != user.pk:
            # It has logged out, or may not log in any more.
            return theirs
    again = copy.copy(user)
    for name in list(vars(again)):
        # What it once was asked, by backends and by properties of the project.
        kept = inspect.getattr_static(type(again), name, None)
        if name.endswith("_perm_cache") or isinstance(kept, _CACHED):
            del vars(again)[name]
    again.refresh_from_db()
    return again


def address_of(request: HttpRequest) -> str | None:
    """The client's address, None where it is not known: behind a proxy over a Unix socket, say.

    With `PROXIES` = n it is the n-th from the right of ``X-Forwarded-For``: what is left of that, a
    client can have written itself.
    """
    proxies = options().proxies
    if proxies:
        hops = request.META.get("HTTP_X_FORWARDED_FOR", "").split(",")
        if len(hops) >= proxies and hops[-proxies].strip():
            return _without_port(str(hops[-proxies]).strip())[:64]
    return str(request.META.get("REMOTE_ADDR") or "") or None


def _without_port(address: str) -> str:
    """An address as some proxies write it: ``192.0.2.1:1234``, ``[2001:db8::1]:1234``."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0] if address.count(":") == 1 else address


def allow_origin(request: HttpRequest, response: HttpResponseBase) -> None:
    """Let pages of `CORS_ORIGINS` read the response, with the user's cookies.

    Source: the Fetch standard, section 3.3 "CORS protocol".
    """
    origins = options().cors_origins
    if not origins:
        return
    if origins == ("*",):
        response.headers.setdefault("Access-Control-Allow-Origin", "*")
        return
    # Also where the origin is not among them: a cache must not give others this answer.
    patch_vary_headers(response, ["Origin"])
    origin = request.headers.get("Origin")
    if origin in origins and origin is not None:
        response.headers.setdefault("Access-Control-Allow-Origin", origin)
        response.headers.setdefault("Access-Control-Allow-Credentials", "true")
