"""The settings of the news example, with the URLs and the header of the tests beside its own."""

from news_api.settings import *  # noqa: F403
from news_api.settings import MIDDLEWARE

ROOT_URLCONF = "observed.urls"
MIDDLEWARE = ["observed.middleware.worker", *MIDDLEWARE]
