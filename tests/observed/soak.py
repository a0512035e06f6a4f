"""The settings of `make soak`: the news example, and the URLs that the soak uses beside its own.

Nothing here keeps anything for each request, as other settings of the tests do: what grows is the
library's, Django's or the server's.
"""

from news_api.settings import *  # noqa: F403

ROOT_URLCONF = "observed.soak_urls"
# 200 KB as JSON.
DATA_UPLOAD_MAX_MEMORY_SIZE = 1 << 20
