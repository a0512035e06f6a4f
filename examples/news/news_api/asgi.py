"""The ASGI application of the news example."""

import os

from django.core.asgi import get_asgi_application

from sse_channel.asgi import offload

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "news_api.settings")

# Under uvicorn, streams leave Python.
application = offload(get_asgi_application())
