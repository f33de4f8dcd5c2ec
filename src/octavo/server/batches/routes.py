"""``/v1/batches``: start, look at, list, cancel."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import Overloaded, RequestError
from octavo.server.answers import json_response, now, page_of
from octavo.server.batches.runner import BatchRun
from octavo.server.batches.store import WINDOW_SECONDS, Batch, BatchStore
from octavo.server.decoding import decode, decode_query
from octavo.server.errors import shutting_down
from octavo.server.files.routes import store_of
from octavo.server.protocol import check_metadata
from octavo.server.service import Service

MAX_RUNNING = 64  # batches that one API process works on
MAX_PAGE = 100


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/batches``."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


class BatchQuery(msgspec.Struct, kw_only=True):
    """The query of ``GET /v1/batches``."""

    after: Annotated[str, Meta(description="the list begins behind the batch with this id")] = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE, description="greatest length")] = MAX_PAGE


async def create(service: Service, request: Request) -> Response:
    """Begins to work on the lines of a file, at the lowest priority."""
    body = decode(await request.body(), BatchRequest)
    check_metadata(body.metadata)
    if service.closing:
        raise shutting_down()
    if body.endpoint not in service.endpoints:
        known = ", ".join(service.endpoints)
        raise RequestError(f"endpoint is {body.endpoint[:100]!r}.", f"Use one of {known}.", param="endpoint")
    owner, files = request.scope["owner"], store_of(service)
    await asyncio.to_thread(files.get, owner, body.input_file_id)
    if len(service.batches) >= MAX_RUNNING:
        raise Overloaded(f"{MAX_RUNNING} batches are running, the limit.", "Wait until one has ended.")
    id = f"batch_{secrets.token_hex(16)}"
    batch = Batch(
        id=id,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        created_at=now(),
        expires_at=now() + WINDOW_SECONDS,
        metadata=body.metadata,
    )
    batches = BatchStore(files.folder)
    batches.add(owner, batch)
    answer = json_response(batch)
    service.batches[id] = task = asyncio.create_task(BatchRun(service, files, batches, owner, batch).run())
    task.add_done_callback(lambda _: service.batches.pop(id, None))
    return answer


async def retrieve(service: Service, request: Request) -> Response:
    """The state of a batch."""
    return json_response(_batches(service).get(request.scope["owner"], request.path_params["id"]))


async def listing(service: Service, request: Request) -> Response:
    """Batches of this key, the latest first."""
    query = decode_query(request, BatchQuery)
    found = await asyncio.to_thread(_batches(service).all, request.scope["owner"])
    return json_response(page_of(found, query.after, query.limit))


async def cancel(service: Service, request: Request) -> Response:
    """Lets the requests of a batch that are running end, and starts no more."""
    return json_response(_batches(service).cancel(request.scope["owner"], request.path_params["id"]))


def _batches(service: Service) -> BatchStore:
    return BatchStore(store_of(service).folder)
