"""Signals for streams that begin and end.

from django.dispatch import receiver
from sse_channel.django.signals import client_connected

@receiver(client_connected)
def note(sender, client, **kwargs):
    print(client.user, client.channels)
"""

from __future__ import annotations

from typing import Any

from django.db import connections
from django.dispatch import Signal

from ..clients import ClientInfo, on_client

__all__ = ["client_connected", "client_disconnected"]

#: A stream of this process has begun; with `client`, a `ClientInfo`. Sent from a thread of its own.
client_connected = Signal()

#: A stream of this process has ended, wherever it was and whatever the reason; with `client`.
client_disconnected = Signal()


def _is_wanted() -> bool:
    return bool(client_connected.receivers or client_disconnected.receivers)


def _send(client: ClientInfo) -> None:
    signal: Any = client_connected if client.connected else client_disconnected
    try:
        # Robust: Django logs what a receiver raises, and calls the others.
        signal.send_robust(sender=ClientInfo, client=client)
    finally:
        for connection in connections.all(initialized_only=True):
            connection.close()


on_client(_send, _is_wanted)
