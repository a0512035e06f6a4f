"""The ASGI application of the news example, without the wrapper that lets streams leave Python."""

from django.core.asgi import get_asgi_application

application = get_asgi_application()
