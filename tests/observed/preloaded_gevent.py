"""The same under gevent, whose worker patches too late for what is loaded before the fork."""

# ruff: noqa: E402

from gevent import monkey

monkey.patch_all()

from observed.preloaded import application

__all__ = ["application"]
