"""The generator that the library's own stream replaces, as apps have it: `listen` and `get`."""

import json
import os
import queue
from collections.abc import Iterator

from django.core.handlers.asgi import ASGIRequest
from django.core.serializers.json import DjangoJSONEncoder
from django.db import close_old_connections, reset_queries
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

from news.models import Article
from news.sse_handlers import DEFAULT_LAST_N, is_article, read_statistics
from news.sse_utils import sse_channel

HEARTBEAT = ":heartbeat\n\n"
HEARTBEAT_SECONDS = 10


def news_stream(last_n: int = DEFAULT_LAST_N) -> Iterator[str]:
    """The frames of one client's stream, without end.

    First the latest article with statistics over the `last_n` newest articles, or a
    message that there is none, and the process that serves this stream; then one event for
    each article published from then on, in order, and a heartbeat whenever
    HEARTBEAT_SECONDS pass without one. What is published to the channel and is no article,
    from a shell for example, goes as an announcement.
    """
    # Listen before reading, or an article published between the two would be lost.
    q = sse_channel.listen()
    try:
        worker = os.getpid()
        latest = read_latest()
        if latest is None:
            yield frame({"message": "No articles yet", "worker": worker})
        else:
            statistics = read(last_n)
            yield frame({"article": latest, "statistics": statistics, "worker": worker})
        while True:
            try:
                article = q.get(timeout=HEARTBEAT_SECONDS)
            except queue.Empty:
                # Keeps proxies from closing the stream, and finds out who has left.
                yield HEARTBEAT
                continue
            if not is_article(article):
                yield frame({"announcement": article})
                continue
            if latest is not None and article["id"] == latest["id"]:
                # Published while the latest article was read: it has been sent already.
                continue
            yield frame({"article": article, "statistics": read(last_n)})
    finally:
        sse_channel.unlisten(q)


def frame(payload: dict) -> str:
    """`payload` as one event. JSON escapes line ends, so one data line is enough."""
    return f"data: {json.dumps(payload, cls=DjangoJSONEncoder)}\n\n"


def read_latest() -> dict | None:
    """The newest article as a dict, None when there is none."""
    article = Article.objects.first()
    release_database()
    return None if article is None else article.as_dict()


def read(last_n: int) -> dict:
    """Statistics over the `last_n` newest articles: for each client and article."""
    statistics = read_statistics(last_n)
    release_database()
    return statistics


def release_database() -> None:
    """Give back what a read has taken; to be called after each one in a stream."""
    # So that no database connection stays open while the stream waits.
    close_old_connections()
    # With DEBUG on, Django keeps a request's queries until it ends; a stream does not end.
    reset_queries()


def stream(request: HttpRequest) -> HttpResponseBase:
    """The generator's view."""
    if isinstance(request, ASGIRequest):
        # Django would collect all of a synchronous generator before it sends any of it.
        return HttpResponse(status=501)
    response = StreamingHttpResponse(news_stream(), content_type="text/event-stream; charset=utf-8")
    response["Cache-Control"] = "no-cache, no-transform"
    # nginx collects a response before it passes it on unless it is told not to.
    response["X-Accel-Buffering"] = "no"
    return response
