"""The WSGI application of the news example, for gunicorn and runserver."""

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "news_api.settings")

application = get_wsgi_application()
