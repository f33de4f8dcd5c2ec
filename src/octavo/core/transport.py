"""How messages reach the core loop and leave it: over ZeroMQ, or in memory with the same face.

    client                               core process
      PUSH, binds  -- CoreInput  -->  PULL  \\  one I/O thread:   inbox  -> loop
      PULL, binds  <- CoreOutput --   PUSH  /  socket, msgpack    outbox <- loop

The loop touches two queues and never a socket. When idle both threads are blocked in the kernel, without polling.
The sockets lie in a folder that only the user may enter (`frontend.core_process` makes it); messages are msgpack of the
structs in `octavo.types`, checked against their types when decoded.
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
from octavo.types import MAX_MESSAGE_BYTES, CoreInput, CoreOutput, Dead

FLUSH_MS = 1000  # how long `close` may take to hand over what was sent before


class Channel(Protocol):
    """The core's end."""

    def receive(self, *, wait: bool) -> list[CoreInput]:
        """Everything that has arrived, in order; with ``wait``, blocks until there is at least one message."""
        ...

    def send(self, message: CoreOutput) -> None:
        """Queues a message; never blocks."""
        ...

    def close(self) -> None:
        """Hands over what was sent, within `FLUSH_MS`, and ends."""
        ...


def _drain(inbox: queue.SimpleQueue[CoreInput], *, wait: bool) -> list[CoreInput]:
    messages = [inbox.get()] if wait else []
    try:
        while True:
            messages.append(inbox.get_nowait())
    except queue.Empty:
        return messages


class MemoryChannel:
    """Both ends in one process: the client puts into ``inbox`` and gets from ``outbox``."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[CoreInput] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[CoreOutput] = queue.SimpleQueue()

    def receive(self, *, wait: bool) -> list[CoreInput]:
        return _drain(self.inbox, wait=wait)

    def send(self, message: CoreOutput) -> None:
        self.outbox.put(message)

    def close(self) -> None:
        pass


class ZmqChannel:
    """The core's end of two ``ipc://`` addresses that the client has bound."""

    def __init__(self, inputs: str, outputs: str) -> None:
        self._inbox: queue.SimpleQueue[CoreInput] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[CoreOutput | None] = queue.SimpleQueue()  # None: close
        self._context = zmq.Context()
        self._pull = open_socket(self._context, zmq.PULL)
        self._pull.connect(inputs)
        self._push = open_socket(self._context, zmq.PUSH)
        self._push.connect(outputs)
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="octavo-core-io", daemon=True)
        self._thread.start()

    def receive(self, *, wait: bool) -> list[CoreInput]:
        return _drain(self._inbox, wait=wait)

    def send(self, message: CoreOutput) -> None:
        self._outbox.put(message)
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
        decode = msgspec.msgpack.Decoder(CoreInput).decode
        poller = zmq.Poller()
        poller.register(self._pull, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while True:
            ready: dict[Any, int] = dict(poller.poll())
            if self._pull in ready:
                self._take(decode)
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
                if not self._flush():
                    break
        self._push.close(linger=FLUSH_MS)
        self._pull.close(linger=0)
        self._context.term()  # returns once the linger of the push socket is over

    def _take(self, decode: Any) -> None:
        while True:
            try:
                frame = self._pull.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._inbox.put(decode(frame))
            except msgspec.MsgspecError as error:
                get_logger().error("dropped a message of %d bytes from the client: %s", len(frame), error)

    def _flush(self) -> bool:
        """Sends what waits; False once `close` was called."""
        encode = msgspec.msgpack.encode
        while True:
            try:
                message = self._outbox.get_nowait()
            except queue.Empty:
                return True
            if message is None:
                return False
            frame = encode(message)
            if len(frame) > MAX_MESSAGE_BYTES:  # it would cut the connection for good
                cause = f"an answer takes {len(frame)} bytes, over the limit of {MAX_MESSAGE_BYTES}."
                frame = encode(Dead(cause, "Restart, and ask for fewer logprobs at once."))
            self._push.send(frame)


def open_socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[bytes]:
    """A socket with bounded messages. Its queues are not bounded: ``max_waiting`` bounds what can be in them."""
    made: zmq.Socket[bytes] = context.socket(kind)
    made.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    made.setsockopt(zmq.SNDHWM, 0)
    made.setsockopt(zmq.RCVHWM, 0)
    made.setsockopt(zmq.LINGER, 0)
    return made
