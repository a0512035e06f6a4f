"""The app, for projects that want its commands, checks, and the script for browsers."""

import sys
from types import FrameType

from django.apps import AppConfig

from ..config import options

__all__ = ["SSEChannelConfig"]


class SSEChannelConfig(AppConfig):
    """``INSTALLED_APPS = ["sse_channel.django"]``: commands, checks, a static file; no models."""

    name = "sse_channel.django"
    # The last part of the name would be "django".
    label = "sse_channel"
    verbose_name = "SSE channel"

    def ready(self) -> None:
        """Register the checks; where none will be made, a mistake in the settings raises."""
        from . import checks

        checks.register()
        if not _is_command():
            options()


def _is_command() -> bool:
    """Whether ``manage.py`` loads the apps: then Django's checks tell mistakes, all of them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "execute" and frame.f_globals.get("__name__") == (
            "django.core.management"
        ):
            return True
        frame = frame.f_back
    return False
