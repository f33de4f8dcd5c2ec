"""Files that clients have uploaded and those that batches make, in one private directory, within a count and a size.

The directory is all there is, so several API processes can share it. Beside the content of a file stands what is known
about it, as JSON; its appearance, by renaming, makes the file exist.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import BinaryIO, Literal, Self

import msgspec

from octavo.server.answers import now
from octavo.server.errors import ApiError

MAX_COUNT = 1000
MAX_BYTES = 4 * 2**30
MAX_NAME = 255
_ID = re.compile(r"(?:file|batch)[-_][0-9a-f]{32}")
_ABOUT = ".json"

Purpose = Literal["batch", "batch_output"]


class FileObject(msgspec.Struct, kw_only=True):
    """A file, as OpenAI's API describes it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"


class _Owned(msgspec.Struct, kw_only=True):
    owner: bytes
    file: FileObject


class FileStore:
    """What belongs to one owner does not exist for others. Methods block: call them in a thread."""

    def __init__(self, folder: Path, max_count: int = MAX_COUNT, max_bytes: int = MAX_BYTES) -> None:
        """``folder`` is made, for this user alone, with the first file."""
        self.folder = folder
        self._max_count, self._max_bytes = max_count, max_bytes

    def add(self, owner: bytes, filename: str, purpose: Purpose, data: bytes) -> FileObject:
        """Stores a file; raises `ApiError` (413) when there is no room for it."""
        with self.write(owner, filename, purpose) as writer:
            writer.write(data)
        return writer.file

    def write(self, owner: bytes, filename: str, purpose: Purpose) -> Writer:
        """A file that comes in pieces; it exists once it is closed."""
        if self._count() >= self._max_count:
            raise _no_room(f"there are {self._max_count} files, the limit")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Writer(self, owner, filename[:MAX_NAME], purpose)

    def get(self, owner: bytes, id: str) -> FileObject:
        """Raises `ApiError` (404) for a file that is not there."""
        found = self._read(check_id(id)) if id.startswith("file-") else None
        if found is None or found.owner != owner:
            raise not_found("file", id)
        return found.file

    def path(self, owner: bytes, id: str) -> Path:
        """Where the content of a file is."""
        return self.folder / self.get(owner, id).id

    def all(self, owner: bytes) -> list[FileObject]:
        """The latest first."""
        found = (self._read(path.name.removesuffix(_ABOUT)) for path in self.folder.glob("file-*" + _ABOUT))
        files = [one.file for one in found if one is not None and one.owner == owner]
        return sorted(files, key=lambda file: (-file.created_at, file.id))

    def delete(self, owner: bytes, id: str) -> None:
        """Raises `ApiError` (404) for a file that is not there."""
        path = self.path(owner, id)
        path.with_name(path.name + _ABOUT).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def room(self) -> int:
        """Bytes that may still be written."""
        used = 0
        for entry in os.scandir(self.folder):
            try:
                used += entry.stat().st_size
            except FileNotFoundError:  # deleted meanwhile
                continue
        return self._max_bytes - used

    def _count(self) -> int:
        return sum(1 for _ in self.folder.glob("file-*" + _ABOUT))

    def _read(self, id: str) -> _Owned | None:
        try:
            return msgspec.json.decode((self.folder / (id + _ABOUT)).read_bytes(), type=_Owned)
        except FileNotFoundError:
            return None


class Writer:
    """Writes one file. Leaving the ``with`` block by an exception leaves nothing behind."""

    CHECK_EVERY = 2**20  # bytes between two looks at the room that is left

    def __init__(self, store: FileStore, owner: bytes, filename: str, purpose: Purpose) -> None:
        self.file = FileObject(
            id=f"file-{secrets.token_hex(16)}", bytes=0, created_at=now(), filename=filename, purpose=purpose
        )
        self._store, self._owner = store, owner
        self._path = store.folder / self.file.id
        self._left = 0
        self._sink: BinaryIO = open(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """Raises `ApiError` (413) when there is no room."""
        if len(data) > self._left:
            room = self._store.room()
            if len(data) > room:
                raise _no_room(f"{len(data)} bytes are more than the {max(room, 0)} that are left for files")
            self._left = min(room, max(self.CHECK_EVERY, len(data)))
        self._left -= len(data)
        self._sink.write(data)
        self.file.bytes += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._sink.close()
        if kind is None:
            write_whole(
                self._path.with_name(self._path.name + _ABOUT),
                msgspec.json.encode(_Owned(owner=self._owner, file=self.file)),
            )
        else:
            self._path.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file so that readers see all of it or nothing."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
        sink.write(data)
    part.replace(path)


def check_id(id: str) -> str:
    """An id that may be part of a path; raises `ApiError` (404) for what cannot be one."""
    if not _ID.fullmatch(id):
        raise not_found(id.partition("-")[0].partition("_")[0][:10], id)
    return id


def not_found(kind: str, id: str) -> ApiError:
    """404."""
    return ApiError(404, "not_found", f"there is no {kind} {id[:100]!r}.", "List those that there are.", param="id")


def _no_room(cause: str) -> ApiError:
    return ApiError(413, "no_room", f"{cause}.", "Delete files that are no longer needed.", param="file")
