"""URLs of the app, below /news/."""

from django.urls import path

from . import views

app_name = "news"

urlpatterns = [
    path("", views.page, name="page"),
    path("stream/", views.stream, name="stream"),
    path("events/", views.events, name="events"),
    path("submit/", views.submit, name="submit"),
]
