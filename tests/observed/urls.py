"""The URLs of the news example, and what the tests ask of a server process."""

import time

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.urls import include, path

from news.models import Article
from news.sse_utils import sse_channel
from sse_channel import host_stats, stats
from sse_channel.django import EventStreamResponse, EventStreamView, everybody, metrics
from sse_channel.prometheus import Collector

from . import queries, replaced


def figures(request: HttpRequest) -> HttpResponse:
    """What the library counts in this process."""
    return JsonResponse({**stats(), "queries": queries.count()})


def host(request: HttpRequest) -> HttpResponse:
    """What the library counts in all processes."""
    return JsonResponse(host_stats())


def blank(request: HttpRequest) -> HttpResponse:
    """A page that asks for nothing, not even an icon."""
    return HttpResponse('<!doctype html><title>Blank</title><link rel="icon" href="data:,">')


def slow(request: HttpRequest) -> HttpResponse:
    """A request that takes long."""
    print("slow begins", flush=True)
    for _ in range(600):
        time.sleep(0.1)
    return HttpResponse()


def late(request: HttpRequest) -> HttpResponseBase:
    """A stream that is opened a while after its request has come."""
    print("late begins", flush=True)
    time.sleep(1)
    return EventStreamResponse(request, sse_channel)


async def asynchronous(request: HttpRequest) -> HttpResponseBase:
    """A stream of an asynchronous view, which WSGI runs in a thread of its own."""
    return EventStreamResponse(request, sse_channel)


def queried(request: HttpRequest) -> HttpResponse:
    """A stream that has used the database twice before it waits: in the view and after it."""
    Article.objects.count()
    return EventStreamResponse(
        request, sse_channel, initial=lambda: {"total": Article.objects.count()}
    )


def dressed(request: HttpRequest) -> HttpResponse:
    """A stream with headers and cookies of its own."""
    response = EventStreamResponse(request, sse_channel, headers={"X-Own": "given"}, heartbeat=1)
    response.set_cookie("first", "1", httponly=True)
    response.set_cookie("second", "2")
    return response


def compressed(request: HttpRequest) -> HttpResponse:
    """A stream around which somebody put something else."""
    response = EventStreamResponse(request, sse_channel, heartbeat=1)
    content = response.streaming_content
    if response.is_async:
        response.streaming_content = (chunk.upper() async for chunk in content)
    else:
        response.streaming_content = (chunk.upper() for chunk in content)
    return response


urlpatterns = [
    path("replaced/", replaced.stream),
    path("dressed/", dressed),
    path("compressed/", compressed),
    path("blank/", blank),
    path("slow/", slow),
    path("late/", late),
    path("asynchronous/", asynchronous),
    path("figures/", figures),
    path("host/", host),
    path("metrics", metrics),
    path("metrics/sums", metrics, {"collector": Collector(by_channel=False)}),
    path("queried/", queried),
    path("channels/<str:channel>/", EventStreamView.as_view(permission=everybody)),
    path("", include("news_api.urls")),
]
