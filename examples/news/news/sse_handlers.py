"""The news stream: what is sent to a client, and what each published article becomes."""

import os
from collections import Counter

from .models import Article

DEFAULT_LAST_N = 10
MAX_LAST_N = 100


def first_payload(last_n: int) -> dict:
    """What a client gets first, and the process that serves its stream.

    The latest article with statistics over the `last_n` newest articles, or a message that there
    is none.
    """
    worker = os.getpid()
    latest = Article.objects.first()
    if latest is None:
        return {"message": "No articles yet", "worker": worker}
    return {
        "article": latest.as_dict(),
        "statistics": read_statistics(last_n),
        "worker": worker,
    }


def render(message: object, *, last_n: int) -> dict:
    """What a published message becomes, for all clients that look at the `last_n` newest articles.

    An article gets the statistics beside it. What is published and is no article, from a shell for
    example, goes as an announcement. Each process renders for its own clients, and says which it
    is.
    """
    worker = os.getpid()
    if not is_article(message):
        return {"announcement": message, "worker": worker}
    return {"article": message, "statistics": read_statistics(last_n), "worker": worker}


def is_article(message: object) -> bool:
    """Whether `message` has what makes it an article on the page."""
    return isinstance(message, dict) and {"id", "headline"} <= message.keys()


def read_statistics(last_n: int) -> dict:
    """Statistics over the `last_n` newest articles, and the total of all articles."""
    total = Article.objects.count()
    newest = list(Article.objects.defer("summary")[:last_n])
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
