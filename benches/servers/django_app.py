"""A Django app of streams: by this library, and by the pattern that it replaces.

The bus is this process's own, so that streams and nothing else are measured; `BENCH_BUS` names
another.
"""

import os
import queue
import threading
import time

import django
from django.conf import settings

PADDING = "x" * int(os.environ.get("BENCH_TEXT", "200"))

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="of a benchmark",
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    USE_TZ=True,
    SSE_CHANNEL={
        "BUS": os.environ.get("BENCH_BUS", "memory://"),
        "OFFLOAD": os.environ.get("BENCH_OFFLOAD", "1") == "1",
        "BACKLOG_BYTES": int(os.environ.get("BENCH_BACKLOG_BYTES", "1048576")),
        "IO_THREADS": int(os.environ.get("BENCH_IO_THREADS", "1")),
    },
)
django.setup()

from django.core.asgi import get_asgi_application  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse  # noqa: E402
from django.urls import path  # noqa: E402

from sse_channel import sse_channel, stats  # noqa: E402
from sse_channel.asgi import offload  # noqa: E402
from sse_channel.django import EventStreamResponse  # noqa: E402


def stream(request):
    return EventStreamResponse(request, sse_channel)


def publish(request):
    return publish_by(request, sse_channel.publish)


def publish_by(request, send):
    """Publish from a thread of its own: no request is answered meanwhile."""
    first, count = int(request.GET["first"]), int(request.GET["count"])
    pause = float(request.GET["pause"])

    def run():
        time.sleep(0.5)
        for n in range(first, first + count):
            send({"n": n, "t": time.monotonic_ns(), "text": PADDING})
            if pause:
                time.sleep(pause)

    threading.Thread(target=run).start()
    return JsonResponse({})


# What is replaced: a list of queues, of gevent's where gevent has patched the standard ones.
listeners = []


def replaced(request):
    import json

    def generate():
        waiting = queue.Queue()
        listeners.append(waiting)
        try:
            yield b": hello\n\n"
            while True:
                try:
                    message = waiting.get(timeout=10)
                except queue.Empty:
                    yield b": heartbeat\n\n"
                else:
                    yield f"data: {json.dumps(message)}\n\n".encode()
        finally:
            listeners.remove(waiting)

    return StreamingHttpResponse(generate(), content_type="text/event-stream")


def publish_replaced(request):
    def send(message):
        for waiting in listeners:
            waiting.put_nowait(message)

    return publish_by(request, send)


def mark(request):
    """An event that is none of the counted ones; its id."""
    return HttpResponse(sse_channel.publish("mark"))


def figures(request):
    return JsonResponse(stats())


urlpatterns = [
    path("stream/", stream),
    path("publish/", publish),
    path("replaced/", replaced),
    path("publish-replaced/", publish_replaced),
    path("mark/", mark),
    path("stats/", figures),
]
wsgi = get_wsgi_application()
asgi = offload(get_asgi_application())
