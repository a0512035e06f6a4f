"""The view that Prometheus scrapes.

# urls.py
from django.urls import path
from sse_channel.django import metrics

urlpatterns = [path("metrics", metrics)]
"""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.views.decorators.http import require_safe
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from ..prometheus import Collector

__all__ = ["metrics"]


@require_safe
def metrics(request: HttpRequest, *, collector: Collector | None = None) -> HttpResponse:
    """The metrics of `sse_channel.prometheus`, for all workers of this host.

    Everybody who can reach the URL can read it, the names of the channels included: have the proxy
    keep it inside, or wrap it in what checks a token.

    Args:
        collector: one with options, from the URL's pattern:
            ``path("metrics", metrics, {"collector": Collector(by_channel=False)})``.

    Raises:
        ImportError: at the import, without ``prometheus-client``.
    """
    registry = CollectorRegistry()
    registry.register(collector or Collector())
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    response = HttpResponse(encode(registry), content_type=content_type)
    response["Cache-Control"] = "no-store"
    return response
