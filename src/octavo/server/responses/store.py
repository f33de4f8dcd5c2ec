"""Responses that can be asked for again and continued: the latest ones, in memory, within a count and a size."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.errors import RequestError
from octavo.server.errors import ApiError
from octavo.server.responses.body import Response

MAX_COUNT = 1000
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Stored:
    """``chat`` are the messages so far, the answer among them; ``given`` the input items. All of it is JSON."""

    response: bytes
    chat: bytes
    given: bytes

    @property
    def size(self) -> int:
        return len(self.response) + len(self.chat) + len(self.given)

    @property
    def background(self) -> bool:
        return bool(msgspec.json.decode(self.response)["background"])


class ResponseStore:
    """The least recently used go first. What belongs to one owner does not exist for others."""

    def __init__(self, max_count: int = MAX_COUNT, max_bytes: int = MAX_BYTES) -> None:
        self._max_count, self._max_bytes = max_count, max_bytes
        self._all: OrderedDict[tuple[bytes, str], Stored] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def size(self) -> int:
        """Bytes of all that is stored."""
        return self._bytes

    def put(self, owner: bytes, response: Response, chat: list[dict[str, Any]], given: list[dict[str, Any]]) -> None:
        """Stores a response, in place of an earlier state of it. One that is too large for the store is not kept."""
        key = (owner, response.id)
        self._drop(key)
        encode = msgspec.json.encode
        stored = Stored(encode(response), encode(chat), encode(given))
        if stored.size > self._max_bytes:
            return
        self._all[key] = stored
        self._bytes += stored.size
        while self._bytes > self._max_bytes or len(self._all) > self._max_count:
            self._drop(next(iter(self._all)))

    def get(self, owner: bytes, id: str) -> Stored:
        """Raises `ApiError` (404) for one that is not there, or no more."""
        stored = self._all.get((owner, id))
        if stored is None:
            raise ApiError(404, "not_found", f"there is no response {id[:100]!r}.", "The store keeps the latest ones.")
        self._all.move_to_end((owner, id))
        return stored

    def chat(self, owner: bytes, id: str) -> list[dict[str, Any]]:
        """The messages that an answer to the response ``id`` continues."""
        stored = self.get(owner, id)
        status = msgspec.json.decode(stored.response)["status"]
        if status not in ("completed", "incomplete"):
            raise RequestError(
                f"the response {id[:100]!r} is {status}.", "Continue one that has ended.", param="previous_response_id"
            )
        chat: list[dict[str, Any]] = msgspec.json.decode(stored.chat)
        return chat

    def delete(self, owner: bytes, id: str) -> None:
        """Raises `ApiError` (404) for one that is not there."""
        self.get(owner, id)
        self._drop((owner, id))

    def _drop(self, key: tuple[bytes, str]) -> None:
        old = self._all.pop(key, None)
        if old is not None:
            self._bytes -= old.size
