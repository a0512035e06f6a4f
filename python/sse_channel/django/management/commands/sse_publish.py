"""`manage.py sse_publish CHANNEL JSON`"""

from django.core.management.base import CommandParser

from ....commands import add_publish_arguments, publish
from ._base import ChannelCommand


class Command(ChannelCommand):
    help = "Publish a message to a channel and print its event id."
    command = staticmethod(publish)

    def add_arguments(self, parser: CommandParser) -> None:
        add_publish_arguments(parser)
