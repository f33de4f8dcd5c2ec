"""Messages to the engine's socket that nobody of ours would send: each is dropped, and the next good one answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.core.process import run
from octavo.runtime.stub import StubWorker
from octavo.types import Abort, Hello, Outputs, Ping, Pong, Ready, Request, ResetPrefixCache, Sampling, Submit
from tests.core.test_transport import Client
from tests.waiting import PATIENCE

GOOD = [
    msgspec.msgpack.encode(message)
    for message in (
        Hello(),
        Submit([Request(id="a", token_ids=b"\5\0\0\0", page_hashes=b"", sampling=Sampling(max_tokens=2))]),
        Abort(["a", "b"]),
        ResetPrefixCache(7),
    )
]
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
SAMPLING = st.dictionaries(st.sampled_from(Sampling.__struct_fields__), values)


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A good message that was cut off, had a byte changed or something appended."""
    data = bytearray(draw(st.sampled_from(GOOD)))
    how = draw(st.integers(0, 2))
    if how == 0:
        return bytes(data[: draw(st.integers(0, len(data) - 1))])
    if how == 1:
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    return bytes(data) + draw(st.binary(min_size=1, max_size=20))


@st.composite
def ill_formed(draw: st.DrawFn) -> bytes:
    """Well-formed msgpack in nearly the shape of a request."""
    request = {
        "id": draw(st.text() | values),
        "token_ids": draw(st.binary(max_size=64) | values),
        "page_hashes": draw(st.binary(max_size=64) | values),
        "sampling": draw(SAMPLING | values),
    }
    return msgspec.msgpack.encode({"type": "submit", "requests": [request]})


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a running engine."""
    made = Client(tmp_path_factory.mktemp("fuzz"))
    engine = EngineCore(EngineConfig.of(model="stub", max_num_seqs=4), StubWorker())
    ends: list[int] = []
    thread = threading.Thread(target=lambda: ends.append(run(lambda: engine, made.channel)))
    thread.start()
    yield made
    made.send({"type": "shutdown"})
    thread.join(PATIENCE)
    assert ends == [0]
    made.close()


def answers(client: Client, nonce: int) -> list[Any]:
    """What came up to the answer to a ping."""
    client.send(Ping(nonce))
    found: list[Any] = []
    while True:
        message = client.receive()
        assert isinstance(message, Pong | Ready | Outputs), message  # and never Dead
        if isinstance(message, Pong) and message.nonce == nonce:
            return found
        found.append(message)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(frames=[b"\x81\xa4type\xa1\x9d"])  # no UTF-8
@example(frames=[b"\x91" * 100_000])
@given(frames=st.lists(broken() | st.binary(max_size=200) | values.map(msgspec.msgpack.encode), max_size=4))
def test_frames_that_are_no_messages_are_dropped(client: Client, frames: list[bytes]) -> None:
    for frame in frames:
        if b"shutdown" not in frame:
            client.socket.send(frame)
    if len(frames) > 1:
        client.socket.send_multipart(frames)
    answers(client, 2**40)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frame=ill_formed())
def test_requests_with_fields_of_any_kind_do_not_end_the_engine(client: Client, frame: bytes) -> None:
    client.socket.send(frame)
    answers(client, 2**41)
