"""The ASGI application of the news example."""

import os

from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application

from sse_channel.asgi import offload

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "news_api.settings")

# Under uvicorn, streams leave Python. The page's static file goes out asynchronously.
application = offload(ASGIStaticFilesHandler(get_asgi_application()))
