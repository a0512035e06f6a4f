"""The WSGI application below something that says that it encodes."""

from collections.abc import Callable, Iterable
from typing import Any

from news_api.wsgi import application as news

__all__ = ["application"]


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Every response has a Content-Encoding."""

    def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
        return start_response(status, [*headers, ("Content-Encoding", "identity")], *rest)

    return news(environ, start)
