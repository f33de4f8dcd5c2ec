from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from octavo.core import transport
from octavo.core.transport import Channel, Peer, ZmqChannel, open_socket
from octavo.frontend.core_process import Core
from octavo.types import (
    Abort,
    Bye,
    CoreOutput,
    Dead,
    Hello,
    Outputs,
    Ping,
    Pong,
    Request,
    Sampling,
    Stats,
    Submit,
    TokenOutput,
)
from tests.waiting import PATIENCE

decode = msgspec.msgpack.Decoder(CoreOutput).decode


class Client:
    """The other end of a `ZmqChannel`, and more such ends."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.Context()
        self.address = f"ipc://{folder}/core"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/core")
            listener.listen()
            self.channel = ZmqChannel(self.address, os.dup(listener.fileno()))
        self.sockets: list[zmq.Socket[bytes]] = []
        self.socket = self.connect()

    def connect(self) -> zmq.Socket[bytes]:
        made = open_socket(self.context, zmq.DEALER)
        made.connect(self.address)
        self.sockets.append(made)
        return made

    def send(self, message: object) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def receive(self, one: zmq.Socket[bytes] | None = None) -> CoreOutput:
        one = one or self.socket
        assert one.poll(PATIENCE * 1000)
        return decode(one.recv())

    def meet(self) -> Peer:
        """Says hello; returns the name that the channel knows this end by."""
        self.send(Hello())
        ((peer, message),) = self.channel.receive(wait=True)
        assert message == Hello()
        return peer

    def close(self) -> None:
        self.channel.close()
        for one in self.sockets:
            one.close(linger=0)
        self.context.term()


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(transport, "FLUSH_MS", int(PATIENCE * 1000))
    made = Client(tmp_path)
    yield made
    made.close()


def request(id: str, tokens: bytes = b"\1\0\0\0") -> Request:
    return Request(id=id, token_ids=tokens, page_hashes=b"", sampling=Sampling(max_tokens=3, logit_bias={5: -1.5}))


def receive_all(channel: Channel, count: int) -> list[object]:
    found: list[object] = []
    while len(found) < count:
        found += [message for _, message in channel.receive(wait=True)]
    return found


def test_messages_keep_their_order_and_content_in_both_directions(client: Client) -> None:
    sent = [Submit([request(f"r{i}")]) for i in range(100)] + [Abort(["r1"]), Ping(7)]
    for message in sent:
        client.send(message)
    assert receive_all(client.channel, 102) == sent
    peer = client.meet()
    outputs = [Outputs([TokenOutput(id=f"r{i}", token_ids=[i])], Stats(steps=i)) for i in range(100)]
    for output in outputs:
        client.channel.send(peer, output)
    assert [client.receive() for _ in outputs] == outputs


def test_receive_without_wait_returns_at_once_when_nothing_came(client: Client) -> None:
    assert client.channel.receive(wait=False) == []


def test_a_waiting_loop_is_woken_by_a_message_and_uses_no_cpu_until_then(client: Client) -> None:
    receiver = threading.Thread(target=client.channel.receive, kwargs={"wait": True})
    receiver.start()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.1  # 0.00 where it is quiet; a loop that turns would take all of the time
    client.send(Ping(1))
    receiver.join(PATIENCE)
    assert not receiver.is_alive()


def test_close_hands_over_what_was_sent_before(client: Client) -> None:
    peer = client.meet()
    for i in range(50):
        client.channel.send(peer, Pong(i, Stats()))
    client.channel.close()
    assert [client.receive() for _ in range(50)] == [Pong(i, Stats()) for i in range(50)]


def test_a_message_that_is_not_of_the_protocol_is_dropped_and_the_next_one_arrives(client: Client) -> None:
    client.socket.send(b"\xc1 not msgpack")
    client.send({"type": "submit", "requests": [{"id": 5}]})
    client.send(Ping(3))
    assert receive_all(client.channel, 1) == [Ping(3)]


def test_a_long_prompt_passes_whole(client: Client) -> None:
    tokens = bytes(range(256)) * 40_000  # 10 MB
    client.send(Submit([request("long", tokens)]))
    (message,) = receive_all(client.channel, 1)
    assert isinstance(message, Submit)
    assert message.requests[0].token_ids == tokens


def test_an_answer_over_the_limit_is_not_sent_and_the_engine_is_declared_dead(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_MESSAGE_BYTES", 1000)
    client.channel.send(client.meet(), Outputs([TokenOutput(id="a", token_ids=[70_000] * 1000)]))
    dead = client.receive()
    assert isinstance(dead, Dead)
    assert "over the limit of 1000" in dead.cause


def test_each_peer_gets_its_own_answers_and_all_get_what_is_for_all(client: Client) -> None:
    peers, sockets = [client.meet()], [client.socket]
    client.socket = client.connect()
    peers.append(client.meet())
    sockets.append(client.socket)
    for i, peer in enumerate(peers):
        client.channel.send(peer, Pong(i, Stats()))
    client.channel.send_all(Dead("the end"))
    for i, one in enumerate(sockets):
        assert [client.receive(one) for _ in range(2)] == [Pong(i, Stats()), Dead("the end")]


def test_what_is_for_all_waits_for_the_first_peer(client: Client) -> None:
    client.channel.send_all(Dead("the end"))
    client.send(Hello())
    assert client.receive() == Dead("the end")


def test_a_peer_that_is_gone_is_reported_when_a_message_cannot_be_delivered(client: Client) -> None:
    peer = client.meet()
    client.socket.close(linger=0)
    deadline = time.monotonic() + PATIENCE
    found: list[object] = []
    while not found and time.monotonic() < deadline:
        client.channel.send(peer, Pong(1, Stats()))
        time.sleep(0.01)
        found = list(client.channel.receive(wait=False))
    assert found[0] == (peer, Bye())


def test_a_peer_without_the_public_key_is_not_heard(tmp_path: Path) -> None:
    public, secret = zmq.curve_keypair()
    with socket.socket(socket.AF_UNIX) as listener, zmq.Context() as context:
        listener.bind(f"{tmp_path}/core")
        listener.listen()
        address = f"ipc://{tmp_path}/core"
        channel = ZmqChannel(address, os.dup(listener.fileno()), secret_key=secret.decode())
        stranger = open_socket(context, zmq.DEALER)
        stranger.connect(address)
        stranger.send(msgspec.msgpack.encode(Ping(1)))
        time.sleep(0.2)
        assert channel.receive(wait=False) == []
        friend = Core(address, public_key=public.decode())
        ((peer, message),) = channel.receive(wait=True)
        assert message == Hello()
        channel.send(peer, Pong(1, Stats()))
        assert friend.socket.poll(PATIENCE * 1000)
        friend.stop()
        stranger.close()
        channel.close()
