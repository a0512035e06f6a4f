"""Settings of the news example: the smallest project that serves it.

Read from the environment:

NEWS_DEBUG          "1" (default) or "0"
NEWS_DB             path of the SQLite file, default db.sqlite3 beside manage.py
NEWS_ALLOWED_HOSTS  comma-separated host names, default this machine only
NEWS_SECRET_KEY     Django's SECRET_KEY, default a value that is fit for a demo only
"""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

# Nothing here signs anything, but Django does not start without a key.
SECRET_KEY = os.environ.get("NEWS_SECRET_KEY", "news-example-key-for-demonstration-only")

DEBUG = os.environ.get("NEWS_DEBUG", "1") == "1"

ALLOWED_HOSTS = [
    host.strip()
    for host in os.environ.get("NEWS_ALLOWED_HOSTS", "localhost,127.0.0.1,[::1],testserver").split(
        ","
    )
    if host.strip()
]

# The library's app brings the page's script, manage.py sse_publish and sse_tail; streams work
# without it.
INSTALLED_APPS = ["news", "sse_channel.django", "django.contrib.staticfiles"]
STATIC_URL = "static/"

# No GZipMiddleware: a compressor holds small frames back until its buffer is full.
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "news_api.urls"
WSGI_APPLICATION = "news_api.wsgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
    }
]

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("NEWS_DB", str(BASE_DIR / "db.sqlite3")),
        "OPTIONS": {
            # Seconds a writer waits for another one before "database is locked".
            "timeout": 20,
            # With a write-ahead log the streams read while an article is written.
            "init_command": "PRAGMA journal_mode=wal",
        },
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
    "loggers": {
        # A refused submission is answered with its reason; the log has nothing to add.
        "django.request": {"level": "ERROR"},
        "django.server": {"level": "ERROR"},
    },
}
