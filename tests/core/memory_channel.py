"""A channel in memory, for a core loop without a socket."""

from __future__ import annotations

import queue

from octavo.core.transport import Message, Peer, drain
from octavo.types import CoreInput, CoreOutput

ONLY: Peer = b""  # the one peer


class MemoryChannel:
    """Both ends of a `Channel`: the client puts messages in and gets from ``outbox``."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[CoreOutput] = queue.SimpleQueue()

    def put(self, message: CoreInput) -> None:
        self._inbox.put((ONLY, message))

    def receive(self, *, wait: bool) -> list[Message]:
        return drain(self._inbox, wait=wait)

    def send(self, peer: Peer, message: CoreOutput) -> None:
        self.outbox.put(message)

    def send_all(self, message: CoreOutput) -> None:
        self.outbox.put(message)

    def close(self) -> None:
        pass
