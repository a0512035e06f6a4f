"""The views: the page, its stream, and the API that articles are submitted to."""

import json
from functools import partial

from django.core.exceptions import RequestDataTooBig
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_POST

from sse_channel.django import EventStreamResponse

from . import sse_handlers
from .models import Article
from .sse_handlers import DEFAULT_LAST_N, MAX_LAST_N
from .sse_utils import sse_channel

PAGE_ARTICLES = 20
PAGE_CATEGORIES = ["World", "Business", "Science", "Technology", "Culture", "Sport", "Climate"]


# A copy out of a cache would show old articles as the newest.
@never_cache
@require_GET
def page(request: HttpRequest) -> HttpResponse:
    """The page, with the newest articles in it and a script that follows the stream."""
    context = {
        "articles": Article.objects.all()[:PAGE_ARTICLES],
        "total": Article.objects.count(),
        "now": timezone.now(),
        "categories": PAGE_CATEGORIES,
        "last_n_choices": [5, 10, 25, 50],
        "default_last_n": DEFAULT_LAST_N,
        "headline_max_length": Article._meta.get_field("headline").max_length,
        "summary_max_length": Article._meta.get_field("summary").max_length,
    }
    return render(request, "news/page.html", context)


@require_GET
def stream(request: HttpRequest) -> HttpResponse:
    """Server-sent events: articles with statistics over the `?last_n=` newest.

    The statistics are read once for each article and value of `last_n`, however many clients
    there are.
    """
    text = request.GET.get("last_n", str(DEFAULT_LAST_N))
    last_n = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not 1 <= last_n <= MAX_LAST_N:
        return refuse(f"last_n must be a whole number from 1 to {MAX_LAST_N}.")
    return EventStreamResponse(
        request,
        sse_channel,
        initial=partial(sse_handlers.first_payload, last_n),
        render=partial(sse_handlers.render, last_n=last_n),
        key=last_n,
    )


@require_GET
def events(request: HttpRequest) -> HttpResponse:
    """Server-sent events: each published article, as it is."""
    return EventStreamResponse(request, sse_channel)


# An API for scripts: they have no cookie that a forged request could make use of.
@csrf_exempt
@require_POST
def submit(request: HttpRequest) -> JsonResponse:
    """Save the article in the JSON body and publish it; answer 201 with the article."""
    try:
        article = article_from(json.loads(request.body))
    except RequestDataTooBig:
        return refuse("The body is too large for an article.", status=413)
    except ArticleError as exc:
        return refuse(str(exc))
    except (ValueError, RecursionError):
        return refuse('The body must be JSON, for example {"headline": "Rain by noon"}.')
    with transaction.atomic():
        article.save()
        # After the commit, so that a stream never announces what a reader cannot find.
        transaction.on_commit(lambda: sse_channel.publish(article.as_dict()))
    return JsonResponse(article.as_dict(), status=201)


class ArticleError(Exception):
    """What is wrong with a submitted article, in words for the one who sent it."""


def article_from(data: object) -> Article:
    """An unsaved article of the submitted `data`; raises ArticleError."""
    if not isinstance(data, dict):
        raise ArticleError("The body must be a JSON object with a headline.")
    article = Article()
    for name in ("headline", "summary", "source", "category"):
        text = text_from(data, name)
        if text:
            setattr(article, name, text)
    if not article.headline:
        raise ArticleError("headline is missing or blank; an article needs one.")
    return article


def text_from(data: dict, name: str) -> str:
    """The text of one field, without surrounding space; "" when it is not given."""
    text = data.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ArticleError(f"{name} must be a string.")
    text = text.strip()
    max_length = Article._meta.get_field(name).max_length
    if len(text) > max_length:
        raise ArticleError(f"{name} has {len(text)} characters; at most {max_length} are allowed.")
    # JSON can spell characters that a database cannot store: NUL and half a surrogate pair.
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text):
        raise ArticleError(f"{name} contains a character that cannot be stored.")
    return text


def refuse(error: str, status: int = 400) -> JsonResponse:
    """A refusal as JSON: {"error": what to do about it}."""
    return JsonResponse({"error": error}, status=status)
