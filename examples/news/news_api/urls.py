"""URLs of the project: the app under /news/, and / leads there."""

from django.contrib.staticfiles.views import serve
from django.urls import include, path
from django.views.generic import RedirectView

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="news:page")),
    path("news/", include("news.urls")),
    # The page's one static file. A site has it served by its web server: see `collectstatic`.
    path("static/<path:path>", serve, {"insecure": True}),
]
