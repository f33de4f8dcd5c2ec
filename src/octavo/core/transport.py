"""How messages reach the core loop and leave it.

    clients (peers)                      core process
      DEALER, connects  -- CoreInput  -->  ROUTER  |  one I/O thread:   inbox  -> loop
      DEALER, connects  <- CoreOutput --   listens |  socket, msgpack   outbox <- loop

Several processes may be connected; a peer is known by the name that ZeroMQ gives its connection. The loop touches two
queues and never a socket. When idle both threads are blocked in the kernel, without polling. `frontend.core_process`
opens the listening socket, in a folder that only the user may enter; messages are msgpack of the structs in
`octavo.types`, checked against their types when decoded.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from typing import Any, Protocol

import msgspec
import zmq

from octavo.log import get_logger
from octavo.types import MAX_MESSAGE_BYTES, Bye, CoreInput, CoreOutput, Dead

FLUSH_MS = 1000  # how long `close` may take to hand over what was sent before

Peer = bytes
Message = tuple[Peer, CoreInput]


class Channel(Protocol):
    """The core's end: a `ZmqChannel`, or one in memory in tests."""

    def receive(self, *, wait: bool) -> list[Message]:
        """Everything that has arrived, in order; with ``wait``, blocks until there is at least one message.

        A peer whose connection is gone is reported as one that said `Bye`, once a message for it cannot be delivered.
        """
        ...

    def send(self, peer: Peer, message: CoreOutput) -> None:
        """Queues a message; never blocks."""
        ...

    def send_all(self, message: CoreOutput) -> None:
        """Queues a message to every peer that has ever sent one, or to the first that will, within `FLUSH_MS`."""
        ...

    def close(self) -> None:
        """Hands over what was sent, within `FLUSH_MS`, and ends."""
        ...


def drain(inbox: queue.SimpleQueue[Message], *, wait: bool) -> list[Message]:
    """What is in ``inbox``; with ``wait`` at least one message."""
    messages = [inbox.get()] if wait else []
    try:
        while True:
            messages.append(inbox.get_nowait())
    except queue.Empty:
        return messages


class ZmqChannel:
    """The core's end of a socket that listens already: ``listener`` is its file descriptor, which is taken over.

    ``secret_key`` (of CURVE, in Z85) makes the socket take only peers that know its public half, encrypted.
    """

    def __init__(self, address: str, listener: int, *, secret_key: str = "") -> None:
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[Peer | None, CoreOutput] | None] = queue.SimpleQueue()  # None: close
        self._peers: set[Peer] = set()
        self._context = zmq.Context()
        self._socket = open_socket(self._context, zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error, not silence
        if secret_key:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret_key.encode())
        self._socket.setsockopt(zmq.USE_FD, listener)
        self._socket.bind(address)
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="octavo-core-io", daemon=True)
        self._thread.start()

    def receive(self, *, wait: bool) -> list[Message]:
        return drain(self._inbox, wait=wait)

    def send(self, peer: Peer, message: CoreOutput) -> None:
        self._outbox.put((peer, message))
        self._wake()

    def send_all(self, message: CoreOutput) -> None:
        self._outbox.put((None, message))
        self._wake()

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self._outbox.put(None)
        self._wake()
        self._thread.join()
        self._waker.close()
        self._woken.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full of wake-ups still to be read: one more tells nothing new
            self._waker.send(b"\0")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while True:
            ready: dict[Any, int] = dict(poller.poll())
            if self._socket in ready:
                self._take()
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
                if not self._flush():
                    break
        self._socket.close(linger=FLUSH_MS)
        self._context.term()  # returns once the linger is over

    def _take(self) -> None:
        while True:
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._peers.add(peer)
            try:
                self._inbox.put((peer, _decode(frames[0] if len(frames) == 1 else b"")))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                get_logger().error("dropped a message of %d bytes from a client: %s", sum(map(len, frames)), error)

    def _flush(self) -> bool:
        """Sends what waits; False once `close` was called."""
        while True:
            try:
                item = self._outbox.get_nowait()
            except queue.Empty:
                return True
            if item is None:
                return False
            peer, message = item
            frame = _frame(message)
            for one in self._everyone() if peer is None else (peer,):
                self._send(one, frame)

    def _everyone(self) -> list[Peer]:
        if not self._peers and self._socket.poll(FLUSH_MS):
            self._take()
        return list(self._peers)

    def _send(self, peer: Peer, frame: bytes) -> None:
        try:
            self._socket.send_multipart((peer, frame))
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._peers.discard(peer)
            self._inbox.put((peer, Bye()))


_decode = msgspec.msgpack.Decoder(CoreInput).decode


def _frame(message: CoreOutput) -> bytes:
    frame = msgspec.msgpack.encode(message)
    if len(frame) > MAX_MESSAGE_BYTES:  # it would cut the connection for good
        cause = f"an answer takes {len(frame)} bytes, over the limit of {MAX_MESSAGE_BYTES}."
        frame = msgspec.msgpack.encode(Dead(cause, "Restart, and ask for fewer logprobs at once."))
    return frame


def open_socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[bytes]:
    """A socket with bounded messages. Its queues are not bounded: ``max_waiting`` bounds what can be in them."""
    made: zmq.Socket[bytes] = context.socket(kind)
    made.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    made.setsockopt(zmq.SNDHWM, 0)
    made.setsockopt(zmq.RCVHWM, 0)
    made.setsockopt(zmq.LINGER, 0)
    return made
