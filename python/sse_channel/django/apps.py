"""The app, for projects that want its management commands: `sse_publish` and `sse_tail`."""

from django.apps import AppConfig

__all__ = ["SSEChannelConfig"]


class SSEChannelConfig(AppConfig):
    """``INSTALLED_APPS = ["sse_channel.django"]``: commands only, no models."""

    name = "sse_channel.django"
    # The last part of the name would be "django".
    label = "sse_channel"
    verbose_name = "SSE channel"
