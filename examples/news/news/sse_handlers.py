"""The news stream: what is sent to a client, and when."""

import json
import os
import queue
from collections import Counter
from collections.abc import Iterator

from django.core.serializers.json import DjangoJSONEncoder
from django.db import close_old_connections, reset_queries

from .models import Article
from .sse_utils import sse_channel

HEARTBEAT = ":heartbeat\n\n"
HEARTBEAT_SECONDS = 10
DEFAULT_LAST_N = 10
MAX_LAST_N = 100


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
            statistics = read_statistics(last_n)
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
            yield frame({"article": article, "statistics": read_statistics(last_n)})
    finally:
        sse_channel.unlisten(q)


def is_article(message: object) -> bool:
    """Whether `message` has what makes it an article on the page."""
    return isinstance(message, dict) and {"id", "headline"} <= message.keys()


def frame(payload: dict) -> str:
    """`payload` as one event. JSON escapes line ends, so one data line is enough."""
    return f"data: {json.dumps(payload, cls=DjangoJSONEncoder)}\n\n"


def read_latest() -> dict | None:
    """The newest article as a dict, None when there is none."""
    article = Article.objects.first()
    release_database()
    return None if article is None else article.as_dict()


def read_statistics(last_n: int) -> dict:
    """Statistics over the `last_n` newest articles, and the total of all articles."""
    total = Article.objects.count()
    newest = list(Article.objects.defer("summary")[:last_n])
    release_database()
    words = [len(article.headline.split()) for article in newest]
    return {
        "total": total,
        "last_n": last_n,
        "count": len(newest),
        "average_headline_words": round(sum(words) / len(words), 1) if words else None,
        "per_minute": articles_per_minute(newest),
        "categories": dict(Counter(article.category for article in newest).most_common()),
        "sources": dict(Counter(article.source for article in newest).most_common()),
    }


def articles_per_minute(newest: list[Article]) -> float | None:
    """The rate at which `newest` came in, None when they span no time."""
    if len(newest) < 2:
        return None
    minutes = (newest[0].created_at - newest[-1].created_at).total_seconds() / 60
    # n articles have n - 1 gaps between them.
    return round((len(newest) - 1) / minutes, 1) if minutes > 0 else None


def release_database() -> None:
    """Give back what a read has taken; to be called after each one in a stream."""
    # So that no database connection stays open while the stream waits.
    close_old_connections()
    # With DEBUG on, Django keeps a request's queries until it ends; a stream does not end.
    reset_queries()
