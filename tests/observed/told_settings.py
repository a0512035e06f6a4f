"""The settings of the tests, with receivers that are told of streams."""

from typing import Any

from sse_channel import ClientInfo
from sse_channel.django.signals import client_connected, client_disconnected

from .settings import *  # noqa: F403


def tell(client: ClientInfo, **_: Any) -> None:
    what = "connected" if client.connected else "disconnected"
    # One text, so that it is one write: unbuffered, each argument would be one.
    line = f"TOLD {what} {client.address} {' '.join(client.channels)} {client.reason}\n"
    print(line, end="", flush=True)


for signal in (client_connected, client_disconnected):
    signal.connect(tell)
