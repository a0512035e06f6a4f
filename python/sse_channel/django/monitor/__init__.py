"""The monitor: a page for staff, live by a stream of its own, of all that the streams do.

# urls.py
from django.urls import include, path

urlpatterns = [path("monitor/", include("sse_channel.django.monitor"))]
"""

from __future__ import annotations

import mimetypes
from collections.abc import Awaitable, Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseForbidden
from django.http.response import HttpResponseBase
from django.urls import NoReverseMatch, URLPattern, path, reverse
from django.utils.cache import get_conditional_response
from django.utils.http import quote_etag
from django.views.decorators.http import require_safe

from ...monitor import Monitor
from .. import EventStreamResponse
from ..views import is_permitted

__all__ = ["is_staff", "urls"]

#: Says whether the user of a request may see the monitor.
MonitorPermission = Callable[[HttpRequest], bool | Awaitable[bool]]

_PACKAGE = Path(__file__).parent
_SHARED = _PACKAGE.parent / "static" / "sse_channel" / "shared-event-source.js"

#: All that the page loads comes from beside it: no other host is needed, and no collectstatic.
_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class _MonitorResponse(EventStreamResponse):
    # When a process has all the clients that it may, somebody wants to look at it; and no page of
    # another origin is to read it.
    _is_of_the_project = False


def is_staff(request: HttpRequest) -> bool:
    """Whether the user is an active member of the staff, as Django's admin asks it.

    Raises:
        ImproperlyConfigured: a project without users.
    """
    user: Any = getattr(request, "user", None)
    if user is None:
        raise ImproperlyConfigured(
            "the monitor asks request.user, and the project has no AuthenticationMiddleware: add "
            "it, or say who may look: include((urls(permission=...), 'sse_channel'))"
        )
    return bool(user.is_active and user.is_staff)


def urls(permission: MonitorPermission = is_staff) -> list[URLPattern]:
    """The URL patterns of a monitor for those whom `permission` lets look.

    ``path("monitor/", include((urls(permission=may_look), "sse_channel")))``; the URL before them
    must end with a slash.

    Who is logged in and may not look gets a 403; who is not is sent to the login page, that of
    Django's admin if there is one, else `LOGIN_URL`.

    Args:
        permission: called with the request; True lets look. It may be asynchronous.
    """
    if not callable(permission):
        raise TypeError(f"permission must be a callable, not {type(permission).__name__}")

    @require_safe
    def page(request: HttpRequest) -> HttpResponseBase:
        if not is_permitted(permission, request):
            return _refused(request)
        return _asset(request, "page.html", is_private=True)

    @require_safe
    def stream(request: HttpRequest) -> HttpResponseBase:
        if not is_permitted(permission, request):
            return HttpResponseForbidden("You may not see the monitor.\n", "text/plain")
        if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            # Also where the permission goes by address, and the browser's is the right one.
            return HttpResponseForbidden("The monitor is for its own page.\n", "text/plain")
        monitor = Monitor.current()
        response = _MonitorResponse(request, monitor.channel, initial=monitor.history)
        if request.method == "GET":
            # From here on it hears whose right is taken away, and of what was told before.
            monitor.watch()
        return response

    return [
        path("", page, name="monitor"),
        path("stream", stream, name="monitor-stream"),
        path("<str:name>", _shared_asset, name="monitor-asset"),
    ]


@require_safe
def _shared_asset(request: HttpRequest, name: str) -> HttpResponseBase:
    # What the page is made of is no secret; what it shows comes by the stream.
    return _asset(request, name, is_private=False)


def _asset(request: HttpRequest, name: str, *, is_private: bool) -> HttpResponseBase:
    assets = _assets()
    if name not in assets or (name == "page.html") is not is_private:
        raise Http404(name)
    content, content_type = assets[name]
    response = HttpResponse(content, content_type=content_type)
    response["ETag"] = etag = quote_etag(sha256(content).hexdigest()[:32])
    # Asked for again each time: it must fit to the page after an upgrade.
    response["Cache-Control"] = "no-cache, private" if is_private else "no-cache"
    response["Content-Security-Policy"] = _POLICY
    response["X-Content-Type-Options"] = "nosniff"
    return get_conditional_response(request, etag=etag, response=response) or response


@cache
def _assets() -> dict[str, tuple[bytes, str]]:
    files = [*sorted((_PACKAGE / "assets").iterdir()), _SHARED]
    return {file.name: (file.read_bytes(), _content_type(file.name)) for file in files}


def _content_type(name: str) -> str:
    # Not what the machine's tables say: a browser runs no module of another type.
    if name.endswith(".js"):
        return "text/javascript; charset=utf-8"
    return mimetypes.types_map.get(Path(name).suffix, "text/plain") + "; charset=utf-8"


def _refused(request: HttpRequest) -> HttpResponseBase:
    user: Any = getattr(request, "user", None)
    if user is not None and not user.is_authenticated:
        # It needs the app, which a project with a permission of its own may not have.
        from django.contrib.auth.views import redirect_to_login

        try:
            login_url = reverse("admin:login")
        except NoReverseMatch:
            login_url = str(settings.LOGIN_URL)
        return redirect_to_login(request.get_full_path(), login_url)
    return HttpResponseForbidden(
        "You may not see the monitor: it is for active members of the staff.\n", "text/plain"
    )


app_name = "sse_channel"
urlpatterns = urls()
