from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from octavo.core import transport
from octavo.core.transport import Channel, MemoryChannel, ZmqChannel, open_socket
from octavo.types import Abort, CoreOutput, Dead, Outputs, Ping, Pong, Request, Sampling, Stats, Submit, TokenOutput

decode = msgspec.msgpack.Decoder(CoreOutput).decode


class Client:
    """The other end of a `ZmqChannel`."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.Context()
        self.push = open_socket(self.context, zmq.PUSH)
        self.push.bind(f"ipc://{folder}/in")
        self.pull = open_socket(self.context, zmq.PULL)
        self.pull.bind(f"ipc://{folder}/out")
        self.channel = ZmqChannel(f"ipc://{folder}/in", f"ipc://{folder}/out")

    def send(self, message: object) -> None:
        self.push.send(msgspec.msgpack.encode(message))

    def receive(self) -> CoreOutput:
        assert self.pull.poll(5000)
        return decode(self.pull.recv())

    def close(self) -> None:
        self.channel.close()
        self.context.destroy(linger=0)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    made = Client(tmp_path)
    yield made
    made.close()


def request(id: str, tokens: bytes = b"\1\0\0\0") -> Request:
    return Request(id=id, token_ids=tokens, page_hashes=b"", sampling=Sampling(max_tokens=3, logit_bias={5: -1.5}))


def receive_all(channel: Channel, count: int) -> list[object]:
    found: list[object] = []
    while len(found) < count:
        found += channel.receive(wait=True)
    return found


def test_messages_keep_their_order_and_content_in_both_directions(client: Client) -> None:
    sent = [Submit([request(f"r{i}")]) for i in range(100)] + [Abort(["r1"]), Ping(7)]
    for message in sent:
        client.send(message)
    assert receive_all(client.channel, 102) == sent
    outputs = [Outputs([TokenOutput(id=f"r{i}", token_ids=[i])], Stats(steps=i)) for i in range(100)]
    for output in outputs:
        client.channel.send(output)
    assert [client.receive() for _ in outputs] == outputs


def test_receive_without_wait_returns_at_once_when_nothing_came(client: Client) -> None:
    assert client.channel.receive(wait=False) == []
    assert MemoryChannel().receive(wait=False) == []


def test_a_waiting_loop_is_woken_by_a_message_and_uses_no_cpu_until_then(client: Client) -> None:
    receiver = threading.Thread(target=client.channel.receive, kwargs={"wait": True})
    receiver.start()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.02
    client.send(Ping(1))
    receiver.join(2)
    assert not receiver.is_alive()


def test_close_hands_over_what_was_sent_before(client: Client) -> None:
    for i in range(50):
        client.channel.send(Pong(i, Stats()))
    client.channel.close()
    assert [client.receive() for _ in range(50)] == [Pong(i, Stats()) for i in range(50)]


def test_a_message_that_is_not_of_the_protocol_is_dropped_and_the_next_one_arrives(client: Client) -> None:
    client.push.send(b"\xc1 not msgpack")
    client.send({"type": "submit", "requests": [{"id": 5}]})
    client.send(Ping(3))
    assert client.channel.receive(wait=True) == [Ping(3)]


def test_a_long_prompt_passes_whole(client: Client) -> None:
    tokens = bytes(range(256)) * 40_000  # 10 MB
    client.send(Submit([request("long", tokens)]))
    (message,) = client.channel.receive(wait=True)
    assert isinstance(message, Submit)
    assert message.requests[0].token_ids == tokens


def test_an_answer_over_the_limit_is_not_sent_and_the_engine_is_declared_dead(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_MESSAGE_BYTES", 1000)
    client.channel.send(Outputs([TokenOutput(id="a", token_ids=[70_000] * 1000)]))
    dead = client.receive()
    assert isinstance(dead, Dead)
    assert "over the limit of 1000" in dead.cause


def test_memory_channel_is_a_queue_in_each_direction() -> None:
    channel = MemoryChannel()
    channel.inbox.put(Ping(1))
    channel.inbox.put(Ping(2))
    assert channel.receive(wait=True) == [Ping(1), Ping(2)]
    channel.send(Pong(1, Stats()))
    assert channel.outbox.get_nowait() == Pong(1, Stats())
