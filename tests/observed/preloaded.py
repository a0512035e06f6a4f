"""The WSGI application, which publishes while it is imported: under --preload in the master."""

import os

from news.sse_utils import sse_channel
from news_api.wsgi import application

__all__ = ["application"]

sse_channel.publish({"imported by": os.getpid()})
