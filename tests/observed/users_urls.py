"""What users may listen to: the channels of their groups."""

from django.contrib.auth import login
from django.contrib.auth.models import Group, User
from django.http import HttpRequest, HttpResponse
from django.urls import include, path

from sse_channel import SSEChannel, disconnect
from sse_channel.django import EventStreamView, everybody


def may_listen(request: HttpRequest, channel: str) -> bool:
    """Whether the user is in the group of that name."""
    return request.user.groups.filter(name=channel).exists()


async def may_listen_asynchronously(request: HttpRequest, channel: str) -> bool:
    """The same, for those who write it so."""
    user = await request.auser()
    return await user.groups.filter(name=channel).aexists()


def enter(request: HttpRequest, user: str, channels: str) -> HttpResponse:
    """Log a user in, as one of the groups of those names."""
    its, _ = User.objects.get_or_create(username=user)
    its.groups.set([Group.objects.get_or_create(name=name)[0] for name in channels.split(",")])
    its.is_staff = "staff" in channels.split(",")
    its.save()
    login(request, its)
    return HttpResponse(str(its.pk))


def revoke(request: HttpRequest, user: str, channel: str) -> HttpResponse:
    """Take a user's right to a channel away."""
    its = User.objects.get(username=user)
    its.groups.remove(Group.objects.get(name=channel))
    if channel == "staff":
        its.is_staff = False
        its.save()
        disconnect(user=its)
    else:
        disconnect(user=its, channel=channel)
    return HttpResponse()


def publish(request: HttpRequest, channel: str, message: str) -> HttpResponse:
    """Publish to any channel."""
    return HttpResponse(SSEChannel(channel).publish(message))


urlpatterns = [
    path("enter/<str:user>/<str:channels>/", enter),
    path("revoke/<str:user>/<str:channel>/", revoke),
    path("publish/<str:channel>/<str:message>/", publish),
    path("events/<str:channels>/", EventStreamView.as_view(permission=may_listen)),
    path("awaited/<str:channel>/", EventStreamView.as_view(permission=may_listen_asynchronously)),
    path("public/", EventStreamView.as_view(permission=everybody, query=True)),
    path("staff/monitor/", include("sse_channel.django.monitor")),
    path("", include("observed.urls")),
]
