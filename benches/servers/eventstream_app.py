"""The same by django-eventstream, without its storage."""

import threading
import time

import django
from django.conf import settings

PADDING = "x" * 200

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="of a benchmark",
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django_eventstream"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    USE_TZ=True,
)
django.setup()

import django_eventstream  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.http import JsonResponse  # noqa: E402
from django.urls import include, path  # noqa: E402


def publish(request):
    first, count = int(request.GET["first"]), int(request.GET["count"])
    pause = float(request.GET["pause"])

    def run():
        time.sleep(0.5)
        for n in range(first, first + count):
            message = {"n": n, "t": time.monotonic_ns(), "text": PADDING}
            django_eventstream.send_event("bench", "message", message)
            if pause:
                time.sleep(pause)

    threading.Thread(target=run).start()
    return JsonResponse({})


urlpatterns = [
    path("stream/", include(django_eventstream.urls), {"channels": ["bench"]}),
    path("publish/", publish),
]
asgi = get_asgi_application()
