"""``/v1/files``: upload, list, read, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from octavo.errors import RequestError
from octavo.server.answers import json_response
from octavo.server.files.multipart import parse
from octavo.server.files.store import FileObject, FileStore
from octavo.server.service import Service

if TYPE_CHECKING:
    from octavo.server.batches.store import Batch

MAX_PAGE = 10_000


class FileList(msgspec.Struct, kw_only=True):
    """An answer to ``GET /v1/files``."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct):
    """An answer to ``DELETE /v1/files/{id}``."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


async def upload(service: Service, request: Request) -> Response:
    """Stores the field ``file`` of a form; ``purpose`` is ``batch``."""
    form = parse(request.headers.get("content-type", ""), await request.body())
    file, purpose = form.pop("file", None), form.pop("purpose", None)
    if file is None or file.filename is None:
        raise RequestError("the form has no file.", "Send one in the field file.", param="file")
    if purpose is None or purpose.data != b"batch":
        raise RequestError("purpose is not batch.", "Other files are of no use here.", param="purpose")
    if form:
        name = next(iter(form))[:100]
        raise RequestError(f"{name!r} is not a field of this form.", "Leave it out.", param=name)
    owner = request.scope["owner"]
    return json_response(await asyncio.to_thread(store_of(service).add, owner, file.filename, "batch", file.data))


async def listing(service: Service, request: Request) -> Response:
    """Files of this key, the latest first."""
    files = await asyncio.to_thread(store_of(service).all, request.scope["owner"])
    purpose = request.query_params.get("purpose")
    files = [file for file in files if purpose in (None, file.purpose)]
    return json_response(FileList(**page_of(request, files, MAX_PAGE)))


async def retrieve(service: Service, request: Request) -> Response:
    """What is known of a file."""
    return json_response(
        await asyncio.to_thread(store_of(service).get, request.scope["owner"], request.path_params["id"])
    )


async def content(service: Service, request: Request) -> Response:
    """A file's content."""
    path = await asyncio.to_thread(store_of(service).path, request.scope["owner"], request.path_params["id"])
    return FileResponse(path, media_type="application/octet-stream")


async def delete(service: Service, request: Request) -> Response:
    """Deletes a file."""
    id = request.path_params["id"]
    await asyncio.to_thread(store_of(service).delete, request.scope["owner"], id)
    return json_response(FileDeleted(id))


def store_of(service: Service) -> FileStore:
    """Raises `RequestError` where there are no files."""
    if service.files is None:
        raise RequestError("this server keeps no files.", "Use octavo run-batch.")
    return service.files


def page_of(request: Request, found: Sequence[FileObject | Batch], most: int) -> dict[str, Any]:
    """The fields of a list: at most ``limit`` of what was ``found``, from behind ``after`` on, as the query says."""
    limit, after = request.query_params.get("limit", str(most)), request.query_params.get("after")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= most):
        raise RequestError(f"limit is {limit[:20]!r}, outside [1, {most}].", "Give a number in it.", param="limit")
    ids = [one.id for one in found]
    if after is not None and after not in ids:
        raise RequestError(f"after is {after[:100]!r}, which is not in the list.", "Leave it out.", param="after")
    start = 0 if after is None else ids.index(after) + 1
    end = start + int(limit)
    shown = ids[start:end]
    first, last = (shown[0], shown[-1]) if shown else (None, None)
    return {"data": found[start:end], "first_id": first, "last_id": last, "has_more": end < len(ids)}
