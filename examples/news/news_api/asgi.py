"""The ASGI application of the news example."""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "news_api.settings")

application = get_asgi_application()
