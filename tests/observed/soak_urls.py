"""What `make soak` asks of the news example beside its own URLs."""

import json

from django.http import HttpRequest, HttpResponse
from django.urls import include, path
from django.views.decorators.csrf import csrf_exempt

from sse_channel import SSEChannel
from sse_channel.django import EventStreamResponse, EventStreamView, everybody

from . import replaced


@csrf_exempt
def publish(request: HttpRequest, channel: str) -> HttpResponse:
    """Publish the JSON of the body; the answer is the event's id."""
    return HttpResponse(SSEChannel(channel).publish(json.loads(request.body)))


def ordinary(request: HttpRequest, channel: str) -> HttpResponse:
    """A stream that stays with the server, since something is around it."""
    response = EventStreamResponse(request, channel)
    content = response.streaming_content
    response.streaming_content = (chunk for chunk in content)
    return response


urlpatterns = [
    path("publish/<str:channel>/", publish),
    path("ordinary/<str:channel>/", ordinary),
    path("replaced/", replaced.stream),
    path("channels/<str:channels>/", EventStreamView.as_view(permission=everybody)),
    path("", include("news_api.urls")),
]
