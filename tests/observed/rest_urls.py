"""A viewset of Django REST framework whose actions are streams."""

from django.urls import include, path
from rest_framework import serializers, viewsets
from rest_framework.authentication import BasicAuthentication, SessionAuthentication
from rest_framework.decorators import action
from rest_framework.permissions import IsAdminUser, IsAuthenticated
from rest_framework.renderers import BrowsableAPIRenderer, JSONRenderer
from rest_framework.response import Response
from rest_framework.routers import DefaultRouter

from news.models import Article
from news.sse_utils import sse_channel
from sse_channel.django import EventStreamResponse
from sse_channel.django.rest_framework import EventStreamRenderer

STREAM = [EventStreamRenderer, BrowsableAPIRenderer]


class ArticleSerializer(serializers.ModelSerializer):
    class Meta:
        model = Article
        fields = ("id", "headline")


class ArticleViewSet(viewsets.ModelViewSet):
    queryset = Article.objects.all()
    serializer_class = ArticleSerializer
    authentication_classes = (BasicAuthentication,)

    @action(detail=False, renderer_classes=STREAM)
    def stream(self, request, format=None):
        """Open to all; the first payload reads the database."""
        return EventStreamResponse(
            request, sse_channel, initial=lambda: {"total": Article.objects.count()}
        )

    @action(detail=False, renderer_classes=STREAM, permission_classes=[IsAuthenticated])
    def members(self, request):
        return EventStreamResponse(
            request, sse_channel, initial={"user": request.user.get_username()}
        )

    @action(
        detail=False,
        renderer_classes=STREAM,
        permission_classes=[IsAdminUser],
        authentication_classes=[SessionAuthentication],
    )
    def staff(self, request):
        return EventStreamResponse(request, sse_channel)

    @action(detail=False, renderer_classes=[JSONRenderer])
    def unprepared(self, request):
        return EventStreamResponse(request, sse_channel)

    @action(detail=False, renderer_classes=[*STREAM, JSONRenderer])
    def plain(self, request):
        return Response({"plain": True})

    @action(detail=False, renderer_classes=STREAM)
    def nothing(self, request):
        return Response(status=204)


router = DefaultRouter()
router.register("articles", ArticleViewSet)
urlpatterns = [path("api/", include(router.urls)), path("", include("observed.urls"))]
