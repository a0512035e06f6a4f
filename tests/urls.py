"""The views that the Django tests ask."""

from django.contrib.contenttypes.models import ContentType
from django.http import HttpRequest
from django.urls import path

from sse_channel.django import EventStreamResponse, metrics


def stream(request: HttpRequest, name: str) -> EventStreamResponse:
    return EventStreamResponse(request, name, heartbeat=0.05)


def with_database(request: HttpRequest, name: str) -> EventStreamResponse:
    """Uses the database in the view and for the first payload."""
    ContentType.objects.count()
    return EventStreamResponse(
        request, name, initial=lambda: {"types": ContentType.objects.count()}, heartbeat=0.05
    )


urlpatterns = [
    path("metrics", metrics),
    path("stream/<name>/", stream),
    path("database/<name>/", with_database),
]
