"""`manage.py sse_tail CHANNEL`"""

from django.core.management.base import CommandParser

from ....commands import add_tail_arguments, tail
from ._base import ChannelCommand


class Command(ChannelCommand):
    help = "Print the events of a channel as they come, one a line."
    command = staticmethod(tail)

    def add_arguments(self, parser: CommandParser) -> None:
        add_tail_arguments(parser)
