"""What a killed process left of a file is completed, but only if it is a beginning of that file."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Hub, git_oid

Client = Callable[..., Any]

WEIGHTS = random.Random(0).randbytes(3_000_000)
FILES = {
    "config.json": json.dumps({"model_type": "llama"}).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
}
SHA = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def blobs(hub: Hub, tmp_path: Path) -> Path:
    hub.cdn, hub.sent = True, 0
    hub.push("owner/name", FILES)
    folder = tmp_path / "cache" / "models--owner--name" / "blobs"
    folder.mkdir(parents=True)
    return folder


def left(blobs: Path, data: bytes, *, etag: str = SHA, seconds: float = 60) -> Path:
    """A file as the client leaves it, last written to ``seconds`` ago."""
    path = blobs / f"{etag}.{random.randrange(1 << 32):08x}.incomplete"
    path.write_bytes(data)
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def whole(got: Any) -> bool:
    return all((Path(got["path"]) / name).read_bytes() == data for name, data in FILES.items())


def test_only_the_rest_is_fetched(blobs: Path, hub: Hub, client: Client) -> None:
    left(blobs, WEIGHTS[:1000])
    left(blobs, WEIGHTS[:2_900_000])
    assert whole(client())
    assert 100_000 <= hub.sent < 200_000
    assert list(blobs.glob("*.incomplete")) == []


def test_the_rest_may_break_off_too(blobs: Path, hub: Hub, client: Client) -> None:
    left(blobs, WEIGHTS[:1_000_000])
    hub.cuts = 1
    assert whole(client())
    assert hub.cuts == 0
    assert hub.sent < 2_200_000


def test_a_file_that_was_killed_at_its_end_is_not_fetched(blobs: Path, hub: Hub, client: Client) -> None:
    left(blobs, WEIGHTS)
    assert whole(client())
    assert hub.sent < 100_000


@pytest.mark.parametrize("data", [b"x" * 2_000_000, WEIGHTS + b"x"], ids=["other bytes", "too long"])
def test_what_is_no_beginning_is_fetched_anew(data: bytes, blobs: Path, hub: Hub, client: Client) -> None:
    left(blobs, data)
    assert whole(client())
    assert list(blobs.glob("*.incomplete")) == []


def test_what_cannot_be_checked_is_removed(blobs: Path, hub: Hub, client: Client) -> None:
    left(blobs, b"{", etag=git_oid(b"{}"))
    assert whole(client())
    assert list(blobs.glob("*.incomplete")) == []


def test_what_another_process_is_writing_is_left_alone(blobs: Path, hub: Hub, client: Client) -> None:
    part = left(blobs, WEIGHTS[:1000], seconds=-3600)
    assert whole(client())
    assert part.read_bytes() == WEIGHTS[:1000]


def test_a_gated_repo_is_completed_with_the_token_which_nobody_else_gets(blobs: Path, hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES, gated=True, token="t")
    hub.leaked = 0
    left(blobs, WEIGHTS[:2_000_000])
    assert whole(client(token="t"))
    assert hub.leaked == 0
