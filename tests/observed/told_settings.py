"""The settings of the tests, with receivers that are told of streams."""

from typing import Any

from sse_channel import ClientInfo
from sse_channel.django.signals import client_connected, client_disconnected

from .settings import *  # noqa: F403


def tell(client: ClientInfo, **_: Any) -> None:
    what = "connected" if client.connected else "disconnected"
    print("TOLD", what, client.address, *client.channels, client.reason, flush=True)


for signal in (client_connected, client_disconnected):
    signal.connect(tell)
