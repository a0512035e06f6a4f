"""Django REST framework: event streams through its content negotiation.

class ArticleViewSet(viewsets.ModelViewSet):
    @action(detail=False, renderer_classes=[EventStreamRenderer])
    def stream(self, request):
        return EventStreamResponse(request, "articles")

Only who imports this module needs `djangorestframework`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rest_framework.renderers import JSONRenderer  # type: ignore[import-untyped]

__all__ = ["EventStreamRenderer"]


class EventStreamRenderer(JSONRenderer):  # type: ignore[misc]
    """Lets a view answer ``Accept: text/event-stream``, which a browser's EventSource sends.

    Without it the framework answers 406 before the view is called. The stream itself is made by the
    `EventStreamResponse` that the view returns, and no renderer touches it. What this renders is
    all else: a refusal (401, 403, 404, 429) or a view's own `Response`, as JSON with the content
    type ``application/json``, since it is no event stream. An EventSource takes neither, and
    reports an error to its page.

    In the first place of `renderer_classes`, it also serves clients that accept anything. The
    framework's ``?format=sse`` chooses it.
    """

    media_type = "text/event-stream"
    format = "sse"

    def render(
        self,
        data: Any,
        accepted_media_type: str | None = None,
        renderer_context: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Render what is no stream, as JSON."""
        content: bytes = super().render(data, accepted_media_type, renderer_context)
        response: Any = (renderer_context or {}).get("response")
        # The browsable API asks it for a part of a page, which stays HTML.
        if content and getattr(response, "accepted_renderer", None) is self:
            response["Content-Type"] = "application/json"
        return content
