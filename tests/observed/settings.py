"""The settings of the news example, with the URLs of the tests beside its own."""

from news_api.settings import *  # noqa: F403

ROOT_URLCONF = "observed.urls"
