"""URLs of the project: the app under /news/, and / leads there."""

from django.contrib.staticfiles.views import serve
from django.http import HttpRequest
from django.urls import include, path
from django.views.generic import RedirectView

from sse_channel.django import monitor


def is_on_this_machine(request: HttpRequest) -> bool:
    """Whether the browser runs beside the server: the example has no users."""
    # Behind a proxy on this machine, everybody comes from here.
    is_proxied = "HTTP_X_FORWARDED_FOR" in request.META or "HTTP_FORWARDED" in request.META
    return not is_proxied and request.META["REMOTE_ADDR"] in ("127.0.0.1", "::1")


urlpatterns = [
    path("", RedirectView.as_view(pattern_name="news:page")),
    path("news/", include("news.urls")),
    # A site with users includes "sse_channel.django.monitor", which is for staff.
    path("monitor/", include((monitor.urls(permission=is_on_this_machine), "sse_channel"))),
    # The page's one static file. A site has it served by its web server: see `collectstatic`.
    path("static/<path:path>", serve, {"insecure": True}),
]
