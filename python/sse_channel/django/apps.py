"""The app, for projects that want `sse_publish`, `sse_tail`, and the script for browsers."""

from django.apps import AppConfig

__all__ = ["SSEChannelConfig"]


class SSEChannelConfig(AppConfig):
    """``INSTALLED_APPS = ["sse_channel.django"]``: commands and a static file, no models."""

    name = "sse_channel.django"
    # The last part of the name would be "django".
    label = "sse_channel"
    verbose_name = "SSE channel"
