"""gunicorn's configuration for the demo: gunicorn -c gunicorn.conf.py"""

import os
from pathlib import Path

# The project is found whichever directory gunicorn is started from.
chdir = str(Path(__file__).resolve().parent)
wsgi_app = "news_api.wsgi:application"

bind = os.environ.get("NEWS_BIND", "127.0.0.1:8000")

# Streams leave any worker; with greenlets, its other requests do not wait for each other.
worker_class = "gevent"

# An article that one worker publishes reaches the streams of all of them, over the local bus.
workers = 3

# Of each worker: open streams plus the requests beside them; it accepts no more until one ends.
worker_connections = 1000

# Seconds. Streams never end by themselves, so waiting long for them is of no use.
graceful_timeout = 3

# An access log writes a line when a response ends; for a stream that says nothing in time.
accesslog = None

# gunicorn 25.1 and newer would leave a control socket in the home directory.
control_socket_disable = True
