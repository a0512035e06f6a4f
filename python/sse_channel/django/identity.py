"""Whose a request is: its user, its address, and whether its page may read the answer."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

from django.contrib.auth import SESSION_KEY, get_user
from django.db.models import Model
from django.http import HttpRequest, HttpResponseBase
from django.utils.cache import patch_vary_headers
from django.utils.functional import LazyObject, empty

from ..config import options
from ..control import user_key

__all__ = ["address_of", "allow_origin", "as_it_is_now", "user_of"]


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

    A user keeps what it was once asked, its permissions above all.
    """
    now = copy.copy(request)
    session: Any = getattr(request, "session", None)
    # What this very request changed is not stored yet.
    if session is not None and session.session_key and not session.modified:
        setattr(now, "session", type(session)(session.session_key))  # noqa: B010
    user: Any = getattr(request, "user", None)
    logged_in = None if session is None else session.get(SESSION_KEY)
    again: Any
    unasked = isinstance(user, LazyObject) and user._wrapped is empty
    if unasked or getattr(user, "is_anonymous", False):
        if logged_in is None:
            return now
        # Whoever asked before has done so by `auser`.
        again = get_user(now)
    elif not isinstance(user, Model):
        return now
    elif logged_in == user._meta.pk.value_to_string(user):
        again = get_user(now)
    else:
        # As another way of logging in gave it.
        users: Any = user._meta.model._base_manager.using(user._state.db)
        again = users.filter(pk=user.pk).first()
        if again is None:
            return None

    async def auser() -> Any:
        return again

    vars(now).update(user=again, auser=auser)
    return now


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
