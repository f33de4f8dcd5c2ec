"""The state of batches, beside the files they read and write: any API process can tell it, and cancel one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from octavo.errors import Overloaded
from octavo.server.answers import now
from octavo.server.files.store import check_id, not_found, write_whole

MAX_COUNT = 1000
WINDOW_SECONDS = 24 * 3600
STALE_SECONDS = 60.0  # a batch whose state nobody has written for so long has lost its process
_ABOUT = ".json"
_CANCEL = ".cancel"
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]


class BatchError(msgspec.Struct, kw_only=True):
    """What is wrong with the input file, or why the batch ended early. ``line`` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct, kw_only=True):
    """The errors of a batch, as a list."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class Counts(msgspec.Struct, kw_only=True):
    """Requests of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """A batch, as OpenAI's API describes it."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = msgspec.field(default_factory=Counts)
    metadata: dict[str, str] | None = None

    def become(self, status: Status) -> None:
        """Changes the status, and says when."""
        self.status = status
        if status != "validating":
            setattr(self, f"{status}_at", now())

    def fail(self, message: str, **where: Any) -> None:
        """Ends it with an error."""
        code = "invalid_line" if "line" in where else "batch_failed"
        self.errors = BatchErrors(data=[BatchError(code=code, message=message, **where)])
        self.become("failed")


class _Owned(msgspec.Struct, kw_only=True):
    owner: bytes
    batch: Batch


class BatchStore:
    """What belongs to one owner does not exist for others. Small files: it may be called in the event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, owner: bytes, batch: Batch) -> None:
        """Raises `Overloaded` when there are too many."""
        ids = self._ids()
        if len(ids) >= MAX_COUNT and not self._forget_one(ids):
            raise Overloaded(f"there are {MAX_COUNT} batches, the limit.", "Wait until one has ended.")
        self.save(owner, batch)

    def save(self, owner: bytes, batch: Batch) -> None:
        """Writes the state; to be called at least every `STALE_SECONDS` / 2 while the batch is worked on."""
        write_whole(self._path(batch.id), msgspec.json.encode(_Owned(owner=owner, batch=batch)))
        if batch.status in ENDED:
            self._path(batch.id, _CANCEL).unlink(missing_ok=True)

    def get(self, owner: bytes, id: str) -> Batch:
        """Raises `ApiError` (404) for a batch that is not there."""
        found = self._read(check_id(id)) if id.startswith("batch_") else None
        if found is None or found.owner != owner:
            raise not_found("batch", id)
        return found.batch

    def all(self, owner: bytes) -> list[Batch]:
        """The latest first."""
        found = [one for one in map(self._read, self._ids()) if one is not None and one.owner == owner]
        return sorted((one.batch for one in found), key=lambda batch: (-batch.created_at, batch.id))

    def cancel(self, owner: bytes, id: str) -> Batch:
        """Tells whoever works on it to stop; one that has ended stays as it is."""
        batch = self.get(owner, id)
        if batch.status not in ENDED:
            self._path(id, _CANCEL).touch(mode=0o600)
            if batch.status != "cancelling":
                batch.become("cancelling")
        return batch

    def cancelled(self, id: str) -> bool:
        """Whether somebody wants it to stop."""
        return self._path(id, _CANCEL).exists()

    def _path(self, id: str, suffix: str = _ABOUT) -> Path:
        return self._folder / (id + suffix)

    def _ids(self) -> list[str]:
        return [path.name.removesuffix(_ABOUT) for path in self._folder.glob("batch_*" + _ABOUT)]

    def _read(self, id: str) -> _Owned | None:
        try:
            path = self._path(id)
            found = msgspec.json.decode(path.read_bytes(), type=_Owned)
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return None
        if found.batch.status not in ENDED:
            if age > STALE_SECONDS:
                found.batch.fail("the server that worked on this batch has ended.")
            elif self.cancelled(id) and found.batch.status != "cancelling":
                found.batch.become("cancelling")
        return found

    def _forget_one(self, ids: list[str]) -> bool:
        """Makes room by dropping the oldest one that has ended."""
        found = [one.batch for one in map(self._read, ids) if one is not None and one.batch.status in ENDED]
        for batch in sorted(found, key=lambda batch: batch.created_at)[:1]:
            self._path(batch.id).unlink(missing_ok=True)
            return True
        return False
