"""URLs of the project: the app under /news/, and / leads there."""

from django.urls import include, path
from django.views.generic import RedirectView

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="news:page")),
    path("news/", include("news.urls")),
]
