"""``/v1/files``: upload, list, read, delete."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from octavo.errors import RequestError
from octavo.server.answers import json_response, page_of
from octavo.server.decoding import decode_query
from octavo.server.files.multipart import parse
from octavo.server.files.store import FileStore
from octavo.server.service import Service

MAX_PAGE = 10_000


class FileQuery(msgspec.Struct, kw_only=True):
    """The query of ``GET /v1/files``."""

    purpose: Annotated[str, Meta(description="only files of this purpose")] = ""
    after: Annotated[str, Meta(description="the list begins behind the file with this id")] = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE, description="greatest length")] = MAX_PAGE


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
    query = decode_query(request, FileQuery)
    files = await asyncio.to_thread(store_of(service).all, request.scope["owner"])
    wanted = [file for file in files if query.purpose in ("", file.purpose)]
    return json_response(page_of(wanted, query.after, query.limit))


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
