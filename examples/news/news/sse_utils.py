"""The channel that carries published articles to the open streams."""

from sse_channel import SSEChannel, sse_channel

__all__ = ["SSEChannel", "sse_channel"]
