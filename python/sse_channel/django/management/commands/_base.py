"""What both commands share: from the library's failures and statuses to Django's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from ....commands import Failure, Print, status_of


class ChannelCommand(BaseCommand):
    """A command of `sse_channel.commands`. It asks nothing of the database."""

    requires_system_checks: list[str] = []  # noqa: RUF012
    command: Callable[[argparse.Namespace, Print, Print], None]

    def handle(self, *args: Any, **options: Any) -> None:
        def show(line: str) -> None:
            self.stdout.write(line)
            self.stdout.flush()

        def say(line: str) -> None:
            # Not in the colour of errors.
            self.stderr.write(line, lambda text: text)
            self.stderr.flush()

        try:
            status = status_of(lambda: type(self).command(argparse.Namespace(**options), show, say))
        except Failure as failure:
            raise CommandError(str(failure), returncode=failure.status) from failure
        if status:
            sys.exit(status)
